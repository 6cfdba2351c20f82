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

run "idle_for_longer_than_cloudwatch_looks_back" {
  command = plan

  module {
    source = "../modules/machine"
  }

  variables {
    name                   = "lab"
    id                     = "head"
    role                   = "head"
    image                  = "registry.example/fedsam:0.1.0"
    ami                    = "ami-0123456789abcdef0"
    instance_type          = "g5.xlarge"
    subnet_id              = "subnet-1"
    security_group         = "sg-1"
    parameters             = { ray-token = "arn:aws:ssm:eu-central-1:123456789012:parameter/x" }
    policy                 = "{}"
    alarm_topic            = "arn:aws:sns:eu-central-1:123456789012:lab-alarms"
    stop_when_idle_minutes = 1445
  }

  expect_failures = [var.stop_when_idle_minutes]
}
