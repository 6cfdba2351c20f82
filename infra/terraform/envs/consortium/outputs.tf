output "bucket" {
  description = "Where sites' scans are uploaded to and results are"
  value       = var.bucket
}

output "upload" {
  description = "For each site, the command that brings its scans into its own part of the bucket"
  value       = { for id, prefix in local.prefixes : id => "aws s3 sync --region ${var.region} FOLDER s3://${var.bucket}/${prefix}/scans/" }
}

output "tracking_uri" {
  description = "MLflow, as runs in the cluster reach it"
  value       = module.tracking.uri
}

output "tunnel" {
  description = "Leave it open: the cluster's jobs API and dashboard are then at http://127.0.0.1:8265"
  value       = "aws ssm start-session --region ${var.region} --target ${module.head.instance_id} --document-name AWS-StartPortForwardingSession --parameters '{\"portNumber\":[\"8265\"],\"localPortNumber\":[\"8265\"]}'"
}

output "tracking_tunnel" {
  description = "Leave it open: MLflow is then at http://127.0.0.1:5000, user admin"
  value       = "aws ssm start-session --region ${var.region} --target ${module.tracking.instance_id} --document-name AWS-StartPortForwardingSession --parameters '{\"portNumber\":[\"5000\"],\"localPortNumber\":[\"5000\"]}'"
}

output "tracking_password" {
  description = "The command that prints the password of MLflow's user admin"
  value       = "aws ssm get-parameter --region ${var.region} --with-decryption --name ${module.base.secrets["mlflow-password"].name} --query Parameter.Value --output text"
}

output "submit" {
  description = "Runs the federation on the cluster, through the tunnel"
  value = join(" ", concat(
    ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=\"$(aws ssm get-parameter --region ${var.region} --with-decryption --name ${module.base.secrets["ray-token"].name} --query Parameter.Value --output text)\""],
    ["fedsam", "submit", "federate", "--address", "http://127.0.0.1:8265", "--config", var.config],
    ["work_dir=${var.data_dir}/fedsam", "storage.prepared=s3://${var.bucket}/cohorts", "storage.results=s3://${var.bucket}/results"],
    ["tracking.uri=${module.tracking.uri}"],
    [for override in var.overrides : "'${replace(override, "'", "'\\''")}'"],
  ))
}

output "wake" {
  description = "Starts sites' machines that were stopped when idle; they join by themselves"
  value       = "aws ec2 start-instances --region ${var.region} --instance-ids ${join(" ", [for site in module.site : site.instance_id])}"
}
