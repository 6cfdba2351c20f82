output "instance_id" {
  description = "The machine"
  value       = module.machine.instance_id
}

output "private_ip" {
  description = "What the sites connect to"
  value       = module.machine.private_ip
}
