"""The parts of `python -m benchmarks.speed`, one a module."""
