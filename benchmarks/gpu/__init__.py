"""What a machine with a CUDA device has to show, by one command; docs/gpu.md is about it."""
