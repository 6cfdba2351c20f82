variable "name" {
  description = "Name of the cluster"
  type        = string
}

variable "cidr" {
  description = "The network's addresses"
  type        = string

  validation {
    condition     = can(cidrnetmask(var.cidr)) && try(tonumber(split("/", var.cidr)[1]) >= 16 && tonumber(split("/", var.cidr)[1]) <= 22, false)
    error_message = "cidr: an IPv4 range such as 10.20.0.0/16, between /16 and /22."
  }
}

variable "zones" {
  description = "Availability zones; the head is in the first"
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 1 && length(var.zones) <= 8 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones: one to eight availability zones, each once."
  }
}

variable "kinds" {
  description = "Kinds of machines that there are: no port is opened for others"
  type        = set(string)
  default     = ["head", "site", "tracking", "database"]

  validation {
    condition     = length(setsubtract(var.kinds, ["head", "site", "tracking", "database"])) == 0
    error_message = "kinds: of head, site, tracking and database."
  }
}
