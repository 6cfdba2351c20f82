region             = "eu-central-1"
zones              = ["eu-central-1a", "eu-central-1b"]
name               = "kidneys"
bucket             = "kidneys-consortium"
image              = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/fedsam:0.1.0-cuda"
alarm_email        = "ops@hospital.example"
monthly_budget_usd = 500

# The ids as they stand in the cohort; site-a, site-b, site-c are those of the synthetic cohort of `--config demo`.
sites = {
  site-a = {}
  site-b = { spot = true }
  site-c = { instance_type = "g6.xlarge", zone = "eu-central-1b", prefix = "sites/c" }
}
