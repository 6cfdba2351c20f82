variable "region" {
  description = "AWS region that the data may lie in, such as eu-central-1"
  type        = string
}

variable "bucket" {
  description = "Name of the bucket, unique in the world"
  type        = string
}

variable "keep_old_versions_days" {
  description = "Days that a replaced or deleted object can still be brought back"
  type        = number
  default     = 90
}
