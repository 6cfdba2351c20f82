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
  description = "Of MLflow's machine"
  type        = string
  default     = "t3.medium"
}

variable "database_class" {
  description = "Of the PostgreSQL"
  type        = string
  default     = "db.t4g.micro"
}

variable "subnet" {
  description = "Private subnet: id and cidr; MLflow is its eleventh address"
  type        = object({ id = string, cidr = string })
}

variable "database_subnet_ids" {
  description = "Private subnets in two zones at least: RDS asks for them"
  type        = list(string)
}

variable "groups" {
  description = "Security groups: tracking, database"
  type        = map(string)
}

variable "bucket" {
  description = "Bucket of MLflow's files"
  type        = string
}

variable "key_arn" {
  description = "KMS key of the bucket"
  type        = string
}

variable "parameters" {
  description = "ARN of the secret `mlflow-password`"
  type        = map(string)
}

variable "alarm_topic" {
  description = "SNS topic"
  type        = string
}
