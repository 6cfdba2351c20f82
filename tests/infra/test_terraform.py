"""Terraform's own checks: format, validity of every root, plans against a mocked provider (infra/terraform/tests)."""

import re
import subprocess

import pytest
from support.terraform import TERRAFORM, Terraform

ROOTS = sorted(path.parent.relative_to(TERRAFORM) for path in TERRAFORM.glob("envs/*/main.tf"))


def test_every_file_is_in_terraforms_own_format(plugin_dir):
    done = subprocess.run(["terraform", "fmt", "-check", "-recursive", "-list=true", TERRAFORM], capture_output=True)
    assert done.stdout == b""
    assert done.returncode == 0


@pytest.mark.parametrize("root", ROOTS, ids=str)
def test_a_root_is_valid_without_any_account(root, terraform_copy, plugin_dir):
    terraform = Terraform(terraform_copy, str(root), plugin_dir)
    terraform.init()
    assert "Success! The configuration is valid." in terraform("validate")


def test_plans_for_one_to_six_sites_and_wrong_inputs_against_a_mocked_provider(terraform_copy, plugin_dir):
    terraform = Terraform(terraform_copy, "tests", plugin_dir)
    terraform.init()
    said = terraform("test")
    planned = len(re.findall(r'^run "', "".join(p.read_text() for p in TERRAFORM.glob("tests/*.tftest.hcl")), re.M))
    assert planned >= 23
    assert f"Success! {planned} passed, 0 failed." in said
