# What every cluster has beside its machines: secrets, whom to tell, a limit of money, and the names it looks up.

module "secrets" {
  source          = "../secrets"
  providers       = { aws = aws, aws.secrets = aws.secrets }
  folder          = "/fedsam/${var.name}"
  secrets         = var.secrets
  secrets_version = var.secrets_version
}

resource "aws_sns_topic" "alarms" {
  name              = "${var.name}-alarms"
  kms_master_key_id = aws_kms_key.alarms.id
}

# Of the account's own key for SNS, CloudWatch and Budgets may not make use.
resource "aws_kms_key" "alarms" {
  description             = "Alarms of ${var.name}"
  enable_key_rotation     = true
  deletion_window_in_days = 7
  policy                  = data.aws_iam_policy_document.alarms_key.json
}

data "aws_iam_policy_document" "alarms_key" {
  # checkov:skip=CKV_AWS_109: a key's policy speaks of this key alone; the account's owner must be able to administer it
  # checkov:skip=CKV_AWS_111: as above
  # checkov:skip=CKV_AWS_356: in a key's policy "*" is the key itself
  statement {
    sid       = "AccountDecidesByIam"
    actions   = ["kms:*"]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = ["arn:${data.aws_partition.here.partition}:iam::${data.aws_caller_identity.me.account_id}:root"]
    }
  }

  statement {
    sid       = "Alarms"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey*"]
    resources = ["*"]

    principals {
      type        = "Service"
      identifiers = ["cloudwatch.amazonaws.com", "budgets.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "publish" {
  statement {
    sid       = "AlarmsAndBudget"
    actions   = ["sns:Publish"]
    resources = [aws_sns_topic.alarms.arn]

    principals {
      type        = "Service"
      identifiers = ["cloudwatch.amazonaws.com", "budgets.amazonaws.com"]
    }

    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [data.aws_caller_identity.me.account_id]
    }
  }
}

resource "aws_sns_topic_policy" "alarms" {
  arn    = aws_sns_topic.alarms.arn
  policy = data.aws_iam_policy_document.publish.json
}

resource "aws_sns_topic_subscription" "mail" {
  topic_arn = aws_sns_topic.alarms.arn
  protocol  = "email"
  endpoint  = var.alarm_email
}

# Counts what carries the tag Fedsam = name, once that tag is activated for cost allocation in the account's billing.
resource "aws_budgets_budget" "month" {
  name         = "${var.name}-month"
  budget_type  = "COST"
  limit_amount = tostring(var.monthly_budget_usd)
  limit_unit   = "USD"
  time_unit    = "MONTHLY"

  cost_filter {
    name   = "TagKeyValue"
    values = [join("$", ["user:Fedsam", var.name])] # "$$" before a brace would be Terraform's escape: the name as it stands
  }

  dynamic "notification" {
    for_each = { ACTUAL = 80, FORECASTED = 100 }

    content {
      notification_type         = notification.key
      threshold                 = notification.value
      threshold_type            = "PERCENTAGE"
      comparison_operator       = "GREATER_THAN"
      subscriber_sns_topic_arns = [aws_sns_topic.alarms.arn]
    }
  }

  depends_on = [aws_sns_topic_policy.alarms]
}

data "aws_caller_identity" "me" {}

data "aws_partition" "here" {}

# The storage root's key: a cluster whose bucket is not there fails here, before it makes a machine.
data "aws_kms_alias" "bucket" {
  name = "alias/fedsam-${var.bucket}"
}

# AWS's image with Docker, NVIDIA's driver and container toolkit, and the command line.
data "aws_ssm_parameter" "ami" {
  count = var.ami == null ? 1 : 0
  name  = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
}
