"""`terraform destroy` of a cluster leaves nothing but the data; the storage refuses it.

Runs after test_apply.py and test_boot.py, whose clusters it ends.
"""

import pytest
from support.terraform import BUCKET


def left(aws, name):
    """What a cluster's root could have left, by kind."""
    ec2, kms = aws.client("ec2"), aws.client("kms")
    tag = {"Key": "Fedsam", "Value": name}
    mine = lambda found: [one for one in found if tag in one.get("Tags", ())]  # noqa: E731
    alive = lambda found: [one for one in mine(found) if one["State"] not in ("deleted", "deleting")]  # noqa: E731
    called = lambda found, key, start=f"{name}-": [one for one in found if one[key].startswith(start)]  # noqa: E731
    machines = [one for r in ec2.describe_instances()["Reservations"] for one in r["Instances"]]
    keys = [kms.describe_key(KeyId=one["KeyId"])["KeyMetadata"] for one in kms.list_keys()["Keys"]]
    databases = [one["DBInstanceIdentifier"] for one in aws.client("rds").describe_db_instances()["DBInstances"]]
    found = {
        "machines": [one for one in mine(machines) if one["State"]["Name"] != "terminated"],
        "disks": mine(ec2.describe_volumes()["Volumes"]),
        "networks": mine(ec2.describe_vpcs()["Vpcs"]),
        "subnets": mine(ec2.describe_subnets()["Subnets"]),
        "routes": mine(ec2.describe_route_tables()["RouteTables"]),
        "gateways": mine(ec2.describe_internet_gateways()["InternetGateways"]),
        "endpoints": alive(ec2.describe_vpc_endpoints()["VpcEndpoints"]),
        "addresses": mine(ec2.describe_addresses()["Addresses"]),
        "nat": alive(ec2.describe_nat_gateways()["NatGateways"]),
        "groups": called(ec2.describe_security_groups()["SecurityGroups"], "GroupName"),
        "roles": called(aws.client("iam").list_roles()["Roles"], "RoleName"),
        "profiles": called(aws.client("iam").list_instance_profiles()["InstanceProfiles"], "InstanceProfileName"),
        "secrets": called(aws.client("ssm").describe_parameters()["Parameters"], "Name", f"/fedsam/{name}/"),
        "databases": [one for one in databases if one.startswith(f"{name}-")],
        "alarms": called(aws.client("cloudwatch").describe_alarms()["MetricAlarms"], "AlarmName"),
        "topics": [t for t in aws.client("sns").list_topics()["Topics"] if t["TopicArn"].endswith(f":{name}-alarms")],
        # Amazon keeps a key for some days after it is given up.
        "keys": [k for k in keys if k["Description"] == f"Alarms of {name}" and k["KeyState"] != "PendingDeletion"],
    }
    return {kind: some for kind, some in found.items() if some}


EVERY_KIND = {
    *("machines", "disks", "networks", "subnets", "routes", "gateways", "endpoints", "addresses", "nat", "groups"),
    *("roles", "profiles", "secrets", "databases", "alarms", "topics", "keys"),
}


@pytest.mark.parametrize("ends", ["lab", "consortium"])
def test_destroying_a_cluster_leaves_the_data_its_neighbour_and_nothing_else(ends, lab, consortium, aws, objects):
    cluster, neighbour = (lab, consortium) if ends == "lab" else (consortium, lab)
    objects.put_object(Bucket=BUCKET, Key="results/kept", Body=b"a result")
    assert set(left(aws, cluster.name)) == EVERY_KIND - ({"databases"} if ends == "lab" else set())
    beside = left(aws, neighbour.name)
    cluster.terraform.destroy()
    assert left(aws, cluster.name) == {}
    assert left(aws, neighbour.name) == beside
    assert objects.get_object(Bucket=BUCKET, Key="results/kept")["Body"].read() == b"a result"
    # A last copy of what MLflow knew is meant to stay.
    snapshots = aws.client("rds").describe_db_snapshots()["DBSnapshots"]
    last = [one["DBInstanceIdentifier"] for one in snapshots if one["SnapshotType"] == "manual"]
    assert last == ([] if ends == "lab" else ["kidneys-tracking"])


def test_the_storages_root_refuses_to_be_destroyed_and_loses_none_of_its_protections(storage, aws, objects):
    with pytest.raises(AssertionError, match="prevent_destroy"):
        storage.destroy()
    assert objects.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    assert set(objects.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values()) == {True}
    (rule,) = objects.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    key = aws.client("kms").describe_key(KeyId=rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"])
    assert key["KeyMetadata"]["KeyState"] == "Enabled"
