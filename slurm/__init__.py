"""Data: the batch script's template, cluster profiles, the script of the test cluster. No code."""
