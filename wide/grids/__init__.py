"""Experiments as asked for: which runs they are, carrying them out, one by one or side by side."""
