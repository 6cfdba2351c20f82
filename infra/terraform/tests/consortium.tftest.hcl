# Plans of the consortium against a mocked provider: three and six sites, and wrong inputs, refused with a reason.

mock_provider "aws" {
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }

  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }

  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }

  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
}

# Ephemeral values cannot be mocked. With `secrets_version = null` none is asked for; tests/infra/test_apply.py makes them.
provider "aws" {
  alias                       = "secrets"
  region                      = "eu-central-1"
  access_key                  = "none"
  secret_key                  = "none"
  skip_credentials_validation = true
  skip_requesting_account_id  = true
  skip_metadata_api_check     = true
}

variables {
  region             = "eu-central-1"
  zones              = ["eu-central-1a", "eu-central-1b"]
  name               = "kidneys"
  bucket             = "kidneys-consortium"
  image              = "registry.example/fedsam:0.1.0"
  ami                = "ami-0123456789abcdef0"
  alarm_email        = "ops@hospital.example"
  monthly_budget_usd = 500
  secrets_version    = null

  sites = {
    site-a = {}
    site-b = { spot = true }
    site-c = { instance_type = "g6.xlarge", zone = "eu-central-1b", prefix = "hospitals/c" }
  }
}

run "three_sites" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  assert {
    condition     = length(output.upload) == 3 && length(module.site) == 3
    error_message = "not a machine for each site"
  }

  assert {
    condition     = endswith(output.upload["site-c"], "s3://kidneys-consortium/hospitals/c/scans/")
    error_message = "a site's own prefix is not used"
  }
}
