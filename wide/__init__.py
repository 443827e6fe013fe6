"""What the scripts share: networks, data, training, grids of runs, reports."""

import os
import sys

# Before torch is imported: threads that wait for each other sleep, so that commands side by side do not slow each other
# down by more than their number.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class UserError(Exception):
    """Something the user can mend. The message is one line that says how; scripts print it alone and exit with 2."""


def show_uncaught(kind, error, traceback) -> None:
    """Ctrl-C in one line, wherever it comes: importing torch takes seconds. Python then exits with status 130."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def install_excepthook() -> None:
    """Show uncaught errors so in this process; for scripts to call when they are run, before they import torch."""
    sys.excepthook = show_uncaught
