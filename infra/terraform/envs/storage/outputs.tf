output "bucket" {
  description = "Name of the bucket: give it to the cluster's root as `bucket`"
  value       = module.storage.bucket
}
