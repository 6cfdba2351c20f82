# The root of the tests: `terraform init` here finds the modules that they plan. There is nothing to apply.
terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0"
    }
  }
}
