"""Cohorts, preparation and training slices."""
