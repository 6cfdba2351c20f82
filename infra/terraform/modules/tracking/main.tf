# MLflow on a machine of its own, with PostgreSQL (RDS) for what it knows and the bucket for files. The database's
# password is made, kept and changed weekly by Secrets Manager: Terraform never sees it.

data "aws_partition" "here" {}

locals {
  objects = "arn:${data.aws_partition.here.partition}:s3:::${var.bucket}"
  host    = cidrhost(var.subnet.cidr, 11)
}

resource "aws_db_subnet_group" "this" {
  name       = "${var.name}-tracking"
  subnet_ids = var.database_subnet_ids
}

resource "aws_db_parameter_group" "this" {
  name   = "${var.name}-tracking"
  family = "postgres16"

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }

  parameter {
    name  = "log_min_duration_statement"
    value = "1000"
  }
}

resource "aws_db_instance" "this" {
  # checkov:skip=CKV_AWS_157: metrics survive in the runs' folders and results; an hour without MLflow delays nothing
  # checkov:skip=CKV_AWS_118: MLflow's load needs no enhanced monitoring
  # checkov:skip=CKV_AWS_353: as above
  # checkov:skip=CKV_AWS_354: as above
  # checkov:skip=CKV_AWS_161: a password that Secrets Manager changes weekly; MLflow knows no IAM login
  # checkov:skip=CKV_AWS_293: protected by a last snapshot instead, so that one `destroy` removes the cluster
  identifier                      = "${var.name}-tracking"
  engine                          = "postgres"
  engine_version                  = "16"
  instance_class                  = var.database_class
  allocated_storage               = 20
  max_allocated_storage           = 200
  storage_encrypted               = true
  db_name                         = "mlflow"
  username                        = "mlflow"
  manage_master_user_password     = true
  db_subnet_group_name            = aws_db_subnet_group.this.name
  parameter_group_name            = aws_db_parameter_group.this.name
  vpc_security_group_ids          = [var.groups.database]
  publicly_accessible             = false
  backup_retention_period         = 7
  copy_tags_to_snapshot           = true
  auto_minor_version_upgrade      = true
  enabled_cloudwatch_logs_exports = ["postgresql"]
  skip_final_snapshot             = false
  final_snapshot_identifier       = "${var.name}-tracking-${formatdate("YYYYMMDDhhmmss", plantimestamp())}"

  lifecycle {
    ignore_changes = [final_snapshot_identifier] # named after the day it was made
  }
}

data "aws_iam_policy_document" "data" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [local.objects]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["mlflow", "mlflow/*"]
    }
  }

  statement {
    sid       = "Own"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${local.objects}/mlflow/*"]
  }

  statement {
    sid       = "Key"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.key_arn]
  }

  statement {
    sid       = "Database"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_db_instance.this.master_user_secret[0].secret_arn]
  }
}

module "machine" {
  source         = "../machine"
  name           = var.name
  id             = "tracking"
  role           = "tracking"
  image          = var.image
  ami            = var.ami
  instance_type  = var.instance_type
  subnet_id      = var.subnet.id
  private_ip     = local.host
  security_group = var.groups.tracking
  disk_gb        = 100
  parameters     = var.parameters
  policy         = data.aws_iam_policy_document.data.json
  alarm_topic    = var.alarm_topic

  settings = {
    DATABASE        = "postgresql://mlflow@${aws_db_instance.this.endpoint}/mlflow"
    DATABASE_SECRET = aws_db_instance.this.master_user_secret[0].secret_arn
    ARTIFACTS       = "s3://${var.bucket}/mlflow"
    ALLOWED_HOSTS   = "${local.host}:5000,127.0.0.1:5000,localhost:5000"
  }
}
