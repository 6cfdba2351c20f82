"""One site's share of a round: the loss, the schedule and the learner that stays resident at the site."""
