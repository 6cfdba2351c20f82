output "bucket" {
  description = "Name of the bucket: give it to the cluster's root as `bucket`"
  value       = aws_s3_bucket.data.bucket
}

output "key_arn" {
  description = "The key that the bucket's objects are encrypted with"
  value       = aws_kms_key.data.arn
}
