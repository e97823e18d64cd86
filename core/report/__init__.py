"""What people read about runs: one HTML page, tables, charts, and a spec in words."""
