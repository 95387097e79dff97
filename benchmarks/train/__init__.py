"""`python -m benchmarks.train`: runs from YAML files; and what every experiment trains alike."""
