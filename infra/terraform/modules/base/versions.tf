terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0"

      # What makes secrets has a name of its own: Terraform cannot mock ephemeral values.
      configuration_aliases = [aws.secrets]
    }
  }
}
