"""Files written whole or not at all, temporary files that dead processes left, and errors of the disk in words."""

import contextlib
import csv
import errno
import io
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from wide import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAY = 86400  # seconds; what nobody has touched for so long is nobody's
HOST = re.sub(r"\W", "-", socket.gethostname())[:40]


@contextlib.contextmanager
def writing(folder: Path):
    """Make a folder, for writing into it.

    Raises:
        UserError: it, or what the caller does with it, fails for reasons of the file system.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(not_written(folder, error)) from error


def not_written(folder: Path, error: OSError) -> str:
    """Why nothing can be written to a folder, and what to do, in a line."""
    if error.errno in FULL:
        return (
            f"{folder} cannot be written ({error.strerror}): the file system at {mount_of(folder)} is full, or a quota "
            "is used up; make room there and start the same command again, or choose another --outputs"
        )
    # What stands in the way: replacing a file has its name second.
    named = [Path(name) for name in (error.filename2, error.filename) if isinstance(name, str | os.PathLike)]
    path = named[0] if named and folder in named[0].parents else folder
    return f"{path} cannot be written ({error.strerror or error}); change that, or choose another --outputs"


def mount_of(path: Path) -> Path:
    """Where the file system that holds a path is mounted."""
    path = path.absolute()
    return next((parent for parent in (path, *path.parents) if os.path.ismount(parent)), path)


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header if it is new; they are on disk when this returns.

    Raises:
        UserError: the file has other columns.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with open(path, newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        if columns != list(rows[0]):
            raise UserError(f"{path} has the columns {', '.join(columns)}, not {', '.join(rows[0])}; move it away")
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(csv_text(rows, header=new))
        file.flush()
        os.fsync(file.fileno())


def csv_text(rows: list[dict], header: bool, columns: Sequence[str] = ()) -> str:
    """Rows as the lines of a CSV file, in the first one's columns or in these; empty where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file with their ends; a last one that was cut off in writing is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or a spreadsheet program has saved it anew.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark, as spreadsheet programs write one; save it without")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def keep_rows(path: Path, epochs: int) -> None:
    """Drop from a CSV file whose first column is the epoch the rows after this one, and what was cut off.

    Raises:
        ValueError: a row whose first column is no number.
    """
    header, *rows = whole_lines(path) or [""]
    if header and not header.startswith("epoch,"):
        return
    kept = "".join([header, *(line for line in rows if int(line.partition(",")[0]) <= epochs)])
    if kept != path.read_text(encoding="utf-8"):
        replace_text(path, kept)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8; raises as `replace` does."""
    replace(path, lambda file: file.write(text.encode()))


class _Told:
    """A file that keeps the error of the disk: torch.save hides it behind one of its own."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "wb") as file:
            told = _Told(file)
            try:
                write(told)
            except Exception as error:
                raise told.error or error from None
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a folder may stand in its place: the error on its way says so
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ temporary files


def temporary_name(name: str) -> str:
    """For what this process writes before it is whole. A later one can tell whether its writer lives."""
    return f".{name}.{HOST}.{os.getpid()}.part"


@contextlib.contextmanager
def temporary_folder(within: Path, name: str):
    """A new folder for what is not whole yet; it is gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    path = within / temporary_name(name)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# The other forms are those of earlier versions.
TEMPORARY = re.compile(
    r"\..+\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.part|\..+\.(?:pt|csv|json|md|png)\.\d+|\.(?:download|shapes)-\w+"
)


def sweep(folder: Path, own: bool = False) -> None:
    """Remove temporary files and folders whose writers are gone, as far as that can be told.

    Args:
        own: whether this process alone may write there: then all are removed.
    """
    with contextlib.suppress(OSError):
        for path in _temporary(folder):
            if own or _forsaken(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _temporary(folder: Path) -> Iterable[Path]:
    return [path for path in folder.glob(".*") if TEMPORARY.fullmatch(path.name)]


def _forsaken(path: Path) -> bool:
    match = TEMPORARY.fullmatch(path.name)
    if match["host"] == HOST and not _alive(int(match["pid"])):
        return True
    return time.time() - path.stat().st_mtime > DAY


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
