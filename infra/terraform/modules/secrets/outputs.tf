output "secrets" {
  description = "Name to {name, arn} of each secret's parameter"
  depends_on  = [aws_ssm_parameter.secret]

  value = { for key in keys(var.secrets) : key => {
    name = "${var.folder}/${key}"
    arn  = "arn:${data.aws_partition.here.partition}:ssm:${data.aws_region.here.name}:${data.aws_caller_identity.me.account_id}:parameter${var.folder}/${key}"
  } }
}
