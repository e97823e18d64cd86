"""What this machine offers: backends, devices, threads."""
