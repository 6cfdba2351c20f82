variable "name" {
  description = "Name of the cluster"
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
  description = "Such as m6i.xlarge"
  type        = string
}

variable "gpus" {
  description = "GPUs of the head itself: a lab's"
  type        = number
  default     = 0
}

variable "sites" {
  description = "Ids of sites that live on the head's machine: a lab's"
  type        = list(string)
  default     = []
}

variable "tracking_here" {
  description = "Run MLflow with sqlite on this machine, on its loopback"
  type        = bool
  default     = false
}

variable "subnet" {
  description = "Private subnet: id and cidr; the head is its tenth address"
  type        = object({ id = string, cidr = string })
}

variable "security_group" {
  description = "The heads' group"
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

variable "prefix" {
  description = "Of a lab: its own part of the bucket; scans are uploaded to PREFIX/scans/. null: there are none here"
  type        = string
  default     = null
}

variable "parameters" {
  description = "ARNs of the secrets `ray-token` and, where MLflow asks for a login, `mlflow-password`"
  type        = map(string)
}

variable "disk_gb" {
  description = "Encrypted disk, GB"
  type        = number
  default     = 200
}

variable "data_dir" {
  description = "Folder for scans and runs"
  type        = string
}

variable "alarm_topic" {
  description = "SNS topic"
  type        = string
}

variable "stop_when_idle_minutes" {
  description = "null: never"
  type        = number
  default     = null
}
