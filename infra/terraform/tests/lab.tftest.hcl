# Plans of the laboratory against a mocked provider: one site, three on one GPU, six without; and its budget.

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
    condition     = join(",", keys(module.network.groups)) == "head"
    error_message = "groups are made for machines that a laboratory does not have"
  }
}

run "three_sites_share_a_gpu" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  assert {
    condition     = endswith(output.submit, " tracking.uri=http://127.0.0.1:5000")
    error_message = "more is said than where things are: how sites share GPUs is the placement's (cluster/placement.py)"
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
    overrides     = ["cohort.names=it's"]
  }

  assert {
    condition     = endswith(output.submit, " 'cohort.names=it'\\''s'")
    error_message = "an override is not quoted for the shell"
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

run "half_a_gpu" {
  command = plan

  module {
    source = "../envs/single-site-lab"
  }

  variables {
    gpus = 0.5
  }

  expect_failures = [var.gpus]
}

# The server of tests/infra cannot hold a budget.
run "the_budget_counts_the_clusters_tag_and_tells_at_80_and_100_percent" {
  command = plan

  module {
    source = "../modules/base"
  }

  variables {
    secrets = { ray-token = "token" }
  }

  assert {
    condition     = [for one in aws_budgets_budget.month.cost_filter : [one.name, one.values]] == [["TagKeyValue", tolist([format("user:Fedsam$%s", "lab")])]]
    error_message = "the budget counts something else"
  }

  assert {
    condition     = { for one in aws_budgets_budget.month.notification : one.notification_type => one.threshold } == { ACTUAL = 80, FORECASTED = 100 }
    error_message = "the budget tells at other percents"
  }
}
