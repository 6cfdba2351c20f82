"""What `terraform apply` made at a server that answers as AWS does (moto), read back through boto3."""

import fnmatch
import json
import re
import shlex
import subprocess
from urllib.parse import unquote

import pytest
from botocore.exceptions import ClientError
from support.terraform import BUCKET, REGION, SCRIPTS

SITES = ("site-a", "site-b", "site-c")


def test_the_bucket_is_versioned_encrypted_closed_and_tidied(storage, aws):
    s3 = aws.client("s3")
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    (rule,) = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    key = aws.client("kms").describe_key(KeyId=f"alias/fedsam-{BUCKET}")["KeyMetadata"]
    assert rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"] == key["Arn"]
    assert aws.client("kms").get_key_rotation_status(KeyId=key["KeyId"])["KeyRotationEnabled"] is True
    block = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert set(block.values()) == {True}
    assert len(block) == 4
    (statement,) = json.loads(s3.get_bucket_policy(Bucket=BUCKET)["Policy"])["Statement"]
    assert (statement["Effect"], statement["Action"], statement["Principal"]) == ("Deny", "s3:*", "*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert sorted(statement["Resource"]) == [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
    with pytest.raises(ClientError, match="403"):  # this client comes without TLS
        s3.put_object(Bucket=BUCKET, Key="results/plain", Body=b"")
    rules = {one["ID"]: one for one in s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]}
    assert rules["abort-incomplete-uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert rules["expire-old-versions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 90}
    assert {one["Status"] for one in rules.values()} == {"Enabled"}


def groups(aws):
    """The cluster's security groups: id to kind."""
    found = aws.client("ec2").describe_security_groups()["SecurityGroups"]
    return {one["GroupId"]: one["GroupName"].removeprefix("kidneys-") for one in found if one["VpcId"] == vpc(aws)}


def vpc(aws):
    found = aws.client("ec2").describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["kidneys"]}])["Vpcs"]
    return found[0]["VpcId"]


def test_ports_are_open_between_those_groups_only_that_need_them(consortium, aws):
    kinds = groups(aws)
    rules = aws.client("ec2").describe_security_group_rules()["SecurityGroupRules"]
    ways = {True: set(), False: set()}
    for rule in rules:
        if rule["GroupId"] in kinds:
            peer = rule.get("ReferencedGroupInfo", {}).get("GroupId")
            other = kinds[peer] if peer else rule["CidrIpv4"]
            ways[rule["IsEgress"]].add((kinds[rule["GroupId"]], other, rule["FromPort"], rule["ToPort"]))
    between = {
        ("site", "head", 6379, 6379),
        ("site", "head", 20000, 20999),
        ("head", "site", 20000, 20999),
        ("site", "site", 20000, 20999),
        ("head", "tracking", 5000, 5000),
        ("tracking", "database", 5432, 5432),
    }
    assert ways[False] == {(target, source, first, last) for source, target, first, last in between}
    out = {(kind, "0.0.0.0/0", 443, 443) for kind in ("head", "site", "tracking")}
    assert {way for way in ways[True] if way[0] != "default"} == between | out


def test_machines_have_no_public_address_ask_for_imdsv2_and_have_encrypted_disks(consortium, aws):
    found = aws.machines()
    assert sorted(found) == ["head", *(f"site-{site}" for site in SITES), "tracking"]
    kinds = groups(aws)
    for name, machine in found.items():
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        (interface,) = machine["NetworkInterfaces"]
        assert [kinds[group["GroupId"]] for group in interface["Groups"]] == [name.partition("-")[0]]
        assert not machine.get("PublicIpAddress")
        for disk in machine["BlockDeviceMappings"]:
            (volume,) = aws.client("ec2").describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
            assert volume["Encrypted"] is True
    assert {name: found[name]["PrivateIpAddress"] for name in ("head", "tracking")} == {
        "head": "10.20.0.10",
        "tracking": "10.20.0.11",
    }
    assert found["site-site-c"]["Placement"]["AvailabilityZone"] == f"{REGION}b"
    assert found["site-site-c"]["InstanceType"] == "g5.12xlarge"


def test_secrets_are_in_parameter_store_and_nowhere_else(consortium, aws):
    ssm = aws.client("ssm")
    values = {}
    for name in ("ray-token", "mlflow-password"):
        parameter = ssm.get_parameter(Name=f"/fedsam/kidneys/{name}", WithDecryption=True)["Parameter"]
        assert parameter["Type"] == "SecureString"
        assert re.fullmatch(r"[A-Za-z0-9]{48}", parameter["Value"])
        values[name] = parameter["Value"]
    assert len(set(values.values())) == 2
    texts = [(consortium.terraform.folder / "terraform.tfstate").read_text(), json.dumps(consortium.outputs)]
    texts += [aws.user_data(machine) for machine in aws.machines().values()]
    assert not [text for text in texts for value in values.values() if value in text]


def statements(aws, role):
    """What a role is allowed: (actions, resources, condition) of each statement."""
    iam = aws.client("iam")
    assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
    for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
        document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        document = json.loads(unquote(document)) if isinstance(document, str) else document
        for one in document["Statement"]:
            assert one["Effect"] == "Allow"
            as_list = lambda value: [value] if isinstance(value, str) else value  # noqa: E731
            yield as_list(one["Action"]), as_list(one["Resource"]), one.get("Condition")


def may(aws, role, action, resource):
    """Whether a role may: IAM's `*` stands for any text, slashes too."""
    return any(
        any(fnmatch.fnmatchcase(action, one) for one in actions)
        and any(fnmatch.fnmatchcase(resource, one) for one in resources)
        for actions, resources, _ in statements(aws, role)
    )


def readers(aws, key):
    roles = [role["RoleName"] for role in aws.client("iam").list_roles()["Roles"]]
    mine = [role for role in roles if role.startswith("kidneys-")]
    assert len(mine) == 5
    return {
        role.removeprefix("kidneys-") for role in mine if may(aws, role, "s3:GetObject", f"arn:aws:s3:::{BUCKET}/{key}")
    }


@pytest.mark.parametrize(
    ("key", "who"),
    [
        ("cohorts/kits-1a2b/site-a/cases/1.safetensors", {"site-site-a"}),
        ("cohorts/kits-1a2b/site-c/cases/1.safetensors", {"site-site-c"}),
        ("cohorts/kits-1a2b/site-a/cohort.json", {"site-site-a", "head"}),
        ("sites/site-a/scans/1.nii.gz", {"site-site-a"}),
        ("hospitals/c/scans/1.nii.gz", {"site-site-c"}),
        ("hospitals/cc/scans/1.nii.gz", set()),
        ("sites/site-ab/scans/1.nii.gz", set()),
        ("results/runs/r/rounds/000000/commit.json", {"head"}),
        ("mlflow/1/artifacts/page.html", {"head", "tracking"}),
        ("something-else", set()),
    ],
)
def test_an_object_is_read_by_whom_it_belongs_to(consortium, aws, key, who):
    assert readers(aws, key) == who


def test_a_site_lists_its_own_names_only_and_reads_the_token_only(consortium, aws):
    parameter = f"arn:aws:ssm:{REGION}:123456789012:parameter/fedsam/kidneys/"
    for site in SITES:
        role = f"kidneys-site-{site}"
        assert may(aws, role, "ssm:GetParameter", f"{parameter}ray-token")
        assert not may(aws, role, "ssm:GetParameter", f"{parameter}mlflow-password")
        assert not may(aws, role, "secretsmanager:GetSecretValue", "arn:aws:secretsmanager:any")
        (listing,) = [condition for actions, _, condition in statements(aws, role) if "s3:ListBucket" in actions]
        assert not [p for p in listing["StringLike"]["s3:prefix"] for other in SITES if other != site and other in p]
    assert not may(aws, "kidneys-tracking", "ssm:GetParameter", f"{parameter}ray-token")
    assert may(aws, "kidneys-tracking", "ssm:GetParameter", f"{parameter}mlflow-password")


def test_idle_sites_are_stopped_and_somebody_is_told(consortium, aws):
    alarms = {one["AlarmName"]: one for one in aws.client("cloudwatch").describe_alarms()["MetricAlarms"]}
    assert {name for name in alarms if name.endswith("-idle")} == {f"kidneys-site-{site}-idle" for site in SITES}
    assert len([name for name in alarms if name.endswith("-sick")]) == 5
    (topic,) = aws.client("sns").list_topics()["Topics"]
    for name, alarm in alarms.items():
        stop = [f"arn:aws:automate:{REGION}:ec2:stop"] if name.endswith("-idle") else []
        assert sorted(alarm["AlarmActions"]) == sorted([*stop, topic["TopicArn"]])
    idle = alarms["kidneys-site-site-a-idle"]
    assert (idle["EvaluationPeriods"] * idle["Period"], idle["ComparisonOperator"]) == (3600, "LessThanThreshold")
    (mail,) = aws.client("sns").list_subscriptions()["Subscriptions"]
    assert (mail["Protocol"], mail["Endpoint"]) == ("email", "ops@hospital.example")


def test_mlflows_database_is_encrypted_and_private_and_its_password_is_secrets_managers(consortium, aws):
    (database,) = aws.client("rds").describe_db_instances()["DBInstances"]
    assert (database["Engine"], database["StorageEncrypted"], database["PubliclyAccessible"]) == (
        "postgres",
        True,
        False,
    )
    secret = database["MasterUserSecret"]["SecretArn"]
    assert may(aws, "kidneys-tracking", "secretsmanager:GetSecretValue", secret)
    assert not may(aws, "kidneys-head", "secretsmanager:GetSecretValue", secret)
    assert f"DATABASE_SECRET='{secret}'" in aws.user_data(aws.machines()["tracking"])


def test_first_boot_scripts_pass_shellcheck_as_rendered(consortium, aws, tmp_path):
    for name, machine in aws.machines().items():
        text = aws.user_data(machine)
        assert len(text.encode()) < 16384  # EC2 takes no more
        (tmp_path / name).write_text(text)
        done = subprocess.run([SCRIPTS / "shellcheck", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_commands_that_are_printed_name_what_is_there(consortium, aws):
    outputs, found = consortium.outputs, aws.machines()
    for output, machine, port in (("tunnel", "head", "8265"), ("tracking_tunnel", "tracking", "5000")):
        words = shlex.split(outputs[output])
        assert words[:3] == ["aws", "ssm", "start-session"]
        assert words[words.index("--target") + 1] == found[machine]["InstanceId"]
        ports = json.loads(words[words.index("--parameters") + 1])
        assert ports == {"portNumber": [port], "localPortNumber": [port]}
    assert outputs["tracking_uri"] == "http://10.20.0.11:5000"
    assert {word for word in outputs["wake"].split() if word.startswith("i-")} == {
        found[f"site-{site}"]["InstanceId"] for site in SITES
    }
    assert outputs["upload"]["site-c"].endswith(f" s3://{BUCKET}/hospitals/c/scans/")
    assert outputs["bucket"] == BUCKET
