# One machine that runs fedsam's image: its rights, its disk, and what it does at its first boot.

data "aws_region" "here" {}

data "aws_partition" "here" {}

data "aws_caller_identity" "me" {}

locals {
  settings = merge(
    {
      ROLE      = var.role
      IMAGE     = var.image
      GPU_COUNT = tostring(var.gpus)
      REGION    = data.aws_region.here.name
      DATA_DIR  = var.data_dir
      SECRETS   = join(" ", [for file, arn in var.parameters : "${file}=${arn}"])
    },
    var.settings,
  )

  arn     = "arn:${data.aws_partition.here.partition}"
  own_ecr = regexall("^([0-9]{12})\\.dkr\\.ecr\\.([a-z0-9-]+)\\.amazonaws\\.com(?:\\.cn)?/([^:@]+)", var.image)
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "this" {
  name               = "${var.name}-${var.id}"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}

resource "aws_iam_instance_profile" "this" {
  name = "${var.name}-${var.id}"
  role = aws_iam_role.this.name
}

# Not AWS's AmazonSSMManagedInstanceCore: that lets a machine read every parameter of the account, MLflow's password too.
data "aws_iam_policy_document" "base" {
  # checkov:skip=CKV_AWS_111: these calls of a Systems Manager session take no resource
  # checkov:skip=CKV_AWS_356: as above, and ecr:GetAuthorizationToken neither
  statement {
    sid = "Sessions"
    actions = [
      "ssm:UpdateInstanceInformation",
      "ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel",
      "ssmmessages:OpenControlChannel", "ssmmessages:OpenDataChannel",
    ]
    resources = ["*"]
  }

  statement {
    sid       = "OwnSecrets"
    actions   = ["ssm:GetParameter"]
    resources = values(var.parameters)
  }

  dynamic "statement" {
    for_each = local.own_ecr

    content {
      sid       = "ImageLogin"
      actions   = ["ecr:GetAuthorizationToken"]
      resources = ["*"]
    }
  }

  dynamic "statement" {
    for_each = local.own_ecr

    content {
      sid       = "Image"
      actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
      resources = ["${local.arn}:ecr:${statement.value[1]}:${statement.value[0]}:repository/${statement.value[2]}"]
    }
  }
}

resource "aws_iam_role_policy" "base" {
  name   = "base"
  role   = aws_iam_role.this.id
  policy = data.aws_iam_policy_document.base.json
}

resource "aws_iam_role_policy" "data" {
  name   = "data"
  role   = aws_iam_role.this.id
  policy = var.policy
}

resource "aws_instance" "this" {
  # checkov:skip=CKV_AWS_126: five-minute metrics are enough to find an idle machine
  ami                         = var.ami
  instance_type               = var.instance_type
  subnet_id                   = var.subnet_id
  private_ip                  = var.private_ip
  vpc_security_group_ids      = [var.security_group]
  associate_public_ip_address = false
  iam_instance_profile        = aws_iam_instance_profile.this.name
  ebs_optimized               = true
  user_data_replace_on_change = true

  user_data = templatefile("${path.module}/user_data.sh.tftpl", {
    settings = local.settings
    script   = file("${path.module}/scripts/boot.sh")
  })

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    encrypted   = true
    volume_type = "gp3"
    volume_size = var.disk_gb
  }

  # A persistent request can be stopped when idle and started again; when AWS takes the machine back it is stopped too,
  # and its disk stays.
  dynamic "instance_market_options" {
    for_each = var.spot ? [1] : []

    content {
      market_type = "spot"

      spot_options {
        instance_interruption_behavior = "stop"
        spot_instance_type             = "persistent"
      }
    }
  }

  tags        = { Name = "${var.name}-${var.id}" }
  volume_tags = { Name = "${var.name}-${var.id}" }

  # A new release of the base image is no reason to replace a machine with scans on it.
  lifecycle {
    ignore_changes = [ami]
  }

  depends_on = [aws_iam_role_policy.base, aws_iam_role_policy.data]
}

resource "aws_cloudwatch_metric_alarm" "idle" {
  count               = var.stop_when_idle_minutes == null ? 0 : 1
  alarm_name          = "${var.name}-${var.id}-idle"
  alarm_description   = "Stops the machine: its CPUs were idle for ${var.stop_when_idle_minutes} minutes. Nothing is lost; start it again when needed."
  namespace           = "AWS/EC2"
  metric_name         = "CPUUtilization"
  statistic           = "Maximum"
  comparison_operator = "LessThanThreshold"
  threshold           = 5
  period              = 300
  evaluation_periods  = var.stop_when_idle_minutes / 5
  treat_missing_data  = "notBreaching"
  dimensions          = { InstanceId = aws_instance.this.id }
  alarm_actions       = ["${local.arn}:automate:${data.aws_region.here.name}:ec2:stop", var.alarm_topic]
}

resource "aws_cloudwatch_metric_alarm" "sick" {
  alarm_name          = "${var.name}-${var.id}-sick"
  alarm_description   = "The machine fails its status checks"
  namespace           = "AWS/EC2"
  metric_name         = "StatusCheckFailed"
  statistic           = "Maximum"
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  period              = 60
  evaluation_periods  = 5
  treat_missing_data  = "notBreaching"
  dimensions          = { InstanceId = aws_instance.this.id }
  alarm_actions       = [var.alarm_topic]
}
