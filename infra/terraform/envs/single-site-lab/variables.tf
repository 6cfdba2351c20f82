variable "region" {
  description = "AWS region, the bucket's"
  type        = string
}

variable "zone" {
  description = "Availability zone, one that has the instance type"
  type        = string
}

variable "name" {
  description = "Name of the cluster; part of all its resources' names"
  type        = string
  default     = "fedsam-lab"
}

variable "cidr" {
  description = "The network's addresses"
  type        = string
  default     = "10.20.0.0/16"
}

variable "bucket" {
  description = "Bucket that envs/storage made"
  type        = string
}

variable "image" {
  description = "Container image of fedsam (the Dockerfile), in a registry that the machines may pull from"
  type        = string

  validation {
    condition     = can(regex("^[^ ]+(:[^ :/]+|@sha256:[0-9a-f]{64})$", var.image)) && !endswith(var.image, ":latest")
    error_message = "image: with a tag or digest, and not :latest, so that all sites run the same code."
  }
}

variable "ami" {
  description = "Machine image with Docker, NVIDIA's driver and container toolkit and the AWS command line; null: AWS's newest Deep Learning Base"
  type        = string
  default     = null
}

variable "instance_type" {
  description = "Of the one machine"
  type        = string
  default     = "g5.xlarge"
}

variable "gpus" {
  description = "GPUs that the machine must have"
  type        = number
  default     = 1

  validation {
    condition     = var.gpus >= 0 && var.gpus <= 16 && floor(var.gpus) == var.gpus
    error_message = "gpus: a whole number from 0 to 16."
  }
}

variable "sites" {
  description = "Ids of the cohort's sites, all of which are this machine"
  type        = list(string)
  default     = ["site-a", "site-b", "site-c"]

  validation {
    condition     = length(var.sites) >= 1 && length(distinct(var.sites)) == length(var.sites)
    error_message = "sites: one id at least, each once."
  }

  validation {
    condition     = alltrue([for id in var.sites : can(regex("^[A-Za-z0-9]([A-Za-z0-9_.-]{0,30}[A-Za-z0-9])?$", id))])
    error_message = "sites: an id is 1 to 32 letters, digits, '_', '.' and '-', beginning and ending with a letter or digit: it names a Ray resource and a label."
  }
}

variable "disk_gb" {
  description = "Encrypted disk, GB"
  type        = number
  default     = 200

  validation {
    condition     = var.disk_gb >= 50
    error_message = "disk_gb: 50 or more."
  }
}

variable "data_dir" {
  description = "Folder on the machines for scans, prepared cohorts and runs"
  type        = string
  default     = "/data"
}

variable "stop_when_idle_minutes" {
  description = "Stop the machine when its CPUs are idle for so long; null: never"
  type        = number
  default     = 60
}

variable "alarm_email" {
  description = "Who is told of alarms and of the budget"
  type        = string
}

variable "monthly_budget_usd" {
  description = "Told at 80% spent and at 100% foreseen"
  type        = number
}

variable "secrets_version" {
  description = "Raise it to make a new token and password, and replace the machines then; null: SecureString parameters /fedsam/NAME/... are there already, made by other hands"
  type        = number
  default     = 1
}

variable "config" {
  description = "Experiment of the printed submit line: a committed one, or a file"
  type        = string
  default     = "demo"
}

variable "overrides" {
  description = "Further key=value of the printed submit line"
  type        = list(string)
  default     = []
}
