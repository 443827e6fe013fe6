"""Training a run: tasks, the loop, devices, processes, and what is recorded.

May import alignment, models, data and runs.
"""
