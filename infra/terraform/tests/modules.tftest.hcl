# Wrong inputs of single modules, refused with a reason.

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


run "addresses_that_are_none" {
  command = plan

  module {
    source = "../modules/network"
  }

  variables {
    name  = "x"
    cidr  = "10.0.0.0/33"
    zones = ["eu-central-1a"]
  }

  expect_failures = [var.cidr]
}

run "addresses_too_few" {
  command = plan

  module {
    source = "../modules/network"
  }

  variables {
    name  = "x"
    cidr  = "10.0.0.0/24"
    zones = ["eu-central-1a"]
  }

  expect_failures = [var.cidr]
}

run "a_zone_twice" {
  command = plan

  module {
    source = "../modules/network"
  }

  variables {
    name  = "x"
    cidr  = "10.0.0.0/16"
    zones = ["eu-central-1a", "eu-central-1a"]
  }

  expect_failures = [var.zones]
}

run "a_bucket_with_dots" {
  command = plan

  module {
    source = "../modules/storage"
  }

  variables {
    bucket = "kidneys.consortium"
  }

  expect_failures = [var.bucket]
}
