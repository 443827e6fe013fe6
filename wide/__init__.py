"""What the scripts share: networks, data, training, grids of runs, reports."""


class UserError(Exception):
    """Something the user can mend. The message is one line that says how; scripts print it alone and exit with 2."""
