"""Plain, well-written training loops in this framework, for comparison in the benchmarks."""
