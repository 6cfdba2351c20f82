# Plans of the laboratory against a mocked provider: one site, three on one GPU, three on two, six without.

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
  zone               = "eu-central-1a"
  name               = "lab"
  bucket             = "kidneys-consortium"
  image              = "registry.example/fedsam:0.1.0"
  ami                = "ami-0123456789abcdef0"
  alarm_email        = "ops@hospital.example"
  monthly_budget_usd = 100
  secrets_version    = null
}

run "one_site" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    sites = ["charite"]
  }

  assert {
    condition     = strcontains(output.submit, " engine.site.gpus=1")
    error_message = "the only site has not the whole GPU"
  }
}

run "three_sites_share_a_gpu" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    gpus = 1
  }

  assert {
    condition     = strcontains(output.submit, " engine.site.gpus=0.33")
    error_message = "three sites on a GPU have not a third each"
  }
}

run "three_sites_on_two_gpus" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    gpus          = 2
    instance_type = "g5.12xlarge"
  }

  assert {
    condition     = strcontains(output.submit, " engine.site.gpus=0.5")
    error_message = "of three sites on two GPUs two share one"
  }
}

run "six_sites_without_a_gpu" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    gpus          = 0
    instance_type = "m6i.2xlarge"
    sites         = ["A", "B", "C", "D", "E", "F"]
  }

  assert {
    condition     = strcontains(output.submit, " engine.site.gpus=0")
    error_message = "a GPU is asked for that is not there"
  }
}

run "a_site_twice" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    sites = ["A", "A"]
  }

  expect_failures = [var.sites]
}
