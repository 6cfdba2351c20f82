output "secrets" {
  description = "Name to {name, arn} of each secret's parameter"
  value       = module.secrets.secrets
}

output "ami" {
  description = "Machine image to use"
  value       = var.ami != null ? var.ami : nonsensitive(data.aws_ssm_parameter.ami[0].value)
}

output "key_arn" {
  description = "KMS key of the bucket"
  value       = data.aws_kms_alias.bucket.target_key_arn
}

output "alarm_topic" {
  description = "SNS topic of alarms"
  value       = aws_sns_topic.alarms.arn
}
