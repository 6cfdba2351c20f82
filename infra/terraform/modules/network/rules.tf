# Who may speak to whom. Each kind of machine is a group; each line of `allowed` opens one range of ports from one group
# to another, as a way out of the one and a way into the other. The dashboard (8265) is in none: it listens on the head's
# loopback and is reached through a Systems Manager session.

locals {
  # EC2 refuses an apostrophe in a description, which no plan finds out.
  descriptions = {
    head     = "The Ray head: the driver and the jobs API"
    site     = "Machines of the sites"
    tracking = "The MLflow server"
    database = "PostgreSQL of MLflow"
  }
  groups = { for kind in var.kinds : kind => local.descriptions[kind] }

  # Ray's nodes speak to each other directly: objects, and requests for workers. infra/image/entrypoint.sh pins the
  # ports to this range.
  ray = { from = 20000, to = 20999 }
  ways = {
    site-head-gcs        = { source = "site", target = "head", from = 6379, to = 6379 }
    site-head-ray        = merge({ source = "site", target = "head" }, local.ray)
    head-site-ray        = merge({ source = "head", target = "site" }, local.ray)
    site-site-ray        = merge({ source = "site", target = "site" }, local.ray)
    head-tracking        = { source = "head", target = "tracking", from = 5000, to = 5000 }
    tracking-to-database = { source = "tracking", target = "database", from = 5432, to = 5432 }
  }
  allowed = { for name, way in local.ways : name => way if length(setsubtract([way.source, way.target], var.kinds)) == 0 }
}

resource "aws_security_group" "this" {
  # checkov:skip=CKV2_AWS_5: attached by the modules head, site and tracking
  for_each    = local.groups
  name        = "${var.name}-${each.key}"
  description = each.value
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-${each.key}" }
}

resource "aws_vpc_security_group_ingress_rule" "allowed" {
  for_each                     = local.allowed
  description                  = "${each.key}: from ${each.value.source}"
  security_group_id            = aws_security_group.this[each.value.target].id
  referenced_security_group_id = aws_security_group.this[each.value.source].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_egress_rule" "allowed" {
  for_each                     = local.allowed
  description                  = "${each.key}: to ${each.value.target}"
  security_group_id            = aws_security_group.this[each.value.source].id
  referenced_security_group_id = aws_security_group.this[each.value.target].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

# AWS's own services and the registry of images; the database goes nowhere.
resource "aws_vpc_security_group_egress_rule" "https" {
  for_each          = setsubtract(var.kinds, ["database"])
  description       = "AWS services and the image registry"
  security_group_id = aws_security_group.this[each.key].id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}
