"""What is shown of runs: tables, figures, texts, and the paper's claims.

May import training, alignment, models and runs.
"""
