"""One run: what identifies it, and the folder that keeps it.

outputs/<dataset>/<name>/ holds config.json (the identity, and where and with what each session trained), metrics.csv
(a row per epoch, flushed), checkpoint.pt (all that is needed to go on, replaced atomically), the files of recorders
(wide/recorders.py) and, after a failure, error.txt.

The number of epochs is not part of the identity: with a constant learning rate it decides how far a run goes, not what
its numbers are, so a longer experiment goes on where a shorter one stopped, and a shorter one reads its first epochs.
"""

import contextlib
import csv
import dataclasses
import datetime
import errno
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from wide import UserError

try:
    import fcntl
except ImportError:  # Windows: runs work, but two processes must not share one
    fcntl = None

# What flock says on file systems without it, such as Lustre and NFS may be.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run's numbers. Settings at their usual value do not appear in its name."""

    dataset: str
    network: str  # cnn, mlp or rnn
    rule: str
    width: int
    learning_rate: float
    seed: int
    batch_size: int
    data_limit: int | None = None
    optimizer: str = "sgd"
    parameterisation: str = "ntk"
    variant: str | None = None
    precision: str = "fp32"
    timed_on: str | None = None  # the device, for runs whose time is the result
    batches: int = 1  # per step, each normalised by itself
    decay: float = 0.0  # of weights: L2, as torch's optimisers take it
    rule_variant: str | None = None  # of rules that come in several

    @property
    def name(self) -> str:
        words = [self.network, self.rule, f"width{self.width}", f"lr{self.learning_rate:g}", f"seed{self.seed}"]
        words.append(self.batches_name)
        if self.data_limit is not None:
            words.append(f"images{self.data_limit}")
        unusual = {"sgd", "ntk", None, "fp32"}
        words += [
            word
            for word in (self.parameterisation, self.optimizer, self.variant, self.precision, self.rule_variant)
            if word not in unusual
        ]
        if self.decay:
            words.append(f"decay{self.decay:g}")
        if self.timed_on is not None:
            words.append("timed-on-" + "-".join(re.findall(r"\w+", self.timed_on)))
        return "-".join(words)

    @property
    def batches_name(self) -> str:
        return f"batch{self.batch_size}" + (f"x{self.batches}" if self.batches > 1 else "")

    def settings(self) -> dict[str, object]:
        """What describes the run in its config.json and in tables."""
        values = dataclasses.asdict(self)
        return {name: v for name, v in values.items() if name not in _OF_SOME_RULES or v != _USUAL[name]}


# Settings that only some rules have; the others' runs are described without them.
_OF_SOME_RULES = ("decay", "rule_variant")
_USUAL = {field.name: field.default for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING}


def effective_batch(batch_size: int, data_limit: int | None) -> int:
    """The batch size for limited data, so that the data are a whole number of batches (spec: published rule)."""
    if data_limit is None:
        return batch_size
    return data_limit if batch_size > data_limit else math.gcd(batch_size, data_limit)


FINISHED = ("done", "diverged")  # states of a run that need no more training


class Busy(Exception):
    """Another process is training this run."""


class RunFolder:
    """The files of one run. Nothing is created before the run is trained."""

    def __init__(self, outputs: Path, run: Run):
        self.run = run
        self.path = Path(outputs) / run.dataset / run.name
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.csv"
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.error_path = self.path / "error.txt"
        self._read: tuple[tuple | None, tuple[int, bool]] = (None, (0, True))  # see `progress`

    # --- what is there

    def config(self) -> dict:
        """config.json, or an empty dict.

        Raises:
            UserError: it cannot be read.
        """
        if not self.config_path.exists():
            return {}
        try:
            config = json.loads(self.config_path.read_text())
            return {"run": dict(config["run"]), "sessions": list(config["sessions"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(self.config_path, error) from error

    def rows(self) -> list[dict[str, float | None]]:
        """The whole rows of metrics.csv; a last one that was cut off in writing is left out.

        Raises:
            UserError: they are damaged, or not those of epochs 1, 2, 3 and so on.
        """
        if not self.metrics_path.exists():
            return []
        try:
            lines = self.metrics_path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(whole)]
            if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
                raise ValueError("its rows are not those of consecutive epochs")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(self.metrics_path, error) from error
        return rows

    def damaged(self, path: Path, error: Exception) -> UserError:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"{path} is damaged ({what}); delete {self.path} to train that run anew")

    def progress(self) -> tuple[int, bool]:
        """The number of epochs trained, and whether the last one's loss is finite.

        metrics.csv is read only when it has changed, by whatever process: grids ask for this after every run.

        Raises:
            UserError: as for `rows`.
        """
        try:
            stat = self.metrics_path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return 0, True
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)  # taken before reading: what comes later is read later
        if self._read[0] != version:
            rows = self.rows()
            self._read = version, (len(rows), not rows or math.isfinite(rows[-1]["train_loss"]))
        return self._read[1]

    def status(self, epochs: int) -> str:
        """done, diverged, failed (at epoch k), at epoch k, or missing."""
        trained, finite = self.progress()
        if not finite and trained <= epochs:
            return "diverged"
        if trained >= epochs:
            return "done"
        failed = "failed " if self.error_path.exists() else ""
        return f"{failed}at epoch {trained}" if trained or failed else "missing"

    def begun_with_other_batches(self) -> "list[Run]":
        """Runs that differ from this one in the size or number of a step's batches alone, where this was not begun."""
        if self.path.exists():
            return []
        before, _, after = self.run.name.partition(self.run.batches_name)
        pattern = re.compile(re.escape(before) + r"batch(\d+)(?:x(\d+))?" + re.escape(after))
        found = [pattern.fullmatch(path.name) for path in sorted(self.path.parent.glob(f"{before}batch*{after}"))]
        return [
            dataclasses.replace(self.run, batch_size=int(match[1]), batches=int(match[2] or 1))
            for match in found
            if match
        ]

    # --- writing

    @contextlib.contextmanager
    def locked(self):
        """Hold the run for this process; the folder is made where it is missing.

        Raises:
            Busy: another process holds it.
            UserError: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.path):
                file = stack.enter_context(open(self.path / ".lock", "w"))
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise Busy from error
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    note_no_locks(self.path.parents[1])
            yield

    def check(self, fingerprint: str) -> None:
        """
        Raises:
            UserError: the folder holds a run with other settings or other data, or does not say which.
        """
        config, mine = self.config(), _USUAL | self.identity(fingerprint)
        if not config and (self.metrics_path.exists() or self.checkpoint_path.exists()):
            raise self.damaged(self.config_path, FileNotFoundError("it is missing"))
        # A setting that came into use after the run was made had its usual value then.
        theirs = _USUAL | config["run"] if config else mine
        if differing := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
            was = ", ".join(f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}" for key in differing)
            raise UserError(f"{self.path} was trained with {was}; use another --outputs folder or delete it")

    def identity(self, fingerprint: str) -> dict:
        return {**self.run.settings(), "data": fingerprint}

    def begin_session(self, fingerprint: str, device: str, epoch: int) -> None:
        """Record in config.json the session that starts, after this epoch, in a folder that passed `check`.

        Raises:
            UserError: the folder cannot be written.
        """
        session = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_epoch": epoch,
            "device": device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "commit": git_commit(),
        }
        sessions = [*self.config().get("sessions", []), session]
        config = {"run": self.identity(fingerprint), "sessions": sessions}
        with writing(self.path):
            replace(self.config_path, lambda file: file.write(json.dumps(config, indent=2).encode() + b"\n"))
            self.error_path.unlink(missing_ok=True)

    def append(self, row: dict[str, float]) -> None:
        """Add a row to metrics.csv; it is on disk when this returns."""
        append_rows(self.metrics_path, [row])

    def keep(self, epochs: int) -> None:
        """Drop the rows after `epochs`, which no checkpoint covers: they are trained again, to the same numbers.

        Of metrics.csv, and of the files that recorders keep beside it.

        Raises:
            UserError: rows up to there are missing, or a file is damaged.
        """
        if len(self.rows()) < epochs:
            raise self.damaged(self.metrics_path, ValueError(f"rows up to epoch {epochs} are missing"))
        for path in sorted(self.path.glob("*.csv")):
            try:
                keep_rows(path, epochs)
            except ValueError as error:
                raise self.damaged(path, error) from error

    def save(self, checkpoint: dict) -> None:
        replace(self.checkpoint_path, lambda file: torch.save(checkpoint, file))

    def parameters_path(self, epoch: int) -> Path:
        return self.path / "parameters" / f"epoch_{epoch}.pt"

    def kept_epochs(self) -> set[int]:
        """The epochs whose parameters are kept, where the initial ones are too."""
        names = [path.name for path in self.parameters_path(0).parent.glob("epoch_*.pt")]
        epochs = {int(match[1]) for name in names if (match := re.fullmatch(r"epoch_(\d+)\.pt", name))}
        return epochs if 0 in epochs else set()

    def save_parameters(self, epoch: int, parameters: dict[str, torch.Tensor]) -> None:
        path = self.parameters_path(epoch)
        path.parent.mkdir(exist_ok=True)
        replace(path, lambda file: torch.save(parameters, file))

    def load(self, device: torch.device) -> dict | None:
        """The checkpoint, or None where the run has not begun.

        Raises:
            UserError: it cannot be read, or is gone although epochs were trained.
        """
        if not self.checkpoint_path.exists():
            if self.rows():
                raise self.damaged(self.checkpoint_path, FileNotFoundError("it is missing, so the run cannot go on"))
            return None
        try:
            return torch.load(self.checkpoint_path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise self.damaged(self.checkpoint_path, error) from error


@functools.cache
def note_no_locks(outputs: Path) -> None:
    """Once for an outputs folder."""
    print(f"note: {outputs} lies on a file system without locks; start one process at a time there", file=sys.stderr)


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
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); choose another --outputs") from error


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header if it is new; they are on disk when this returns."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def keep_rows(path: Path, epochs: int) -> None:
    """Drop from a CSV file whose first column is the epoch the rows after this one, and what was cut off.

    Raises:
        ValueError: a row whose first column is no number.
    """
    lines = path.read_text().splitlines(keepends=True)
    if not lines or not lines[0].startswith("epoch,"):
        return
    whole = [line for line in lines if line.endswith("\n")]
    kept = whole[:1] + [line for line in whole[1:] if int(line.partition(",")[0]) <= epochs]
    if kept != lines:
        replace(path, lambda file: file.write("".join(kept).encode()))


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Thrift:
    """Says when to save again, so that saving takes at most a twentieth of the time."""

    def __init__(self):
        self.cost = self.last = 0.0

    def due(self) -> bool:
        return time.perf_counter() - self.last >= 20 * self.cost

    @contextlib.contextmanager
    def saving(self):
        start = time.perf_counter()
        yield
        self.last = time.perf_counter()
        self.cost = self.last - start


def pack_stream(stream: np.random.RandomState) -> dict:
    """The state of a NumPy generator, in types that torch.load takes with weights_only=True."""
    kind, keys, position, has_gauss, cached = stream.get_state()
    keys = torch.from_numpy(keys.astype(np.int64))
    return {"kind": kind, "keys": keys, "position": position, "has_gauss": has_gauss, "cached": cached}


def unpack_stream(packed: dict) -> np.random.RandomState:
    stream = np.random.RandomState()
    keys = packed["keys"].cpu().numpy().astype(np.uint32)
    stream.set_state((packed["kind"], keys, packed["position"], packed["has_gauss"], packed["cached"]))
    return stream


def git_commit() -> str | None:
    """The commit of this code, with a plus where files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _number(text: str) -> float | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
