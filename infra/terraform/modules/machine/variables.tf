variable "name" {
  description = "Name of the cluster"
  type        = string
}

variable "id" {
  description = "What tells this machine from the cluster's others, such as head or site-charite"
  type        = string
}

variable "role" {
  description = "head, site or tracking: what infra/image/entrypoint.sh is told to be"
  type        = string

  validation {
    condition     = contains(["head", "site", "tracking"], var.role)
    error_message = "role: head, site or tracking."
  }
}

variable "settings" {
  description = "Environment of scripts/boot.sh beyond what every machine has; no secrets: they are read at boot"
  type        = map(string)
  default     = {}
}

variable "parameters" {
  description = "ARNs of the Parameter Store secrets that this machine may read, by the file that boot.sh writes them to: ray-token, mlflow-password"
  type        = map(string)
}

variable "policy" {
  description = "IAM policy (JSON): which objects are this machine's"
  type        = string
}

variable "image" {
  description = "Container image of fedsam"
  type        = string
}

variable "ami" {
  description = "Machine image with Docker, the AWS command line and, for GPUs, NVIDIA's driver and container toolkit"
  type        = string
}

variable "instance_type" {
  description = "Such as g5.xlarge"
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]*\\.[a-z0-9-]+$", var.instance_type))
    error_message = "instance_type: a type such as g5.xlarge."
  }
}

variable "gpus" {
  description = "GPUs that the machine must have; with fewer it does not join"
  type        = number
  default     = 0
}

variable "spot" {
  description = "Ask for a spot machine, which AWS may take back"
  type        = bool
  default     = false
}

variable "subnet_id" {
  description = "Private subnet"
  type        = string
}

variable "private_ip" {
  description = "Fixed address, for a machine that others are told of"
  type        = string
  default     = null
}

variable "security_group" {
  description = "The group of its kind"
  type        = string
}

variable "disk_gb" {
  description = "Encrypted disk, GB"
  type        = number
  default     = 200
}

variable "data_dir" {
  description = "Folder on the machine for scans, prepared cohorts and runs"
  type        = string
  default     = "/data"
}

variable "stop_when_idle_minutes" {
  description = "Stop the machine when its CPUs are below 5% for so long; null: never"
  type        = number
  default     = null

  validation {
    condition     = var.stop_when_idle_minutes == null || try(var.stop_when_idle_minutes >= 15 && var.stop_when_idle_minutes <= 1440 && var.stop_when_idle_minutes % 5 == 0, false)
    error_message = "stop_when_idle_minutes: 15 to 1440 (CloudWatch looks back a day at most), a multiple of 5."
  }
}

variable "alarm_topic" {
  description = "SNS topic that is told of a sick or stopped machine"
  type        = string
}
