"""Printing is not the work: where output ends early, what follows is left out, and that is said once.

A pipe whose reader has gone (`| head -1`), a log on a full disk, and no standard output at all.
"""

import contextlib
import io
import os
import sys


@contextlib.contextmanager
def lasting():
    """Within, nothing that cannot be printed is an error, nor is it afterwards, when Python ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream or _nowhere()) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that takes what it is given, whether or not it can be printed."""

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that takes ASCII only gets ? for what it lacks

    def write(self, text: str) -> int:
        return self._tried(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, print_, *arguments):
        try:
            return print_(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            nowhere = _nowhere()
            with contextlib.suppress(OSError, ValueError):  # what its buffer holds goes there, too
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere
            if self is sys.stdout:
                reason = getattr(error, "strerror", None) or error
                print(f"nothing more can be printed ({reason}); the work goes on", file=sys.stderr, flush=True)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def _nowhere():
    return open(os.devnull, "w", encoding="utf-8")
