"""A whole model: its SSM layers, and changing, copying, loading and keeping all of it at once."""
