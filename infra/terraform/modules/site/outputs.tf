output "instance_id" {
  description = "The machine"
  value       = module.machine.instance_id
}

output "role_name" {
  description = "Its IAM role"
  value       = module.machine.role_name
}
