"""`python -m benchmarks.demo`: a digits classifier at full size, compressed and small."""
