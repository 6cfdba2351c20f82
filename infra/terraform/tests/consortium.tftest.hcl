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
    condition     = sort(keys(output.upload)) == tolist(["site-a", "site-b", "site-c"]) && length(module.site) == 3
    error_message = "not a machine for each site"
  }

  assert {
    condition     = endswith(output.upload["site-a"], " s3://kidneys-consortium/sites/site-a/scans/") && endswith(output.upload["site-c"], " s3://kidneys-consortium/hospitals/c/scans/")
    error_message = "a site does not upload to its own prefix"
  }

  assert {
    condition     = output.tracking_uri != "" && output.bucket == "kidneys-consortium"
    error_message = "tracking or bucket is not told"
  }
}

run "six_sites" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { for id in ["A", "B", "C", "D", "E", "F"] : id => { gpus = 4, instance_type = "g5.12xlarge" } }
  }

  assert {
    condition     = length(module.site) == 6
    error_message = "not a machine for each site"
  }
}

run "two_sites_are_too_few_for_a_masked_sum" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = {}, B = {} }
  }

  expect_failures = [var.sites]
}

run "an_id_that_names_no_resource" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = {}, B = {}, "St. Mary" = {} }
  }

  expect_failures = [var.sites]
}

run "ids_that_differ_in_case_only" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = {}, a = {}, B = {} }
  }

  expect_failures = [var.sites]
}

run "one_prefix_for_two_sites" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { prefix = "sites/x" }, B = { prefix = "sites/x" }, C = {} }
  }

  expect_failures = [var.sites]
}

run "a_prefix_within_another" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { prefix = "sites" }, B = {}, C = {} }
  }

  expect_failures = [var.sites]
}

run "a_prefix_that_is_the_clusters" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { prefix = "results/a" }, B = {}, C = {} }
  }

  expect_failures = [var.sites]
}

run "a_prefix_with_a_wildcard" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { prefix = "sites/*" }, B = {}, C = {} }
  }

  expect_failures = [var.sites]
}

run "a_zone_that_is_not_the_networks" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { zone = "eu-central-1c" }, B = {}, C = {} }
  }

  expect_failures = [var.sites]
}

run "half_a_gpu" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    sites = { A = { gpus = 0.5 }, B = {}, C = {} }
  }

  expect_failures = [var.sites]
}

run "one_zone_is_too_few_for_postgresql" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    zones = ["eu-central-1a"]
    sites = { A = {}, B = {}, C = {} }
  }

  expect_failures = [var.zones]
}

run "an_image_without_a_version" {
  command = plan

  module {
    source = "../envs/consortium"
  }

  variables {
    image = "registry.example/fedsam:latest"
  }

  expect_failures = [var.image]
}
