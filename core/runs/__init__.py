"""The run directory: what is written and what is read back."""
