"""Claims: a run belongs to one process at a time, on this machine and on others.

Two marks stand for a claim. A lock of the system (flock), where there is one: it ends with its process, whatever
becomes of that. And a lease, a file that its holder refreshes, for machines whose locks hold on one only (Lustre with
localflock) or that have none (Windows, Lustre, NFS without lockd). The lease is filelock's SoftFileLease, which
torch brings along: made exclusively, with host, process and its start; taken over at once from a process of this
machine that is gone, and from one of another machine when it has stood unchanged for its whole length.
"""

import contextlib
import errno
import math
import os
import socket
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What flock says on file systems without it.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LEASE = 120.0  # seconds without a heartbeat after which another machine may take over; all must agree on it
HEARTBEAT = 20.0
NAMING = 3.0  # seconds that a claim may take to be written
LOCK, CLAIM = ".lock", ".claim"


class Busy(Exception):
    """Another process has the run."""


class Claim:
    """A folder that belongs to this process while `held`."""

    def __init__(self, folder: Path):
        self.lock_path, self.path = folder / LOCK, folder / CLAIM
        self.lease = SoftFileLease(self.path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT)

    @property
    def lost(self) -> bool:
        """Whether another process has taken it over, since this one gave no sign of life for the length of a lease."""
        return self.lease.compromise is not None

    @contextlib.contextmanager
    def held(self):
        """
        Raises:
            Busy: another process holds it.
            OSError: the folder cannot be written.
        """
        with open(self.lock_path, "w") as file:
            locked = _lock(file)
            try:
                if locked:
                    self._drop_dead()
                self._take()
                self._tidy()
                yield self
            finally:
                with contextlib.suppress(OSError, RuntimeError):  # lost meanwhile, or the folder is gone
                    self.lease.release()

    def _take(self) -> None:
        for _ in range(2):  # taking over from the dead may need the second
            with contextlib.suppress(Timeout):
                self._drop_nameless()
                self.lease.acquire(timeout=0)
                return
        if not self._silent():
            raise Busy
        try:  # filelock trusts no clock but its own: it takes over what it has seen unchanged for a whole lease
            self.lease.acquire(timeout=2 * LEASE, poll_interval=1, cancel_check=lambda: not self._silent())
        except Timeout as error:
            raise Busy from error

    def _drop_dead(self) -> None:
        """Remove the claim of a process of this machine that has ended, though its parent has not taken note of it (in
        a container without an init); filelock takes such a one for alive."""
        with contextlib.suppress(OSError, KeyError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
            claim = dict(line.split("=", 1) for line in lines if "=" in line)
            state = Path(f"/proc/{claim['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            if claim["host"] == socket.gethostname() and state == "Z":
                self.path.unlink()

    def _silent(self) -> bool:
        """Whether the claim that stands there has had no heartbeat for a lease."""
        return self._age() > LEASE

    def _age(self) -> float:
        """Seconds since the heartbeat of the claim that stands there, by the file system's own clock."""
        os.utime(self.lock_path)
        try:
            return self.lock_path.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return math.inf

    def _drop_nameless(self) -> None:
        """Remove a claim whose maker died before it wrote who it is; filelock, which cannot tell, would keep it."""
        watched_from = time.monotonic()
        while self._nameless():
            if max(self._age(), time.monotonic() - watched_from) > NAMING:
                self.path.unlink(missing_ok=True)
            time.sleep(0.05)

    def _nameless(self) -> bool:
        with contextlib.suppress(OSError):
            return self.path.stat().st_size == 0
        return False

    def _tidy(self) -> None:
        """Remove what a process left that died while it took over."""
        now = self.path.stat().st_mtime
        for path in self.path.parent.glob(f"{CLAIM}.*"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > LEASE:
                    path.unlink()


def _lock(file) -> bool:
    """Lock an open file for this process, and whether the system can; Busy where another has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
