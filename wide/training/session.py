"""A session of a run: from its checkpoint, or its start, as far as is asked for; by one process or by several."""

import contextlib
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from align_rules import Rule
from wide import UserError
from wide.runs.checkpoints import DIGEST, Unusable
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.devices import device_name, memory_for
from wide.training.loop import Training
from wide.training.processes import ALONE, Processes
from wide.training.recorders import Recorder
from wide.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is trained, and when it is evaluated: after every so many epochs, and after the last.

    Where it is not, the row of metrics.csv has no values for what is measured then.
    """

    epochs: int
    evaluate_every: int = 1

    def evaluates(self, epoch: int) -> bool:
        return epoch % self.evaluate_every == 0 or epoch == self.epochs


def train(
    task: Task,
    folder: RunFolder,
    schedule: Schedule | int,
    recorders: Sequence[Recorder] = (),
    processes: Processes = ALONE,
) -> None:
    """Train a run, from its checkpoint where it has one; keep a row and a checkpoint of each epoch.

    Stops early at a loss that is not finite: the run's status is then "diverged".

    Args:
        schedule: or the number of epochs, each of which is evaluated.
        recorders: what is recorded beside the metrics, of every epoch that is trained here.
        processes: those that train together. The first calls `train`, the others are in `train_as_worker`.

    Raises:
        UserError: the folder cannot be used (see RunFolder).
        Busy: another process trains this run.
    """
    schedule = Schedule(schedule) if isinstance(schedule, int) else schedule
    with folder.locked(), memory_for(folder.run, task.device):
        folder.check(task.fingerprint)
        training = Training(task, folder.run, processes, recorders)
        _start(training, folder)
        if folder.progress()[1]:
            several = processes.count > 1
            work = Work(folder.run, task.fingerprint, schedule, _packed(training.state())) if several else None
            with processes.working(work):
                _train_epochs(training, folder, schedule)


def restore(training: Training, folder: RunFolder, checkpoint: dict) -> None:
    """Go on from a folder's checkpoint.

    Raises:
        UserError: it is none of this run.
    """
    try:
        training.restore(checkpoint)
    except (Unusable, ValueError, TypeError) as error:
        raise folder.damaged(folder.checkpoint_path, error) from error


def _start(training: Training, folder: RunFolder) -> None:
    """Go on from the run's checkpoint; without one, write the first."""
    device, count = training.task.device, training.processes.count
    if (checkpoint := folder.load(device)) is not None:
        restore(training, folder, checkpoint)
    folder.keep(training.epoch)
    if checkpoint is not None and checkpoint[DIGEST] is None:
        folder.save(training.state())  # of an earlier version: from now on it says whose it is
    where = device_name(device) + (f", {count} processes" if count > 1 else "")
    where += ", compiled" if Rule.compiler else ""
    folder.begin_session(training.task.fingerprint, where, training.epoch)
    if checkpoint is None:
        # Before the checkpoint: a run killed between the two would not come back here.
        for recorder in training.recorders:
            recorder.start(training, folder)
        folder.save(training.state())


def _train_epochs(training: Training, folder: RunFolder, schedule: Schedule) -> None:
    thrift, first, epochs = Thrift(), training.epoch, schedule.epochs
    with tqdm(None, folder.run.name, epochs, initial=first, unit="epoch", leave=False, disable=None, position=1) as bar:
        while training.epoch < epochs:
            row = training.train_epoch(schedule.evaluates(training.epoch + 1))
            finite = math.isfinite(row["train_loss"])
            for recorder in training.recorders:
                row |= recorder.columns(training)
            folder.require_claim()
            for recorder in training.recorders:
                recorder.epoch(training, folder)
            if thrift.due() or training.epoch == epochs or not finite:
                with thrift.saving():
                    folder.save(training.state(), row)
            folder.append(row)  # last: it says that all else is there
            bar.update()
            if not finite:
                break


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


@dataclasses.dataclass(frozen=True)
class Work:
    """What the first process has the others train with it: a run from a checkpoint's state.

    Before any, PREPARE has them read the data, while it does so itself.
    """

    run: Run
    fingerprint: str
    schedule: Schedule
    state: bytes


PREPARE = "prepare"


def train_as_worker(processes: Processes, make_task: Callable[[], Task]) -> None:
    """Train with the first process what it trains, until it sends None.

    Raises:
        UserError: the data are missing here, or are others.
    """
    task = None
    while (work := processes.receive()) is not None:
        task = task or make_task()
        if work == PREPARE:
            continue
        if task.fingerprint != work.fingerprint:
            raise UserError(f"process {processes.rank} finds the data {task.fingerprint}, the first {work.fingerprint}")
        training = Training(task, work.run, processes)
        training.restore(torch.load(io.BytesIO(work.state), map_location=task.device, weights_only=True))
        while training.epoch < work.schedule.epochs:
            row = training.train_epoch(work.schedule.evaluates(training.epoch + 1))
            if not math.isfinite(row["train_loss"]):
                break
    processes.gather(None)  # see Processes.dismiss


def _packed(state: dict) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def warm_up(task: Task, run: Run, steps: int = 10) -> None:
    """Some steps of a training that is thrown away, so that a timed one does not pay for what happens only once."""
    with memory_for(run, task.device):
        for _ in itertools.islice(Training(task, run).steps(), steps):
            pass
