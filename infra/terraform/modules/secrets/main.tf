locals {
  made = var.secrets_version == null ? {} : var.secrets
}

data "aws_region" "here" {}

data "aws_partition" "here" {}

data "aws_caller_identity" "me" {}

# Made here, kept in Parameter Store, and in no state file, plan or log: ephemeral values go into write-only arguments.
# Another `secrets_version` makes new ones; machines read them when they boot.
ephemeral "aws_secretsmanager_random_password" "secret" {
  provider            = aws.secrets
  for_each            = local.made
  password_length     = 48
  exclude_punctuation = true
}

resource "aws_ssm_parameter" "secret" {
  # checkov:skip=CKV_AWS_337: the account's own key for Parameter Store; who may read is said by each machine's role
  for_each         = local.made
  name             = "${var.folder}/${each.key}"
  description      = each.value
  type             = "SecureString"
  value_wo         = ephemeral.aws_secretsmanager_random_password.secret[each.key].random_password
  value_wo_version = var.secrets_version
}
