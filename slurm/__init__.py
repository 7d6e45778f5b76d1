"""Runs on a Slurm cluster: submission, the batch script, checks of the nodes, status, logs and control."""
