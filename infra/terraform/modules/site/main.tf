# One hospital's machine: it announces the Ray resource site_<id>, and of the bucket it sees its own part alone.

locals {
  objects = "arn:${data.aws_partition.here.partition}:s3:::${var.bucket}"
  own     = ["cohorts/*/${var.id}", var.prefix]
}

data "aws_partition" "here" {}

data "aws_iam_policy_document" "data" {
  # Names of other sites' objects are names of their cases: only its own are listed, and the top of the bucket, which
  # tells a missing bucket from a missing object.
  statement {
    sid       = "ListOwn"
    actions   = ["s3:ListBucket"]
    resources = [local.objects]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = concat([""], flatten([for prefix in local.own : [prefix, "${prefix}/*"]]))
    }
  }

  statement {
    sid       = "Own"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = [for prefix in local.own : "${local.objects}/${prefix}/*"]
  }

  statement {
    sid       = "Key"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.key_arn]
  }
}

module "machine" {
  source                 = "../machine"
  name                   = var.name
  id                     = "site-${var.id}"
  role                   = "site"
  image                  = var.image
  ami                    = var.ami
  instance_type          = var.instance_type
  gpus                   = var.gpus
  spot                   = var.spot
  subnet_id              = var.subnet_id
  security_group         = var.security_group
  disk_gb                = var.disk_gb
  data_dir               = var.data_dir
  parameters             = { ray-token = var.token_arn }
  policy                 = data.aws_iam_policy_document.data.json
  alarm_topic            = var.alarm_topic
  stop_when_idle_minutes = var.stop_when_idle_minutes

  settings = {
    SITES     = var.id
    HEAD_IP   = var.head_ip
    MARKET    = var.spot ? "spot" : "on-demand"
    SCANS_URL = "s3://${var.bucket}/${var.prefix}/scans/"
  }
}
