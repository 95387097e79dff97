"""`python -m benchmarks.compare`: all ways to a small model, side by side."""
