"""Changing a live model: plans as data, all-or-nothing application, optimizers, loading."""
