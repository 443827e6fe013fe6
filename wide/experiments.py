"""Grids of runs: what an experiment is, which runs it consists of, and training those that are missing."""

import argparse
import contextlib
import dataclasses
import itertools
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from wide import UserError
from wide.pace import Pace, duration
from wide.processes import ALONE, Processes
from wide.rules import RULES
from wide.runs import Busy, Run, RunFolder, effective_batch, writing
from wide.tables import Metrics, View
from wide.tasks import Task
from wide.training import PREPARE, train, warm_up

PAPER_SEED = 99
FINISHED = ("done", "diverged")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of runs, every combination of its axes, and the question it answers.

    Args:
        title: what it shows, for --help and, after the subject's, as the caption of table and figure.
        view: what the table's columns are, what is chosen and what is averaged, and the figure.
        metrics: which metrics are shown; default: the subject's.
        beside: another experiment and some of its rules, whose finished runs are shown for comparison.
        timed: measure the time of an epoch: every run comes after a warm-up, and belongs to the device.
        keep: epochs whose parameters are kept.
        log_alignment: keep the angles between the rule's gradients and backprop's, per epoch and layer, in angles.csv.
        scored_last: whether the report is of the scores after the last epoch.
        reporter: writes the report in place of the table of rules: (path without suffix, experiment, folders, parsed
            arguments) -> text. Its grid has one data limit.
        batch_size: default: the subject's.
        quick: the settings that --quick replaces.
    """

    title: str
    rules: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    epochs: int
    seeds: tuple[int, ...] = (PAPER_SEED,)
    data_limits: tuple[int | None, ...] = (None,)
    batch_size: int | None = None
    optimizer: str = "sgd"
    parameterisation: str = "ntk"
    view: View = dataclasses.field(default_factory=View)
    metrics: Metrics | None = None
    beside: tuple[int, tuple[str, ...]] | None = None
    timed: bool = False
    keep: tuple[int, ...] = ()
    log_alignment: bool = False
    scored_last: bool = False
    reporter: "Callable[[Path, Experiment, list[RunFolder], argparse.Namespace], str] | None" = None
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a script's experiments are about.

    Args:
        dataset: the name of its folder in outputs/.
        title: its name, for people.
        task: makes the Task from the parsed arguments and a device; reads the data.
        networks: choices of --network; the first is the default.
        batch_size: default.
        metrics: the metrics that tables and figures show.
        examples: number of training examples in the full dataset.
        axes: the axes of the grid that the command line can replace.
        stem: what names of reports begin with.
        scores: whether alignment scores are measured, and their options make sense.
        variants: choices of --variant; the first is the default.
        references: metrics to compare with, by name, from the parsed arguments.
        data_dir: default.
        from_disk: whether images are read from files while training, in one process or several.
        quick: what --quick replaces here.
    """

    dataset: str
    title: str
    task: Callable[[argparse.Namespace, torch.device], Task]
    networks: tuple[str, ...]
    batch_size: int
    metrics: Metrics
    examples: int
    axes: tuple[str, ...] = ("rules", "widths", "learning_rates", "seeds", "data_limits")
    stem: str = "experiment"
    scores: bool = False
    variants: tuple[str, ...] = ()
    references: Callable[[argparse.Namespace], dict[str, dict[str, float]]] = lambda arguments: {}
    data_dir: Path = Path("data")
    from_disk: bool = False
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)


def plan(
    subject: Subject,
    experiment: Experiment,
    arguments: argparse.Namespace,
    precision: str,
    device: str,
    processes: int = 1,
) -> list[Run]:
    """The runs of an experiment, in an order that fills its table evenly: all rules at the smallest width first.

    Raises:
        UserError: a rule that is not defined for this kind of network.
    """
    for rule in experiment.rules:
        if reason := RULES[rule].unsuited.get(arguments.network):
            raise UserError(f"--rules {rule}: {reason}")
    if experiment.reporter and len(experiment.data_limits) > 1:
        raise UserError("--data-limits takes one value here; for others run the command again")
    batch_size, batches = batches_of_a_step(experiment.batch_size or subject.batch_size, arguments, processes)
    runs = []
    axes = (experiment.widths, experiment.data_limits, experiment.seeds, experiment.learning_rates, experiment.rules)
    for width, limit, seed, learning_rate, rule in itertools.product(*axes):
        limit = None if limit and limit >= subject.examples else limit  # the same run as with all images
        runs.append(
            Run(
                dataset=subject.dataset,
                network=arguments.network,
                rule=rule,
                width=width,
                learning_rate=learning_rate,
                seed=seed,
                batch_size=effective_batch(batch_size, limit),
                batches=batches,
                data_limit=limit,
                optimizer=experiment.optimizer,
                parameterisation=experiment.parameterisation,
                variant=getattr(arguments, "variant", None),
                precision=precision,
                timed_on=device if experiment.timed else None,
                **RULES[rule].settings,
            )
        )
    return list(dict.fromkeys(runs))


def batches_of_a_step(batch_size: int, arguments: argparse.Namespace, processes: int) -> tuple[int, int]:
    """The size of a batch that is normalised by itself, and how many of them make a step.

    Every process has batches of its own, unless normalisation is synchronised: then theirs are parts of one.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    batches = getattr(arguments, "batches_per_step", None)
    if getattr(arguments, "sync_normalisation", False):
        if batches is not None:
            raise UserError("with --sync-normalisation a step is one batch; leave out --batches-per-step")
        return batch_size * processes, 1
    batches = batches or processes
    if batches % processes:
        raise UserError(f"--batches-per-step {batches} is no multiple of the {processes} processes; choose one that is")
    return batch_size, batches


def check_batches(folders: list[RunFolder], arguments: argparse.Namespace) -> None:
    """Raise UserError for a run that was begun with another number of batches per step, unless this one was asked for.

    Else a run that goes on with another number of processes would silently start anew.
    """
    if getattr(arguments, "batches_per_step", 0) is not None or arguments.sync_normalisation:
        return
    for folder in folders:
        others = [o for o in folder.begun_with_other_batches() if o.batch_size == folder.run.batch_size]
        for other in others:
            raise UserError(
                f"{other.name} was begun with {other.batches} batches per step, but here are {folder.run.batches}, one "
                f"per process; go on with --batches-per-step {other.batches}, or start anew with "
                f"--batches-per-step {folder.run.batches}"
            )


def note_other_batches(folders: list[RunFolder]) -> None:
    """Say which runs were begun with other batches and would be left alone, where runs may move between processes."""
    for folder in folders:
        for other in folder.begun_with_other_batches():
            print(f"note: {other.name} was begun; this command makes {folder.run.name}", flush=True)


def print_list(folders: list[RunFolder], epochs: int) -> None:
    states = [folder.status(epochs) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        print(f"{state:12}  {folder.run.name}")
    finished = sum(state in FINISHED for state in states)
    print(f"{len(states)} runs of {epochs} epochs: {finished} done, {len(states) - finished} to train")


def train_missing(
    subject: Subject,
    experiment: Experiment,
    folders: list[RunFolder],
    arguments: argparse.Namespace,
    device: torch.device,
    processes: Processes = ALONE,
) -> list[tuple[RunFolder, str]]:
    """Train every run that is not finished; go on where one fails, unless several processes train together.

    Returns:
        The runs that are not finished, with the reason.

    Raises:
        UserError: missing data, settings that do not fit them, or an outputs folder that cannot be used.
    """
    epochs = experiment.epochs
    missing = [folder for folder in folders if folder.status(epochs) not in FINISHED]
    if not missing:
        return []
    processes.send(PREPARE)
    task, failures = subject.task(arguments, device), []
    _check(task, folders, missing, arguments.outputs / subject.dataset)
    if experiment.keep:
        _check_space(task, experiment, missing, arguments.outputs / subject.dataset)
    print(f"{experiment.title}: {len(missing)} of {len(folders)} runs to train, {epochs} epochs each", flush=True)
    pace, announced = Pace(len(task.splits["train"]), epochs), False
    for number, folder in enumerate(tqdm(missing, "runs", unit="run", leave=False, disable=None)):
        if folder.status(epochs) in FINISHED:
            continue  # another process has trained it meanwhile
        left = missing[number:]

        def after_epoch(run=folder.run, left=left):
            nonlocal announced
            pace.epoch(run)
            if pace.seen and not announced and len(left) > 1:
                _say(f"about {duration(pace.left(left))} left, judging by the first epochs")
                announced = True

        message, reason = train_one(task, folder, experiment, pace, after_epoch, processes)
        if reason:
            failures.append((folder, reason))
        if reason and processes.working_now:
            _say(f"{message}  [the other processes cannot go on]")
            break
        rest = [other for other in missing[number + 1 :] if other.status(epochs) not in FINISHED]
        _say(message + (f"  [{len(rest)} runs, about {duration(pace.left(rest))} left]" if rest and pace.seen else ""))
    # What another process was training may be done by now.
    return [(folder, reason) for folder, reason in failures if folder.status(epochs) not in FINISHED]


def train_one(
    task: Task,
    folder: RunFolder,
    experiment: Experiment,
    pace: Pace,
    after_epoch: Callable[[], None],
    processes: Processes = ALONE,
) -> tuple[str, str | None]:
    """Train one run.

    Returns:
        A line that says how it went, and if it is not finished the reason.
    """
    try:
        if experiment.timed:
            warm_up(task, folder.run)
        pace.start()
        train(task, folder, experiment.epochs, experiment.keep, after_epoch, experiment.log_alignment, processes)
        if (status := folder.status(experiment.epochs)) not in FINISHED:
            return f"{folder.run.name}: {status}", status
        return summary_line(folder, experiment.epochs), None
    except Busy:
        return f"{folder.run.name}: left to the process that is training it", "another process is training it"
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not stop the runs that follow
            folder.error_path.write_text(traceback.format_exc())
        return f"{folder.run.name}: failed: {_first_line(error)}", f"{_first_line(error)}; see {folder.error_path}"


def _check(task: Task, folders: list[RunFolder], missing: list[RunFolder], outputs: Path) -> None:
    """Raise UserError, before anything is trained, for what would stop these runs, or mix data in their table."""
    for folder in missing:
        task.check(folder.run)
    for folder in folders:
        folder.check(task.fingerprint)
    with writing(outputs):
        tempfile.TemporaryFile(dir=outputs).close()


def _check_space(task: Task, experiment: Experiment, missing: list[RunFolder], outputs: Path) -> None:
    """Say how much disk the runs will take; UserError if there is not that much."""
    needed = 0
    for folder in missing:
        try:
            parameters = task.rule(folder.run).state_dict().values()
        except (RuntimeError, MemoryError):  # too large to make: the run itself will say so
            continue
        # The checkpoint, once more while it is replaced, and the parameters of each epoch that is kept.
        needed += (2 + len(experiment.keep)) * sum(p.numel() * p.element_size() for p in parameters)
    free = shutil.disk_usage(outputs).free
    print(f"they will take up to {needed / 1e9:.2g} GB of disk; {free / 1e9:.3g} GB are free", flush=True)
    if needed > free:
        raise UserError(f"{outputs} has not that much space; use fewer --widths or another --outputs")


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if isinstance(error, UserError) else f"{type(error).__name__}: {text[0]}") if text else repr(error)


def summary_line(folder: RunFolder, epochs: int) -> str:
    rows = folder.rows()
    metrics = {name: value for name, value in rows[-1].items() if name.endswith(("loss", "accuracy"))}
    shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
    seconds = sum(row["seconds"] for row in rows)
    return f"{folder.run.name}: {folder.status(epochs)} at epoch {len(rows)}, {seconds:.1f} s  {shown}"
