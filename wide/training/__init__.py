"""Training a run: the loop, tasks, devices, processes, and what is recorded."""
