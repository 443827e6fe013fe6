"""Training one run of a grid: how it went, in a line, and how long the others will take."""

import contextlib
import dataclasses
import sys
import traceback

from tqdm import tqdm

from wide import UserError
from wide.grids.pace import Pace, counted
from wide.grids.study import Study
from wide.runs.folder import FINISHED, RunFolder
from wide.runs.locks import Busy
from wide.training.devices import choose_threads
from wide.training.learner import Learner
from wide.training.recorders import Recorder
from wide.training.session import Schedule, train, warm_up
from wide.training.tasks import Task

EXPLODED = 10  # times its lowest value, in a run that is done
Failures = list[tuple[RunFolder, str]]  # runs that are not finished, with the reason


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the training of a run went.

    Args:
        message: a line that says it.
        reason: if the run is not finished, why.
        busy: another process is training it.
    """

    message: str
    reason: str | None = None
    busy: bool = False


def train_one(study: Study, task: Task, folder: RunFolder, progress: "Progress | None" = None) -> Outcome:
    """Train one run; an error is part of the outcome, and its traceback of the run's folder."""
    name = folder.run.name
    try:
        folder.require_checkpoint()
    except UserError as error:  # nothing is written into what was kept
        return Outcome(f"{name}: failed: {error}", str(error))
    if not study.options.parallel:  # a worker has its threads
        choose_threads(folder.run, study.options.threads)
    try:
        if study.experiment.timed:
            warm_up(task, folder.run)
        if progress:
            progress.pace.start()
        recorders = [*study.recorders(), *([progress] if progress else [])]
        schedule = Schedule(study.epochs, study.options.record.evaluate_every)
        train(task, folder, schedule, recorders, study.processes)
        if (status := folder.status(study.epochs)) not in FINISHED:
            return Outcome(f"{name}: {status}", status)
        return Outcome(summary_line(folder, study.epochs))
    except Busy:
        return Outcome(f"{name}: left to the process that is training it", "another process is training it", busy=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not stop the runs that follow
            folder.error_path.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(f"{name}: failed: {first_line(error)}", f"{first_line(error)}; see {folder.error_path}")


class Progress(Recorder):
    """Says, once there is something to judge by, how long the runs that are missing will take."""

    def __init__(self, study: Study, pace: Pace, missing: list[RunFolder]):
        self.study, self.pace, self.missing = study, pace, missing
        self.announced = False

    def epoch(self, learner: Learner, folder: RunFolder) -> None:
        self.pace.epoch(folder.run)
        left = self.missing[self.missing.index(folder) :]
        if self.pace.seen and not self.announced and len(left) > 1:
            say(f"{self.pace.text(self.pace.left(left), left)}, judging by the first epochs")
            self.announced = True

    def rest(self, folder: RunFolder) -> str:
        """In words, what is left behind this run."""
        following = self.missing[self.missing.index(folder) + 1 :]
        rest = [other for other in following if other.status(self.study.epochs) not in FINISHED]
        if not rest or not self.pace.seen:
            return ""
        return f"  [{counted(len(rest), 'run')}, {self.pace.text(self.pace.left(rest), rest)}]"


def say(message: str) -> None:
    """Print a line above whatever bars there are."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error).strip().splitlines()
    return (text[0] if isinstance(error, UserError) else f"{type(error).__name__}: {text[0]}") if text else repr(error)


def summary_line(folder: RunFolder, epochs: int) -> str:
    """How a finished run went."""
    rows = folder.rows()
    metrics = {name: value for name, value in rows[-1].items() if name.endswith(("loss", "accuracy"))}
    shown = "  ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in metrics.items() if v is not None)
    seconds = sum(row["seconds"] for row in rows)
    state = f"{folder.status(epochs)} at epoch {len(rows)}"
    if rows[-1]["train_loss"] > EXPLODED * min(row["train_loss"] for row in rows):
        state += ", though its loss has exploded"
    return f"{folder.run.name}: {state}, {seconds:.1f} s  {shown}"
