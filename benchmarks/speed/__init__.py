"""`python -m benchmarks.speed`: every figure about speed and memory, one part a module."""
