variable "region" {
  description = "AWS region, the bucket's"
  type        = string
}

variable "zones" {
  description = "Availability zones, two at least (PostgreSQL's subnets); head and MLflow are in the first"
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 2
    error_message = "zones: two availability zones at least, which RDS asks for."
  }
}

variable "name" {
  description = "Name of the cluster; part of all its resources' names"
  type        = string
  default     = "fedsam"
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

variable "head_instance_type" {
  description = "The head needs memory for global states, and no GPU"
  type        = string
  default     = "m6i.xlarge"
}

variable "sites" {
  description = "The hospitals, by their id in the cohort. gpus: what the machine has; spot: AWS may take it back; prefix: the site's own part of the bucket (sites/ID); zone: one of `zones`"
  type = map(object({
    instance_type = optional(string, "g5.xlarge")
    gpus          = optional(number, 1)
    spot          = optional(bool, false)
    prefix        = optional(string)
    zone          = optional(string)
    disk_gb       = optional(number, 200)
  }))

  validation {
    condition     = length(var.sites) >= 3
    error_message = "sites: a masked sum of fewer than three sites shows what each of them sent: name three at least (or use envs/single-site-lab)."
  }

  validation {
    condition     = alltrue([for id in keys(var.sites) : can(regex("^[A-Za-z0-9]([A-Za-z0-9_.-]{0,30}[A-Za-z0-9])?$", id))])
    error_message = "sites: an id is 1 to 32 letters, digits, '_', '.' and '-', beginning and ending with a letter or digit: it names a Ray resource and a label."
  }

  validation {
    condition     = length(distinct([for id in keys(var.sites) : lower(id)])) == length(var.sites)
    error_message = "sites: two ids differ in upper and lower case only, which IAM does not tell apart."
  }

  validation {
    condition = alltrue(flatten([for a, one in var.sites : [for b, other in var.sites :
      a == b || !startswith("${coalesce(one.prefix, "sites/${a}")}/", "${coalesce(other.prefix, "sites/${b}")}/")
    ]]))
    error_message = "sites: two sites have the same prefix, or one within the other's: each would read the other's scans."
  }

  validation {
    condition     = alltrue([for site in var.sites : site.prefix == null || can(regex("^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$", site.prefix))])
    error_message = "sites: a prefix is like sites/charite: letters, digits, '_', '.', '-' between single slashes, none at either end."
  }

  validation {
    condition     = alltrue([for site in var.sites : !contains(["cohorts", "results", "mlflow"], split("/", coalesce(site.prefix, "sites"))[0])])
    error_message = "sites: the prefixes cohorts/, results/ and mlflow/ are the cluster's own."
  }

  validation {
    condition     = alltrue([for site in var.sites : site.zone == null || contains(var.zones, coalesce(site.zone, "-"))])
    error_message = "sites: a zone is one of `zones`, or left out."
  }

  validation {
    condition     = alltrue([for site in var.sites : site.gpus >= 0 && site.gpus <= 16 && floor(site.gpus) == site.gpus && site.disk_gb >= 50])
    error_message = "sites: gpus is a whole number from 0 to 16, disk_gb 50 or more."
  }
}

variable "data_dir" {
  description = "Folder on the machines for scans, prepared cohorts and runs"
  type        = string
  default     = "/data"
}

variable "stop_when_idle_minutes" {
  description = "Stop a site's machine when its CPUs are idle for so long; null: never"
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
