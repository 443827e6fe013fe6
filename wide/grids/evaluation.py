"""--evaluate: what finished runs' metrics.csv says of their networks, measured anew on the data at hand.

A run's checkpoint, or else the last parameters that it kept, is the network of one epoch. All that was evaluated after
that epoch is evaluated again: the splits, and the alignment scores of a pair. Normalisation is over the batch, so the
batches must be the same: their order comes from the run's stream, which is replayed from its seed, without training.
(What is averaged over an epoch's training, such as an image run's train_loss, cannot be measured afterwards.)

On the machine and with the number of threads of the training the numbers are the same to the last bit. Elsewhere sums
are rounded otherwise, so a recorded number agrees within TOLERANCES.
"""

import dataclasses
import math

import numpy as np
from tqdm import tqdm

from wide import UserError
from wide.alignment.parameters import kept_parameters
from wide.grids.pace import counted
from wide.grids.study import Study
from wide.runs.folder import RunFolder
from wide.training.loop import Training
from wide.training.session import restore
from wide.training.tasks import Task

# By the end of a metric's name: of accuracies, in shares, and scores the difference; of losses the relative one.
TOLERANCES = {"accuracy": 0.001, "loss": 1e-3, "score": 1e-3, "control": 1e-3}
COARSER = {"tf32": 10, "bf16": 10}  # times as much, in these precisions


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A number of metrics.csv and the one measured anew."""

    metric: str
    recorded: float
    measured: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        tolerance = "rel_tol" if self.metric.endswith("loss") else "abs_tol"
        allowed = {"rel_tol": 0, tolerance: self.tolerance}
        both_nan = math.isnan(self.recorded) and math.isnan(self.measured)
        return both_nan or math.isclose(self.recorded, self.measured, **allowed)

    @property
    def text(self) -> str:
        verdict = "agrees" if self.agrees else "DIFFERS"
        return f"{verdict} exactly" if self.recorded == self.measured else verdict


def evaluate(study: Study) -> list[tuple[RunFolder, str]]:
    """Print a table of every run of the grid; return those whose metrics.csv differs, with the reason.

    Raises:
        UserError: several processes; no run of the grid can be measured; missing data.
    """
    if study.processes.count > 1:
        raise UserError("--evaluate is for one process")
    kept = {folder for folder in study.folders if keeps_any(folder)}
    if not kept:
        raise UserError(
            f"none of {counted(len(study.folders), 'run')} has a checkpoint or kept parameters in {study.outputs}; "
            "choose others by the options of the grid, or another --outputs"
        )
    task, failures = study.task(), []
    print("| run | epoch | metric | recorded | measured | |\n|---|---|---|---|---|---|")
    for folder in tqdm(study.folders, "runs", unit="run", leave=False, disable=None):
        if folder not in kept:
            state = folder.status(study.epochs)
            tqdm.write(f"| {folder.run.name} | - | - | - | - | {'missing' if state == 'missing' else 'not kept'} |")
            continue
        try:
            reason = _evaluate_one(study, task, folder)
        except UserError as error:  # of this run's files: the others are measured all the same
            reason = str(error)
        if reason:
            failures.append((folder, reason))
    print(f"{len(kept)} of {counted(len(study.folders), 'run')} measured, {len(failures)} of them not as recorded")
    return failures


def keeps_any(folder: RunFolder) -> bool:
    """Whether a run kept parameters other than the initial ones."""
    return folder.checkpoint_path.exists() or max(folder.kept_epochs(), default=0) > 0


def _evaluate_one(study: Study, task: Task, folder: RunFolder) -> str | None:
    """Print a run's lines; return what differs."""
    comparisons, epoch = compare(study, task, folder)
    trained_on = folder.config().get("run", {}).get("data")
    same = trained_on == task.fingerprint
    if not comparisons:
        return f"nothing was measured after epoch {epoch}, whose parameters it keeps"
    verdict = "" if same else f"other data ({task.fingerprint}, not {trained_on}): no verdict"
    for c in comparisons:
        numbers = f"{c.recorded:.6g} | {c.measured:.6g}"
        tqdm.write(f"| {folder.run.name} | {epoch} | {c.metric} | {numbers} | {verdict or c.text} |")
    missed = [c.metric for c in comparisons if not c.agrees]
    if same and missed:
        return f"measured again at epoch {epoch}, it differs from metrics.csv in {', '.join(missed)}"
    return None


def compare(study: Study, task: Task, folder: RunFolder) -> tuple[list[Comparison], int]:
    """Everything of metrics.csv that can be measured anew from what the run kept, and the epoch that this is of.

    Raises:
        UserError: a file is damaged, or the run does not fit the data.
    """
    task.check(folder.run)
    training = restored(task, folder)
    rows = folder.rows()
    if len(rows) < training.epoch:
        raise folder.damaged(folder.metrics_path, ValueError(f"rows up to epoch {training.epoch} are missing"))
    recorded = rows[training.epoch - 1]
    replay(training)
    measured = training.evaluations()
    for recorder in study.recorders():
        measured |= recorder.columns(training)
    tolerances = {end: value * COARSER.get(folder.run.precision, 1) for end, value in TOLERANCES.items()}
    return [
        Comparison(name, recorded[name], value, tolerances[_kind(name)])
        for name, value in measured.items()
        if recorded.get(name) is not None and value is not None and _kind(name)
    ], training.epoch


def _kind(metric: str) -> str | None:
    """Which tolerance a metric has: by its last word, or of score_<k> and control_<k> the first."""
    words = metric.split("_")
    return next((word for word in (words[-1], words[0]) if word in TOLERANCES), None)


def restored(task: Task, folder: RunFolder) -> Training:
    """The run's training, as it stood at the epoch that the run kept."""
    training = Training(task, folder.run)
    if folder.checkpoint_path.exists():
        restore(training, folder, folder.load(task.device))
        return training
    training.epoch = max(folder.kept_epochs())
    path = folder.parameters_path(training.epoch)
    kept, parameters = kept_parameters(folder, training.epoch).tensors, training.parameters()
    if kept.keys() != parameters.keys():
        raise folder.damaged(path, ValueError("it holds other parameters than the run's"))
    for name, parameter in parameters.items():
        parameter.copy_(kept[name])
    return training


def replay(training: Training) -> None:
    """Bring the stream to where the evaluations of the current epoch begin: from the seed, without training."""
    task, run = training.task, training.run
    streamed = [evaluation.split for evaluation in task.evaluations if evaluation.streamed]
    training.stream = np.random.RandomState(run.seed)
    for epoch in range(1, training.epoch + 1):
        for split in ["train"] if epoch == training.epoch else ["train", *streamed]:
            training.stream.permutation(task.size(run, split))
