"""Terraform for the tests: a copy of infra/terraform in a temporary folder, and a server that answers as AWS does.

What takes longer than `make test` may take runs in `make infra-check`, which sets FEDSAM_INFRA_CHECK.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.terraform import BUCKET, REGION, Aws, Terraform, copy_of_sources

# Terraform merges files of this name over the sources. A server on one machine has no buckets by host name, and what it
# cannot do is to fail at once.
PROVIDER = """
provider "aws" {
  s3_use_path_style = true
  max_retries       = 1
}
"""
# moto cannot read a budget's subscribers, which the provider does: plans against the mocked provider hold the budget.
WITHOUT_BUDGET = """
resource "aws_budgets_budget" "month" {
  count = 0
}
"""
_PLUGINS = (os.environ.get("TF_PLUGIN_DIR"), "/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins")


@pytest.fixture(scope="session")
def infra_check() -> None:
    """For tests that only `make infra-check` runs."""
    if os.environ.get("FEDSAM_INFRA_CHECK") != "1":
        pytest.skip("takes minutes: `make infra-check` runs it")


@pytest.fixture(scope="session")
def plugin_dir(infra_check: None) -> Path:
    """Folder with Terraform's aws provider; nothing is downloaded."""
    if shutil.which("terraform") is None:
        pytest.skip("NOT CHECKED: there is no terraform on this machine")
    for folder in filter(None, _PLUGINS):
        if list(Path(folder).glob("*/hashicorp/aws/*/*/terraform-provider-aws*")):
            return Path(folder)
    pytest.skip("NOT CHECKED: no folder with Terraform's aws provider: name one by TF_PLUGIN_DIR")


@pytest.fixture(scope="session")
def aws() -> Iterator[Aws]:
    server_module = pytest.importorskip("moto.server", reason="NOT CHECKED: install moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        yield Aws(
            endpoint,
            {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": REGION,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )
    finally:
        server.stop()


@pytest.fixture(scope="session")
def terraform_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where terraform may write: the sources stay as they are."""
    return copy_of_sources(tmp_path_factory.mktemp("terraform") / "terraform")


@pytest.fixture(scope="session")
def on_moto(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another copy, with what moto cannot do left out."""
    copy = copy_of_sources(tmp_path_factory.mktemp("moto") / "terraform")
    for root in copy.glob("envs/*"):
        (root / "provider_override.tf").write_text(PROVIDER)
    (copy / "modules" / "base" / "moto_override.tf").write_text(WITHOUT_BUDGET)
    return copy


@pytest.fixture(scope="session")
def storage(on_moto: Path, plugin_dir: Path, aws: Aws) -> Terraform:
    """The storage root, applied."""
    terraform = Terraform(on_moto, "envs/storage", plugin_dir, aws.environment)
    terraform.init()
    assert terraform.apply({"region": REGION, "bucket": BUCKET}) == {"bucket": BUCKET}
    return terraform


@dataclass(frozen=True)
class Applied:
    """A root that was applied, with what it was given and what it printed."""

    terraform: Terraform
    given: dict[str, Any]
    outputs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.given["name"]


@pytest.fixture(scope="session")
def apply(storage: Terraform, on_moto: Path, plugin_dir: Path, aws: Aws) -> Iterator[Callable[..., Applied]]:
    """Applies a cluster's root beside the storage's; what it makes at the server, test_destroy.py ends."""
    folders = []

    def applied(root: str, **given: Any) -> Applied:
        terraform = Terraform(on_moto, f"envs/{root}", plugin_dir, aws.environment)
        terraform.init()
        folders.append(tempfile.mkdtemp(prefix="fi-", dir="/tmp"))  # Ray's socket paths lie in here and must be short
        given = {
            "region": REGION,
            "bucket": BUCKET,
            # Its registry is in another region than its machines.
            "image": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/fedsam:0.1.0",
            "ami": aws.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
            "alarm_email": "ops@hospital.example",
            "monthly_budget_usd": 500,
            "data_dir": folders[-1],
            "overrides": [
                "federation.rounds=1",
                "learning.local_steps=1",
                "model.image_size=32",
                "cohort.phantom.shape=[16, 48, 48]",
                "cohort.phantom.cases_per_site=4",
                "cohort.phantom.test_per_site=1",
            ],
            **given,
        }
        return Applied(terraform, given, terraform.apply(given))

    yield applied
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def consortium(apply: Callable[..., Applied]) -> Applied:
    """The consortium's root, applied once for all tests that look at it."""
    sites = {
        "site-a": {},
        "site-b": {"spot": True, "instance_type": "g6.xlarge"},
        "site-c": {"zone": f"{REGION}b", "prefix": "hospitals/c", "gpus": 4, "instance_type": "g5.12xlarge"},
    }
    return apply("consortium", name="kidneys", zones=[f"{REGION}a", f"{REGION}b"], sites=sites)


@pytest.fixture(scope="session")
def lab(apply: Callable[..., Applied]) -> Applied:
    """The laboratory's root, in the same account and beside the same bucket: three sites and one GPU."""
    return apply("single-site-lab", name="lab", zone=f"{REGION}a", cidr="10.30.0.0/16")


@pytest.fixture(params=["consortium", "lab"])
def cluster(request: pytest.FixtureRequest) -> Applied:
    """Each of the two. Not of the session's scope: pytest would then put a cluster's end before the other's tests."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def objects(storage: Terraform, aws: Aws) -> Any:
    """An S3 client that may use the bucket although moto has no TLS, which the bucket's policy asks for.

    For tests after those that read the policy.
    """
    client = aws.client("s3")
    client.delete_bucket_policy(Bucket=BUCKET)
    return client
