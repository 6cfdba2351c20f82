output "uri" {
  description = "tracking.uri of runs in the cluster"
  value       = "http://${module.machine.private_ip}:5000"
}

output "instance_id" {
  description = "The machine"
  value       = module.machine.instance_id
}
