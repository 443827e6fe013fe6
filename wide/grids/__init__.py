"""Experiments as they are asked for: which runs they are, and carrying them out, in turn or side by side.

May import reports, training, alignment, models and runs.
"""
