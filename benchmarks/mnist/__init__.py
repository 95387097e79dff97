"""The published experiment on sequential MNIST, all arms by one command."""
