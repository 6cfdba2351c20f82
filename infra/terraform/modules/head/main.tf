# The Ray head: jobs API, driver, and, in a lab, the sites and MLflow too. Its address is fixed, so that a replaced head
# is found by the sites that are there.

locals {
  objects = "arn:${data.aws_partition.here.partition}:s3:::${var.bucket}"
}

data "aws_partition" "here" {}

# docs/storage.md: what the driver and who starts `federate` need. Sites' scans are not among it, unless sites live here.
data "aws_iam_policy_document" "data" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [local.objects]
  }

  statement {
    sid     = "Own"
    actions = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = concat(
      ["${local.objects}/results/*", "${local.objects}/mlflow/*", "${local.objects}/cohorts/*/.fedsam-check-*"],
      [for site in var.sites : "${local.objects}/cohorts/*/${site}/*"],
      var.prefix == null ? [] : ["${local.objects}/${var.prefix}/*"],
    )
  }

  statement {
    sid       = "WhoHasWhat"
    actions   = ["s3:GetObject"]
    resources = ["${local.objects}/cohorts/*/cohort.json"]
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
  id                     = "head"
  role                   = "head"
  image                  = var.image
  ami                    = var.ami
  instance_type          = var.instance_type
  gpus                   = var.gpus
  subnet_id              = var.subnet.id
  private_ip             = cidrhost(var.subnet.cidr, 10) # the first four are AWS's
  security_group         = var.security_group
  disk_gb                = var.disk_gb
  data_dir               = var.data_dir
  parameters             = var.parameters
  policy                 = data.aws_iam_policy_document.data.json
  alarm_topic            = var.alarm_topic
  stop_when_idle_minutes = var.stop_when_idle_minutes

  settings = merge(
    { SITES = join(",", var.sites) },
    var.tracking_here ? { TRACKING_HERE = "true" } : {},
    var.prefix == null ? {} : { SCANS_URL = "s3://${var.bucket}/${var.prefix}/scans/" },
  )
}
