# The data's own root: apply it once, before any cluster. Its state holds nothing but the bucket and its key.

provider "aws" {
  region = var.region

  default_tags {
    tags = { Project = "fedsam", Fedsam = "storage" }
  }
}

module "storage" {
  source                 = "../../modules/storage"
  bucket                 = var.bucket
  keep_old_versions_days = var.keep_old_versions_days
}
