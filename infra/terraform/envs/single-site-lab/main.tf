# One laboratory: a single machine with a GPU that is the head, the node of every site (of a cohort that may lie in one
# place) and, with sqlite, MLflow. Selections are compared here, or a federation is rehearsed; sites share the GPU.

provider "aws" {
  region = var.region

  default_tags {
    tags = { Project = "fedsam", Fedsam = var.name }
  }
}

locals {
  prefix = "laboratories/${var.name}"
}

provider "aws" {
  alias  = "secrets"
  region = var.region
}

module "base" {
  providers          = { aws = aws, aws.secrets = aws.secrets }
  source             = "../../modules/base"
  name               = var.name
  bucket             = var.bucket
  ami                = var.ami
  alarm_email        = var.alarm_email
  monthly_budget_usd = var.monthly_budget_usd
  secrets_version    = var.secrets_version
  secrets            = { ray-token = "Opens the Ray cluster ${var.name}" }
}

module "network" {
  source = "../../modules/network"
  name   = var.name
  cidr   = var.cidr
  zones  = [var.zone]
  kinds  = ["head"]
}

module "head" {
  source                 = "../../modules/head"
  name                   = var.name
  image                  = var.image
  ami                    = module.base.ami
  instance_type          = var.instance_type
  gpus                   = var.gpus
  sites                  = var.sites
  tracking_here          = true
  prefix                 = local.prefix
  subnet                 = module.network.subnets[var.zone]
  security_group         = module.network.groups["head"]
  bucket                 = var.bucket
  key_arn                = module.base.key_arn
  data_dir               = var.data_dir
  disk_gb                = var.disk_gb
  alarm_topic            = module.base.alarm_topic
  parameters             = { ray-token = module.base.secrets["ray-token"].arn }
  stop_when_idle_minutes = var.stop_when_idle_minutes
}
