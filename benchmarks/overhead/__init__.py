"""What the callback costs a training run, in every step and where it reduces."""
