output "subnets" {
  description = "Zone to {id, cidr} of its private subnet; there when its way out is"
  value       = { for zone, subnet in aws_subnet.private : zone => { id = subnet.id, cidr = subnet.cidr_block } }
  depends_on  = [aws_route.nat, aws_route_table_association.private, aws_vpc_endpoint.s3]
}

output "groups" {
  description = "Security group of each of `kinds`"
  value       = { for kind, group in aws_security_group.this : kind => group.id }
}

output "vpc_id" {
  value       = aws_vpc.this.id
  description = "The network"
}
