# Plans of the storage root against a mocked provider.

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

run "a_bucket_that_is_closed_encrypted_and_versioned" {
  command = plan

  module {
    source = "../envs/storage"
  }

  variables {
    region = "eu-central-1"
    bucket = "kidneys-consortium"
  }

  assert {
    condition     = output.bucket == "kidneys-consortium"
    error_message = "the bucket is not called as asked"
  }
}
