"""Ray actors, placement, object storage, experiment tracking and jobs: everything between the science and a cluster."""
