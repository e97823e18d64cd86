"""Plain, well-written loops of this framework that the benchmarks measure against."""
