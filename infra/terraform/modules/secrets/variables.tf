variable "folder" {
  description = "What the parameters' names begin with"
  type        = string
}

variable "secrets" {
  description = "Secrets to make: name to description"
  type        = map(string)
}

variable "secrets_version" {
  description = "Raise it to make new secrets; null: parameters of these names are there already"
  type        = number
}
