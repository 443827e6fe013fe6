"""What is studied, the runs of it that are kept in results/, and what they say of the paper's claims.

May import command_line, grids, reports, training, data, models and runs.
"""
