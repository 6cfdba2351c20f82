variable "name" {
  description = "Name of the cluster"
  type        = string
}

variable "id" {
  description = "The site, exactly as it stands in the cohort"
  type        = string
}

variable "head_ip" {
  description = "Address of the Ray head"
  type        = string
}

variable "image" {
  description = "Container image of fedsam"
  type        = string
}

variable "ami" {
  description = "Machine image, see the module machine"
  type        = string
}

variable "instance_type" {
  description = "Such as g5.xlarge"
  type        = string
}

variable "gpus" {
  description = "GPUs that the machine must have"
  type        = number
}

variable "spot" {
  description = "Ask for a spot machine"
  type        = bool
}

variable "prefix" {
  description = "The site's own part of the bucket; its scans are uploaded to PREFIX/scans/"
  type        = string
}

variable "subnet_id" {
  description = "Private subnet"
  type        = string
}

variable "security_group" {
  description = "The sites' group"
  type        = string
}

variable "bucket" {
  description = "Bucket of cohorts and results"
  type        = string
}

variable "key_arn" {
  description = "KMS key of the bucket"
  type        = string
}

variable "token_arn" {
  description = "Parameter with Ray's token"
  type        = string
}

variable "disk_gb" {
  description = "Encrypted disk, GB"
  type        = number
}

variable "data_dir" {
  description = "Folder for scans and prepared cohorts"
  type        = string
}

variable "alarm_topic" {
  description = "SNS topic"
  type        = string
}

variable "stop_when_idle_minutes" {
  description = "null: never"
  type        = number
}
