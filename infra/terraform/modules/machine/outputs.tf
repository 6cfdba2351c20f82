output "instance_id" {
  description = "The machine"
  value       = aws_instance.this.id
}

output "private_ip" {
  description = "Its address in the network"
  value       = aws_instance.this.private_ip
}

output "role_name" {
  description = "Its IAM role"
  value       = aws_iam_role.this.name
}
