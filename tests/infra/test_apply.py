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


def groups(aws, name):
    """A cluster's security groups: id to kind."""
    (network,) = aws.client("ec2").describe_vpcs(Filters=[{"Name": "tag:Name", "Values": [name]}])["Vpcs"]
    found = aws.client("ec2").describe_security_groups()["SecurityGroups"]
    return {
        one["GroupId"]: one["GroupName"].removeprefix(f"{name}-") for one in found if one["VpcId"] == network["VpcId"]
    }


def test_ports_are_open_between_those_groups_only_that_need_them(cluster, aws):
    kinds = groups(aws, cluster.name)
    rules = aws.client("ec2").describe_security_group_rules()["SecurityGroupRules"]
    ways = {True: set(), False: set()}
    for rule in rules:
        if rule["GroupId"] in kinds:
            peer = rule.get("ReferencedGroupInfo", {}).get("GroupId")
            other = kinds[peer] if peer else rule["CidrIpv4"]
            ways[rule["IsEgress"]].add((kinds[rule["GroupId"]], other, rule["FromPort"], rule["ToPort"]))
    between = {
        "kidneys": {
            ("site", "head", 6379, 6379),
            ("site", "head", 20000, 20999),
            ("head", "site", 20000, 20999),
            ("site", "site", 20000, 20999),
            ("head", "tracking", 5000, 5000),
            ("tracking", "database", 5432, 5432),
        },
        "lab": set(),  # no way in at all
    }[cluster.name]
    assert ways[False] == {(target, source, first, last) for source, target, first, last in between}
    out = {(kind, "0.0.0.0/0", 443, 443) for kind in kinds.values() if kind not in ("default", "database")}
    assert {way for way in ways[True] if way[0] != "default"} == between | out


def test_firewalls_are_described_in_letters_that_amazon_takes(cluster, aws):
    """EC2 refuses others (an apostrophe), of which neither a plan nor moto knows."""
    kinds, ec2 = groups(aws, cluster.name), aws.client("ec2")
    found = [one for one in ec2.describe_security_groups()["SecurityGroups"] if one["GroupId"] in kinds]
    found += [one for one in ec2.describe_security_group_rules()["SecurityGroupRules"] if one["GroupId"] in kinds]
    assert len(found) >= {"kidneys": 5 + 2 * 6 + 3, "lab": 2 + 1}[cluster.name]
    for one in found:
        assert re.fullmatch(r"[a-zA-Z0-9. _\-:/()#,@\[\]+=&;{}!$*]{0,255}", one.get("Description", ""))


MACHINES = {"kidneys": ["head", *(f"site-{site}" for site in SITES), "tracking"], "lab": ["head"]}


def test_machines_have_no_public_address_ask_for_imdsv2_and_have_encrypted_disks(cluster, aws):
    found = aws.machines(cluster.name)
    assert sorted(found) == MACHINES[cluster.name]
    kinds = groups(aws, cluster.name)
    for name, machine in found.items():
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        (interface,) = machine["NetworkInterfaces"]
        assert [kinds[group["GroupId"]] for group in interface["Groups"]] == [name.partition("-")[0]]
        assert not machine.get("PublicIpAddress")
        for disk in machine["BlockDeviceMappings"]:
            (volume,) = aws.client("ec2").describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
            assert volume["Encrypted"] is True
            tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
            assert tags == {
                "Name": f"{cluster.name}-{name}",
                "Project": "fedsam",
                "Fedsam": cluster.name,
            }  # the budget's
    addresses = {"kidneys": {"head": "10.20.0.10", "tracking": "10.20.0.11"}, "lab": {"head": "10.30.0.10"}}
    for name, address in addresses[cluster.name].items():
        assert found[name]["PrivateIpAddress"] == address
    if cluster.name == "kidneys":
        assert found["site-site-c"]["Placement"]["AvailabilityZone"] == f"{REGION}b"
        assert found["site-site-c"]["InstanceType"] == "g5.12xlarge"


def test_secrets_are_in_parameter_store_and_nowhere_else(cluster, aws):
    ssm = aws.client("ssm")
    names = {"kidneys": ["mlflow-password", "ray-token"], "lab": ["ray-token"]}[cluster.name]
    there = {one["Name"] for one in ssm.describe_parameters()["Parameters"]}
    folder = f"/fedsam/{cluster.name}/"
    assert {name for name in there if name.startswith(folder)} == {folder + name for name in names}
    values = {}
    for name in names:
        parameter = ssm.get_parameter(Name=folder + name, WithDecryption=True)["Parameter"]
        assert parameter["Type"] == "SecureString"
        assert re.fullmatch(r"[A-Za-z0-9]{48}", parameter["Value"])
        values[name] = parameter["Value"]
    assert len(set(values.values())) == len(names)
    texts = [(cluster.terraform.folder / "terraform.tfstate").read_text(), json.dumps(cluster.outputs)]
    texts += [aws.user_data(machine) for machine in aws.machines(cluster.name).values()]
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


def readers(aws, name, key):
    roles = [role["RoleName"] for role in aws.client("iam").list_roles()["Roles"]]
    mine = [role for role in roles if role.startswith(f"{name}-")]
    assert len(mine) == len(MACHINES[name])
    return {
        role.removeprefix(f"{name}-") for role in mine if may(aws, role, "s3:GetObject", f"arn:aws:s3:::{BUCKET}/{key}")
    }


@pytest.mark.parametrize(
    ("key", "who", "in_the_lab"),
    [
        ("cohorts/kits-1a2b/site-a/cases/1.safetensors", {"site-site-a"}, True),
        ("cohorts/kits-1a2b/site-c/cases/1.safetensors", {"site-site-c"}, True),
        ("cohorts/kits-1a2b/site-z/cases/1.safetensors", set(), False),
        ("cohorts/kits-1a2b/site-a/cohort.json", {"site-site-a", "head"}, True),
        ("cohorts/kits-1a2b/site-z/cohort.json", {"head"}, True),
        ("sites/site-a/scans/1.nii.gz", {"site-site-a"}, False),
        ("hospitals/c/scans/1.nii.gz", {"site-site-c"}, False),
        ("hospitals/cc/scans/1.nii.gz", set(), False),
        ("sites/site-ab/scans/1.nii.gz", set(), False),
        ("results/runs/r/rounds/000000/commit.json", {"head"}, True),
        ("mlflow/1/artifacts/page.html", {"head", "tracking"}, True),
        ("laboratories/lab/scans/1.nii.gz", set(), True),
        ("laboratories/lab2/scans/1.nii.gz", set(), False),
        ("something-else", set(), False),
    ],
)
def test_an_object_is_read_by_whom_it_belongs_to(consortium, lab, aws, key, who, in_the_lab):
    assert readers(aws, consortium.name, key) == who
    assert readers(aws, lab.name, key) == ({"head"} if in_the_lab else set())


def test_no_role_reaches_beyond_the_bucket_its_key_its_secrets_and_its_image(cluster, aws):
    key = aws.client("kms").describe_key(KeyId=f"alias/fedsam-{BUCKET}")["KeyMetadata"]["Arn"]
    of_service = {
        "s3": rf"arn:aws:s3:::{BUCKET}(/.+)?",
        "kms": re.escape(key),
        "ssm": rf"arn:aws:ssm:{REGION}:123456789012:parameter/fedsam/{cluster.name}/[a-z-]+",
        "ecr": "arn:aws:ecr:eu-west-1:123456789012:repository/fedsam",
        "secretsmanager": r"arn:aws:secretsmanager:[^*]+",
    }
    # These know no resource.
    anywhere = {"ssm:UpdateInstanceInformation", "ecr:GetAuthorizationToken"}
    for machine in MACHINES[cluster.name]:
        allowed = list(statements(aws, f"{cluster.name}-{machine}"))
        assert len(allowed) >= 6
        for actions, resources, _ in allowed:
            for action in actions:
                assert "*" not in action
                if action in anywhere or action.startswith("ssmmessages:"):
                    assert resources == ["*"]
                else:
                    assert all(re.fullmatch(of_service[action.partition(":")[0]], one) for one in resources)


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


def test_idle_machines_are_stopped_and_somebody_is_told(cluster, aws):
    found = aws.client("cloudwatch").describe_alarms()["MetricAlarms"]
    alarms = {one["AlarmName"]: one for one in found if one["AlarmName"].startswith(f"{cluster.name}-")}
    ids = {name: machine["InstanceId"] for name, machine in aws.machines(cluster.name).items()}
    stopped = {"kidneys": [f"site-{site}" for site in SITES], "lab": ["head"]}[cluster.name]
    assert set(alarms) == {f"{cluster.name}-{one}-idle" for one in stopped} | {
        f"{cluster.name}-{one}-sick" for one in ids
    }
    topics = [one["TopicArn"] for one in aws.client("sns").list_topics()["Topics"]]
    (topic,) = [one for one in topics if one.endswith(f":{cluster.name}-alarms")]
    for name, alarm in alarms.items():
        machine, _, kind = name.removeprefix(f"{cluster.name}-").rpartition("-")
        stop = [f"arn:aws:automate:{REGION}:ec2:stop"] if kind == "idle" else []
        assert sorted(alarm["AlarmActions"]) == sorted([*stop, topic])
        assert alarm["Dimensions"] == [{"Name": "InstanceId", "Value": ids[machine]}]
        if kind == "idle":
            assert alarm["EvaluationPeriods"] * alarm["Period"] == 3600
            assert (alarm["MetricName"], alarm["ComparisonOperator"]) == ("CPUUtilization", "LessThanThreshold")
    (mail,) = aws.client("sns").list_subscriptions_by_topic(TopicArn=topic)["Subscriptions"]
    assert (mail["Protocol"], mail["Endpoint"]) == ("email", "ops@hospital.example")
    encryption = aws.client("sns").get_topic_attributes(TopicArn=topic)["Attributes"]["KmsMasterKeyId"]
    policy = json.loads(aws.client("kms").get_key_policy(KeyId=encryption, PolicyName="default")["Policy"])
    (services,) = [one["Principal"]["Service"] for one in policy["Statement"] if "Service" in one["Principal"]]
    assert sorted(services) == ["budgets.amazonaws.com", "cloudwatch.amazonaws.com"]  # else they could not publish


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
    assert f"DATABASE_SECRET='{secret}'" in aws.user_data(aws.machines("kidneys")["tracking"])


def test_first_boot_scripts_pass_shellcheck_as_rendered(cluster, aws, tmp_path):
    for name, machine in aws.machines(cluster.name).items():
        text = aws.user_data(machine)
        assert len(text.encode()) < 16384  # EC2 takes no more
        (tmp_path / name).write_text(text)
        done = subprocess.run([SCRIPTS / "shellcheck", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_laboratorys_machine_becomes_the_node_of_all_its_sites(lab, aws):
    (machine,) = aws.machines("lab").values()
    assert machine["InstanceType"] == "g5.xlarge"
    lines = re.findall(r"^export ([A-Z_]+)='(.*)'$", aws.user_data(machine), re.M)
    assert dict(lines) == {
        "ROLE": "head",
        "IMAGE": lab.given["image"],
        "GPU_COUNT": "1",
        "REGION": REGION,
        "DATA_DIR": lab.given["data_dir"],
        "SECRETS": f"ray-token=arn:aws:ssm:{REGION}:123456789012:parameter/fedsam/lab/ray-token",
        "SITES": "site-a,site-b,site-c",
        "TRACKING_HERE": "true",
        "SCANS_URL": f"s3://{BUCKET}/laboratories/lab/scans/",
    }


def test_commands_that_are_printed_name_what_is_there(cluster, aws):
    outputs, found = cluster.outputs, aws.machines(cluster.name)
    tracking = {"kidneys": "tracking", "lab": "head"}[cluster.name]
    for output, machine, port in (("tunnel", "head", "8265"), ("tracking_tunnel", tracking, "5000")):
        words = shlex.split(outputs[output])
        assert words[:3] == ["aws", "ssm", "start-session"]
        assert words[words.index("--target") + 1] == found[machine]["InstanceId"]
        ports = json.loads(words[words.index("--parameters") + 1])
        assert ports == {"portNumber": [port], "localPortNumber": [port]}
    stopped = {"kidneys": [f"site-{site}" for site in SITES], "lab": ["head"]}[cluster.name]
    assert {word for word in outputs["wake"].split() if word.startswith("i-")} == {
        found[machine]["InstanceId"] for machine in stopped
    }
    assert outputs["bucket"] == BUCKET
    mlflow = {"kidneys": "http://10.20.0.11:5000", "lab": "http://127.0.0.1:5000"}[cluster.name]
    words = shlex.split(outputs["submit"])
    submit = words.index("fedsam")
    assert words[submit : submit + 7] == [
        *("fedsam", "submit", "federate", "--address", "http://127.0.0.1:8265", "--config", "demo")
    ]
    # How sites share GPUs is not said: the placement knows.
    assert words[submit + 7 :] == [
        f"work_dir={cluster.given['data_dir']}/fedsam",
        f"storage.prepared=s3://{BUCKET}/cohorts",
        f"storage.results=s3://{BUCKET}/results",
        f"tracking.uri={mlflow}",
        *cluster.given["overrides"],
    ]
    if cluster.name == "kidneys":
        assert outputs["tracking_uri"] == mlflow
        assert outputs["upload"]["site-c"].endswith(f" s3://{BUCKET}/hospitals/c/scans/")
    else:
        assert outputs["upload"].endswith(f" s3://{BUCKET}/laboratories/lab/scans/")
