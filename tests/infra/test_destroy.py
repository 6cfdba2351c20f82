"""`terraform destroy` of the cluster leaves nothing but the data; the storage refuses it.

Runs after test_apply.py and test_boot.py, whose cluster it ends.
"""

import pytest
from support.terraform import BUCKET


def left(aws):
    """What the cluster's root could have left, by kind."""
    ec2, name = aws.client("ec2"), "kidneys"
    machines = [one for r in ec2.describe_instances()["Reservations"] for one in r["Instances"]]
    mine = {"Filters": [{"Name": "tag:Fedsam", "Values": [name]}]}
    found = {
        "machines": [one["InstanceId"] for one in machines if one["State"]["Name"] != "terminated"],
        "networks": ec2.describe_vpcs(**mine)["Vpcs"],
        "subnets": ec2.describe_subnets(**mine)["Subnets"],
        "gateways": ec2.describe_internet_gateways(**mine)["InternetGateways"],
        "endpoints": [e for e in ec2.describe_vpc_endpoints()["VpcEndpoints"] if e["State"] != "deleted"],
        "addresses": ec2.describe_addresses()["Addresses"],
        "nat": [one for one in ec2.describe_nat_gateways()["NatGateways"] if one["State"] != "deleted"],
        "groups": [g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"].startswith(name)],
        "roles": [r for r in aws.client("iam").list_roles()["Roles"] if r["RoleName"].startswith(name)],
        "profiles": aws.client("iam").list_instance_profiles()["InstanceProfiles"],
        "secrets": aws.client("ssm").describe_parameters()["Parameters"],
        "databases": aws.client("rds").describe_db_instances()["DBInstances"],
        "alarms": aws.client("cloudwatch").describe_alarms()["MetricAlarms"],
        "topics": aws.client("sns").list_topics()["Topics"],
    }
    return {kind: some for kind, some in found.items() if some}


def test_destroying_the_cluster_leaves_the_data_and_nothing_else(consortium, aws, objects):
    objects.put_object(Bucket=BUCKET, Key="results/kept", Body=b"a result")
    before = left(aws)
    assert {"machines", "networks", "groups", "roles", "secrets", "databases", "alarms"} <= set(before)
    consortium.terraform.destroy()
    assert left(aws) == {}
    assert objects.get_object(Bucket=BUCKET, Key="results/kept")["Body"].read() == b"a result"


def test_the_storages_root_refuses_to_be_destroyed_and_loses_none_of_its_protections(storage, aws, objects):
    with pytest.raises(AssertionError, match="prevent_destroy"):
        storage.destroy()
    assert objects.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    assert set(objects.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values()) == {True}
    (rule,) = objects.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    key = aws.client("kms").describe_key(KeyId=rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"])
    assert key["KeyMetadata"]["KeyState"] == "Enabled"
