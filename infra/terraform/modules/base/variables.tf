variable "name" {
  description = "Name of the cluster; part of all its resources' names"
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name: 3 to 20 lower-case letters, digits and '-', beginning with a letter."
  }
}

variable "bucket" {
  description = "Bucket that envs/storage made"
  type        = string
}

variable "secrets" {
  description = "Secrets to make: name to description"
  type        = map(string)
}

variable "secrets_version" {
  description = "Raise it to make new secrets; null: none are made"
  type        = number
}

variable "ami" {
  description = "Machine image; null: AWS's newest"
  type        = string
}

variable "alarm_email" {
  description = "Who is told of alarms and of the budget"
  type        = string

  validation {
    condition     = can(regex("^[^@ ]+@[^@ ]+$", var.alarm_email))
    error_message = "alarm_email: an address such as ops@hospital.example."
  }
}

variable "monthly_budget_usd" {
  description = "Told at 80% spent and at 100% foreseen"
  type        = number

  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd: more than 0."
  }
}
