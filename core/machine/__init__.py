"""What a run can use of this machine: backends, devices, threads, memory."""
