"""Benchmarks: each measures two alternatives side by side in one run and gives their ratio."""
