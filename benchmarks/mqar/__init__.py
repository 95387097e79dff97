"""`python -m benchmarks.mqar`: Mamba layers that recall pairs, cut by every criterion."""
