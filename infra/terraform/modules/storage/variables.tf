variable "bucket" {
  description = "Name of the bucket, unique in the world"
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,46}[a-z0-9]$", var.bucket))
    error_message = "bucket: 3 to 48 lower-case letters, digits and '-', beginning and ending with a letter or digit (no dots: TLS certificates do not match them)."
  }
}

variable "keep_old_versions_days" {
  description = "Days that a replaced or deleted object can still be brought back"
  type        = number
  default     = 90

  validation {
    condition     = var.keep_old_versions_days >= 1 && floor(var.keep_old_versions_days) == var.keep_old_versions_days
    error_message = "keep_old_versions_days: a whole number of days, 1 or more."
  }
}
