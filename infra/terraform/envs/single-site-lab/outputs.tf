output "bucket" {
  description = "Where results are"
  value       = var.bucket
}

output "upload" {
  description = "Brings the scans of all sites into the laboratory's own part of the bucket; the machine has them some minutes later, in `data_dir`/scans"
  value       = "aws s3 sync --region ${var.region} FOLDER s3://${var.bucket}/${local.prefix}/scans/"
}

output "tunnel" {
  description = "Leave it open: the cluster's jobs API and dashboard are then at http://127.0.0.1:8265"
  value       = "aws ssm start-session --region ${var.region} --target ${module.head.instance_id} --document-name AWS-StartPortForwardingSession --parameters '{\"portNumber\":[\"8265\"],\"localPortNumber\":[\"8265\"]}'"
}

output "tracking_tunnel" {
  description = "Leave it open: MLflow is then at http://127.0.0.1:5000"
  value       = "aws ssm start-session --region ${var.region} --target ${module.head.instance_id} --document-name AWS-StartPortForwardingSession --parameters '{\"portNumber\":[\"5000\"],\"localPortNumber\":[\"5000\"]}'"
}

output "submit" {
  description = "Runs the federation on the cluster, through the tunnel"
  value = join(" ", concat(
    ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=\"$(aws ssm get-parameter --region ${var.region} --with-decryption --name ${module.base.secrets["ray-token"].name} --query Parameter.Value --output text)\""],
    ["fedsam", "submit", "federate", "--address", "http://127.0.0.1:8265", "--config", var.config],
    ["work_dir=${var.data_dir}/fedsam", "storage.prepared=s3://${var.bucket}/cohorts", "storage.results=s3://${var.bucket}/results"],
    ["tracking.uri=http://127.0.0.1:5000"],
    [for override in var.overrides : "'${replace(override, "'", "'\\''")}'"],
  ))
}

output "wake" {
  description = "Starts the machine when it was stopped as idle"
  value       = "aws ec2 start-instances --region ${var.region} --instance-ids ${module.head.instance_id}"
}
