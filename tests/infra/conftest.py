"""Terraform for the tests: a copy of infra/terraform in a temporary folder, and a server that answers as AWS does.

What takes longer than `make test` may take runs in `make infra-check`, which sets FEDSAM_INFRA_CHECK.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.terraform import REGION, TERRAFORM, Aws

_PLUGINS = (os.environ.get("TF_PLUGIN_DIR"), "/opt/tf-plugins", "/usr/share/terraform/plugins")


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


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    server_module = pytest.importorskip("moto.server", reason="NOT CHECKED: install moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
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
    copy = tmp_path_factory.mktemp("terraform") / "terraform"
    shutil.copytree(TERRAFORM, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    return copy
