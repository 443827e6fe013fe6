"""One run: what identifies it, and the folder that keeps it.

outputs/<dataset>/<name>/ holds config.json (the identity, and where and with what each session trained), metrics.csv
(a row per epoch, flushed), checkpoint.pt (all that is needed to go on, replaced atomically), the files of recorders
(wide/recorders.py) and, after a failure, error.txt.

An epoch's row in metrics.csv is its receipt: it is written last, when all else that the epoch owes is on disk. The
checkpoint holds the rows up to its epoch, so that one that lacks its row for being killed in between gets it back.

The number of epochs is not part of the identity: with a constant learning rate it decides how far a run goes, not what
its numbers are, so a longer experiment goes on where a shorter one stopped, and a shorter one reads its first epochs.
"""

import contextlib
import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from wide import UserError
from wide.checkpoints import DIGEST, Unusable, read_sealed, require_finite, sealed
from wide.files import append_rows, csv_text, keep_rows, replace, replace_text, sweep, whole_lines, writing
from wide.locks import Claim

# Of a run's folder: from 2 on its checkpoint says what it belongs to, and one that does not is none of its own.
FORMAT = 2
LONGEST_PATH = 200 if os.name == "nt" else 3900  # characters, or bytes, of a folder's; its files need some more


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
    centred: bool = False  # outputs are f - f0, f0 the function at the initial parameters

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
        if self.centred:
            words.append("centred")
        if self.timed_on is not None:
            words.append("timed-on-" + "-".join(re.findall(r"\w+", self.timed_on)))
        return "-".join(words)

    @property
    def batches_name(self) -> str:
        return f"batch{self.batch_size}" + (f"x{self.batches}" if self.batches > 1 else "")

    def settings(self) -> dict[str, object]:
        """What describes the run in its config.json and in tables."""
        values = dataclasses.asdict(self)
        return {name: v for name, v in values.items() if name not in _OF_SOME_RUNS or v != _USUAL[name]}


# Settings that only some runs have; the others are described without them.
_OF_SOME_RUNS = ("decay", "rule_variant", "centred")
_USUAL = {field.name: field.default for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING}


def effective_batch(batch_size: int, data_limit: int | None) -> int:
    """The batch size for limited data, so that the data are a whole number of batches (spec: published rule)."""
    if data_limit is None:
        return batch_size
    return data_limit if batch_size > data_limit else math.gcd(batch_size, data_limit)


FINISHED = ("done", "diverged")  # states of a run that need no more training


class RunFolder:
    """The files of one run. Nothing is created before the run is trained.

    Raises:
        UserError: its path is too long for this system.
    """

    def __init__(self, outputs: Path, run: Run):
        self.run = run
        self.path = Path(outputs) / run.dataset / run.name
        if len(os.fsencode(run.name)) > 250 or len(os.fsencode(self.path.absolute())) > LONGEST_PATH:
            raise UserError(f"{self.path} is too long a path for this system; choose a shorter --outputs")
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.csv"
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.error_path = self.path / "error.txt"
        self.claim: Claim | None = None  # while this process trains it
        self._read: tuple[tuple | None, tuple[int, bool]] = (None, (0, True))  # see `progress`

    # --- what is there

    def config(self) -> dict:
        """config.json, or an empty dict.

        Raises:
            UserError: it cannot be read, or is another run's.
        """
        if not self.config_path.exists():
            return {}
        try:
            config = json.loads(self.config_path.read_text(encoding="utf-8"))
            run, sessions = dict(config["run"]), list(config["sessions"])
            version = config.get("format", 1)
            if not isinstance(run["data"], str) or not all(isinstance(s["device"], str) for s in sessions):
                raise ValueError("its data or devices are no texts")
            if type(version) is not int or not 1 <= version <= FORMAT:
                raise ValueError(f"its format is {version!r}, this code knows up to {FORMAT}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(self.config_path, error) from error
        if other := differences(self.identity(run["data"]), run):
            raise self.foreign(self.path, other)
        return {"run": run, "sessions": sessions, "format": version}

    def rows(self) -> list[dict[str, float | None]]:
        """The whole rows of metrics.csv; a last one that was cut off in writing is left out.

        Raises:
            UserError: they are damaged, or not those of epochs 1, 2, 3 and so on.
        """
        if not self.metrics_path.exists():
            return []
        try:
            lines = whole_lines(self.metrics_path)
            reader = csv.DictReader(lines, strict=True)
            rows = [{key: _number(value) for key, value in row.items()} for row in reader]
            if len(set(reader.fieldnames or ())) != len(reader.fieldnames or ()):
                raise ValueError("two columns have one name")
            if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
                raise ValueError("its rows are not those of consecutive epochs")
            if not all(isinstance(row["train_loss"], int | float) for row in rows):
                raise ValueError("a row has no train_loss")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise self.damaged(self.metrics_path, error) from error
        return rows

    def damaged(self, path: Path, error: Exception) -> UserError:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        again = f"delete {self.path} to train that run anew"
        if path == self.metrics_path and self.checkpoint_path.exists():
            again = f"delete it, and training goes on with the rows that checkpoint.pt holds, or {again}"
        return UserError(f"{path} is damaged ({what}); {again}")

    def foreign(self, path: Path, was: str) -> UserError:
        return UserError(f"{path} was trained with {was}; use another --outputs folder or delete it")

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
        """Hold the run for this process; the folder is made where it is missing, and rid of what dead processes left.

        Raises:
            Busy: another process holds it.
            UserError: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.path):
                self.claim = stack.enter_context(Claim(self.path).held())
            sweep(self.path, own=True)
            sweep(self.parameters_path(0).parent, own=True)
            yield

    def require_claim(self) -> None:
        """Raise UserError where another process has taken the run over."""
        if self.claim is not None and self.claim.lost:
            raise UserError(
                f"{self.path} was taken over by another process, since this one gave no sign of life for minutes "
                "(suspended, or cut off from its files); it is left to that process"
            )

    def check(self, fingerprint: str) -> None:
        """
        Raises:
            UserError: the folder holds a run with other settings or other data, or does not say which.
        """
        config = self.config()
        if not config and (self.metrics_path.exists() or self.checkpoint_path.exists()):
            raise self.damaged(self.config_path, FileNotFoundError("it is missing"))
        if config and (was := differences(self.identity(fingerprint), config["run"])):
            raise self.foreign(self.path, was)

    def require_checkpoint(self) -> None:
        """Raise UserError for a run that was kept without what it would go on from (results/)."""
        if self.checkpoint_path.exists():
            return
        epochs, _ = self.progress()
        if epochs:
            raise UserError(
                f"{self.path} ends at epoch {epochs} and has no checkpoint.pt to go on from; use another --outputs "
                "folder, or --report for what is there, or delete it to train that run anew"
            )

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
        if torch.are_deterministic_algorithms_enabled():
            session["deterministic"] = True
        sessions = [*self.config().get("sessions", []), session]
        config = {"format": FORMAT, "run": self.identity(fingerprint), "sessions": sessions}
        with writing(self.path):
            replace_text(self.config_path, json.dumps(config, indent=2) + "\n")
            self.error_path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row to metrics.csv, when all else that its epoch owes is written; it is on disk when this returns.

        Raises:
            UserError: it cannot be written, or has other columns than the rows before.
        """
        with writing(self.path):
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
            except (OSError, ValueError) as error:
                raise self.damaged(path, error) from error

    def save(self, checkpoint: Mapping[str, object], row: Mapping[str, float | None] | None = None) -> None:
        """Replace the checkpoint, in a folder whose session has begun.

        Args:
            row: of its epoch, which is to be added to metrics.csv next.

        Raises:
            UserError: it cannot be written.
        """
        before = "".join(whole_lines(self.metrics_path)) if self.metrics_path.exists() else ""
        metrics = before + (csv_text([row], header=not before) if row else "")
        content = sealed({"run": self.config()["run"], "metrics": metrics, **checkpoint})
        with writing(self.path):
            replace(self.checkpoint_path, lambda file: torch.save(content, file))

    def parameters_path(self, epoch: int) -> Path:
        return self.path / "parameters" / f"epoch_{epoch}.pt"

    def kept_epochs(self) -> set[int]:
        """The epochs whose parameters are kept, where the initial ones are too; of a run that goes on, those it has."""
        names = [path.name for path in self.parameters_path(0).parent.glob("epoch_*.pt")]
        epochs = {int(match[1]) for name in names if (match := re.fullmatch(r"epoch_(\d+)\.pt", name))}
        if self.checkpoint_path.exists():  # what a kill before an epoch's row left is written again
            trained, _ = self.progress()
            epochs = {epoch for epoch in epochs if epoch <= trained}
        return epochs if 0 in epochs else set()

    def save_parameters(self, epoch: int, parameters: dict[str, torch.Tensor]) -> None:
        """In a folder whose session has begun. UserError: they cannot be written."""
        content = sealed({"run": self.config()["run"], "epoch": epoch, "parameters": parameters})
        path = self.parameters_path(epoch)
        with writing(path.parent):
            replace(path, lambda file: torch.save(content, file))

    def load(self, device: torch.device) -> dict | None:
        """The checkpoint, or None where the run has not begun. Rows that it holds and metrics.csv lacks are put there.

        Raises:
            UserError: it cannot be read, or has changed since it was written, or belongs to another run, or does not
                agree with metrics.csv, or is gone although epochs were trained.
        """
        self.require_checkpoint()
        if not self.checkpoint_path.exists():
            return None
        try:
            checkpoint = read_sealed(self.checkpoint_path, device)
            self._require_own(checkpoint)
            if type(epoch := checkpoint.get("epoch")) is not int or epoch < 0:
                raise Unusable(f"its epoch is {epoch!r}")
            if checkpoint[DIGEST] is None and not self._diverged_at(epoch):
                require_finite(checkpoint["rule"])
        except (Unusable, KeyError, AttributeError) as error:
            raise self.damaged(self.checkpoint_path, error) from error
        self._complete(checkpoint)
        return checkpoint

    def _require_own(self, checkpoint: dict) -> None:
        """Raise Unusable for a checkpoint of another run, or one that does not say whose it is where it should."""
        if checkpoint[DIGEST] is None:
            if self.config().get("format", 1) >= FORMAT:
                raise Unusable("it does not say which run it belongs to")
        elif was := differences(self.config()["run"], checkpoint["run"]):
            raise Unusable(f"it belongs to another run, with {was}")

    def _diverged_at(self, epoch: int) -> bool:
        rows = self.rows()[:epoch]
        return bool(rows) and not math.isfinite(rows[-1]["train_loss"])

    def _complete(self, checkpoint: dict) -> None:
        """Give metrics.csv the row that a process killed after the checkpoint did not write, or all where it is gone.

        Raises:
            UserError: its rows are not those that the checkpoint was saved with.
        """
        if (text := checkpoint.get("metrics")) is None:  # of an earlier version
            return
        exists, epoch = self.metrics_path.exists(), checkpoint["epoch"]
        try:
            lines, held = whole_lines(self.metrics_path) if exists else [], text.splitlines(keepends=True)
            if len(held) != (epoch + 1 if epoch else 0):
                raise ValueError(f"checkpoint.pt is of epoch {epoch}, but has {max(len(held) - 1, 0)} rows")
            if lines[: len(held)] == held:
                return
            if lines != held[: len(lines)]:
                raise ValueError("its rows are not those that checkpoint.pt was saved with")
            if exists and max(len(lines) - 1, 0) < epoch - 1:
                raise ValueError(f"rows up to epoch {epoch} are missing")
        except (OSError, ValueError, AttributeError) as error:
            raise self.damaged(self.metrics_path, error) from error
        with writing(self.path):
            replace_text(self.metrics_path, text)


def _same(mine: object, theirs: object) -> bool:
    """Whether two settings are equal; what is no setting, such as a tensor in a file of another program, is not."""
    return isinstance(theirs, str | int | float | None) and mine == theirs


def differences(mine: Mapping[str, object], theirs: object) -> str:
    """In words, where another identity of a run differs from this one; empty where it does not."""
    if not isinstance(theirs, Mapping):
        return "no settings"
    # A setting that came into use after a run was made had its usual value then.
    mine, theirs = _USUAL | mine, _USUAL | theirs
    differing = sorted(key for key in mine.keys() | theirs.keys() if not _same(mine.get(key), theirs.get(key)))
    return ", ".join(f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}" for key in differing)


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


def git_commit() -> str | None:
    """The commit of this code, with a plus where files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


# As Python writes them; it would also read 1_0 and digits of other scripts.
_INTEGER, _REAL = re.compile(r"-?[0-9]+"), re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|nan|-?inf")


def _number(text: str) -> float | None:
    if not text:
        if text is None:
            raise ValueError("a row is cut off")
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _REAL.fullmatch(text):
        raise ValueError(f"{text[:20]!r} is no number")
    return float(text)
