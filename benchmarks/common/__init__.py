"""What several benchmarks share beside networks and data."""
