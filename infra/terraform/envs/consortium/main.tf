# Several hospitals: a head, a machine a site, MLflow with PostgreSQL. The bucket is another root's (envs/storage), so
# `terraform destroy` here removes machines and the network, and no scan or result that is in the bucket.

provider "aws" {
  region = var.region

  default_tags {
    tags = { Project = "fedsam", Fedsam = var.name }
  }
}

locals {
  prefixes = { for id, site in var.sites : id => coalesce(site.prefix, "sites/${id}") }
  first    = module.network.subnets[var.zones[0]]
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

  secrets = {
    ray-token       = "Opens the Ray cluster ${var.name}"
    mlflow-password = "MLflow's user admin in ${var.name}"
  }
}

module "network" {
  source = "../../modules/network"
  name   = var.name
  cidr   = var.cidr
  zones  = var.zones
}

module "head" {
  source         = "../../modules/head"
  name           = var.name
  image          = var.image
  ami            = module.base.ami
  instance_type  = var.head_instance_type
  subnet         = local.first
  security_group = module.network.groups["head"]
  bucket         = var.bucket
  key_arn        = module.base.key_arn
  data_dir       = var.data_dir
  alarm_topic    = module.base.alarm_topic
  parameters     = { for key, secret in module.base.secrets : key => secret.arn }
}

module "site" {
  source                 = "../../modules/site"
  for_each               = var.sites
  name                   = var.name
  id                     = each.key
  head_ip                = module.head.private_ip
  image                  = var.image
  ami                    = module.base.ami
  instance_type          = each.value.instance_type
  gpus                   = each.value.gpus
  spot                   = each.value.spot
  disk_gb                = each.value.disk_gb
  prefix                 = local.prefixes[each.key]
  subnet_id              = module.network.subnets[coalesce(each.value.zone, var.zones[0])].id
  security_group         = module.network.groups["site"]
  bucket                 = var.bucket
  key_arn                = module.base.key_arn
  token_arn              = module.base.secrets["ray-token"].arn
  data_dir               = var.data_dir
  alarm_topic            = module.base.alarm_topic
  stop_when_idle_minutes = var.stop_when_idle_minutes
}

module "tracking" {
  source              = "../../modules/tracking"
  name                = var.name
  image               = var.image
  ami                 = module.base.ami
  subnet              = local.first
  database_subnet_ids = [for subnet in module.network.subnets : subnet.id]
  groups              = module.network.groups
  bucket              = var.bucket
  key_arn             = module.base.key_arn
  parameters          = { mlflow-password = module.base.secrets["mlflow-password"].arn }
  alarm_topic         = module.base.alarm_topic
}
