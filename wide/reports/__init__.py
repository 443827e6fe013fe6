"""What is shown of runs: tables, figures and texts.

May import training, alignment, models and runs.
"""
