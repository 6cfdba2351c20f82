"""Terraform on a copy of infra/terraform, and a client for a server that answers as AWS does."""

import base64
import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

ROOT = Path(__file__).parents[2]
TERRAFORM = ROOT / "infra" / "terraform"
REGION = "eu-central-1"
BUCKET = "kidneys-consortium"

SCRIPTS = Path(sysconfig.get_path("scripts"))  # the pinned tools', whatever PATH says


@dataclass(frozen=True)
class Aws:
    """A server that answers as AWS does (moto), on the loopback."""

    endpoint: str
    environment: dict[str, str] = field(repr=False)

    def client(self, service: str, **options: Any) -> Any:
        options = {"aws_access_key_id": "test", "aws_secret_access_key": "test", **options}
        return boto3.client(service, endpoint_url=self.endpoint, region_name=REGION, **options)

    def machines(self, cluster: str) -> dict[str, Any]:
        """The living machines of a cluster by name: head, site-ID, tracking."""
        found = {}
        for reservation in self.client("ec2").describe_instances()["Reservations"]:
            for one in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
                if tags.get("Fedsam") == cluster and one["State"]["Name"] != "terminated":
                    found[tags["Name"].removeprefix(f"{cluster}-")] = one
        return found

    def user_data(self, machine: dict[str, Any]) -> str:
        """The script of a machine's first boot."""
        ask = {"InstanceId": machine["InstanceId"], "Attribute": "userData"}
        return base64.b64decode(self.client("ec2").describe_instance_attribute(**ask)["UserData"]["Value"]).decode()


def copy_of_sources(folder: Path) -> Path:
    """A copy of infra/terraform, for terraform writes beside its sources."""
    shutil.copytree(TERRAFORM, folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    return folder


class Terraform:
    """One root of a copy of infra/terraform; the copy may hold override files, as Terraform calls them."""

    def __init__(self, copy: Path, root: str, plugins: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = copy / root
        self._plugins = plugins
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))},
            **(environment or {}),
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }

    def init(self) -> None:
        self("init", "-input=false", "-backend=false", f"-plugin-dir={self._plugins}")

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["terraform", f"-chdir={self.folder}", *arguments, *(() if arguments[0] == "output" else ("-no-color",))],
            env=self._environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"terraform {' '.join(arguments)}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def apply(self, variables: dict[str, Any]) -> dict[str, Any]:
        (self.folder / "terraform.tfvars.json").write_text(json.dumps(variables))
        self("apply", "-auto-approve", "-input=false", "-parallelism=30")
        return {name: one["value"] for name, one in json.loads(self("output", "-json")).items()}

    def destroy(self) -> None:
        self("destroy", "-auto-approve", "-input=false", "-parallelism=30")
