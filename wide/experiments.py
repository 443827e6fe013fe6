"""Grids of runs, and the command line that all scripts share.

A script is a table of experiments and a call of `main`. An experiment is a grid: every combination of its rules,
widths, learning rates, seeds and data limits is a run.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from align_rules import RULES
from wide import UserError
from wide.report import Measured, Summary, report
from wide.runs import Busy, Run, RunFolder, effective_batch, writing
from wide.tasks import Task
from wide.training import PRECISIONS, choose_device, choose_precision, train

PAPER_SEED = 99


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of runs and the question it answers.

    Args:
        title: what it shows, for --help and as the caption of table and figure.
        against: the axis of the table's columns and of the figure: "width", "learning_rate" or "data_limit".
        quick: the settings that --quick replaces.
    """

    title: str
    rules: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    epochs: int
    against: str = "width"
    seeds: tuple[int, ...] = (PAPER_SEED,)
    data_limits: tuple[int | None, ...] = (None,)
    optimizer: str = "sgd"
    parameterisation: str = "ntk"
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a script's experiments are about.

    Args:
        dataset: its name, and that of its folder in outputs/.
        task: makes the Task from the parsed arguments and a device; reads the data.
        networks: choices of --network; the first is the default.
        batch_size: default.
        measured: the metrics that tables and figures show.
        images: number of training images, where --data-limits makes sense.
        variants: choices of --variant; the first is the default.
        unsuited: rules that are not defined here, with the reason.
        references: metrics to compare with, by name, from the parsed arguments.
    """

    dataset: str
    task: Callable[[argparse.Namespace, torch.device], Task]
    networks: tuple[str, ...]
    batch_size: int
    measured: Measured
    images: int | None = None
    variants: tuple[str, ...] = ()
    unsuited: Mapping[str, str] = dataclasses.field(default_factory=dict)
    references: Callable[[argparse.Namespace], dict[str, dict[str, float]]] = lambda arguments: {}


def main(
    description: str,
    subject: Subject,
    experiments: Mapping[int, Experiment],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command line of a training script.

    Returns:
        The exit status: 0 when every run is done, 1 when one failed, 2 for a wrong command line or missing data,
        130 when interrupted.
    """
    parser = build_parser(description, subject, experiments)
    arguments = parser.parse_args(argv)
    try:
        experiment = chosen(experiments[arguments.experiment], arguments)
        device = choose_device(arguments.device)
        runs = plan(subject, experiment, arguments, choose_precision(arguments.precision, device))
        folders = [RunFolder(arguments.outputs, run) for run in runs]
        if arguments.list:
            print_list(folders, experiment.epochs)
            return 0
        failures = train_missing(subject, folders, experiment.epochs, arguments, device)
        print(make_report(subject, folders, experiment, arguments))
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    for folder, reason in failures:
        print(f"failed: {folder.run.name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def make_report(
    subject: Subject, folders: list[RunFolder], experiment: Experiment, arguments: argparse.Namespace
) -> str:
    summaries = [Summary.read(folder, experiment.epochs, subject.measured) for folder in folders]
    references = subject.references(arguments)
    where = arguments.outputs / subject.dataset
    return report(where, arguments.experiment, experiment, subject.measured, summaries, references)


# ------------------------------------------------------------------------------------------------------ command line


def build_parser(description: str, subject: Subject, experiments: Mapping[int, Experiment]) -> argparse.ArgumentParser:
    rows = "\n".join(f"  {number}  {experiment.title}" for number, experiment in experiments.items())
    parser = argparse.ArgumentParser(
        description=f"{description.strip()}\n\nexperiments:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("experiment", type=int, nargs="?", default=1, choices=sorted(experiments), help="number (default 1)")
    grid = parser.add_argument_group("the grid: each takes one or more values, which replace the experiment's own")
    grid.add_argument("--rules", nargs="+", choices=list(RULES), metavar="RULE", help=", ".join(RULES))
    grid.add_argument("--widths", nargs="+", type=positive_int, metavar="N")
    grid.add_argument("--learning-rates", nargs="+", type=positive_float, metavar="LR")
    grid.add_argument("--seeds", nargs="+", type=seed, metavar="SEED")
    if subject.images:
        grid.add_argument("--data-limits", nargs="+", type=positive_int, metavar="IMAGES", help="training images used")
    add("--epochs", type=positive_int, help="train for this many (runs that went on longer are read up to there)")
    add("--batch-size", type=positive_int, default=subject.batch_size, help="default %(default)s")
    add("--network", choices=subject.networks, default=subject.networks[0], help="default %(default)s")
    if subject.variants:
        add("--variant", choices=subject.variants, default=subject.variants[0], help="default %(default)s (README)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add("--precision", choices=PRECISIONS, default="auto", help="default: tf32 on a GPU that has it, else fp32")
    if subject.images:
        add("--data-dir", type=Path, default=Path("data"), help="where the data are, or go (default %(default)s)")
    add("--outputs", type=Path, default=Path("outputs"), help="where results go (default %(default)s)")
    add("--list", action="store_true", help="print the runs and their state; train nothing")
    add("--quick", action="store_true", help="a small grid with few epochs, for a first look in minutes")
    return parser


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return value


def chosen(experiment: Experiment, arguments: argparse.Namespace) -> Experiment:
    """The experiment with what the command line replaces in it: first --quick, then the single options."""
    if arguments.quick:
        experiment = dataclasses.replace(experiment, **experiment.quick)
    axes = ("rules", "widths", "learning_rates", "seeds", "data_limits", "epochs")
    given = {axis: value for axis in axes if (value := getattr(arguments, axis, None)) is not None}
    unrepeated = {axis: tuple(dict.fromkeys(value)) for axis, value in given.items() if axis != "epochs"}
    return dataclasses.replace(experiment, **{**given, **unrepeated})


# -------------------------------------------------------------------------------------------------------------- grids


def plan(subject: Subject, experiment: Experiment, arguments: argparse.Namespace, precision: str) -> list[Run]:
    """The runs of an experiment, in an order that fills its table evenly: all rules at the smallest width first.

    Raises:
        UserError: a rule that is not defined for this subject.
    """
    for rule in experiment.rules:
        if rule in subject.unsuited:
            raise UserError(f"--rules {rule}: {subject.unsuited[rule]}")
    runs = []
    axes = (experiment.widths, experiment.data_limits, experiment.seeds, experiment.learning_rates, experiment.rules)
    for width, limit, one_seed, learning_rate, rule in itertools.product(*axes):
        limit = None if limit and subject.images and limit >= subject.images else limit
        runs.append(
            Run(
                dataset=subject.dataset,
                network=arguments.network,
                rule=rule,
                width=width,
                learning_rate=learning_rate,
                seed=one_seed,
                batch_size=effective_batch(arguments.batch_size, limit),
                data_limit=limit,
                optimizer=experiment.optimizer,
                parameterisation=experiment.parameterisation,
                variant=getattr(arguments, "variant", None),
                precision=precision,
            )
        )
    return list(dict.fromkeys(runs))


def print_list(folders: list[RunFolder], epochs: int) -> None:
    states = [folder.status(epochs) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        print(f"{state:12}  {folder.run.name}")
    finished = sum(state in ("done", "diverged") for state in states)
    print(f"{len(states)} runs of {epochs} epochs: {finished} done, {len(states) - finished} to train")


def train_missing(
    subject: Subject, folders: list[RunFolder], epochs: int, arguments: argparse.Namespace, device: torch.device
) -> list[tuple[RunFolder, str]]:
    """Train every run that is not finished; go on where one fails.

    Returns:
        The runs that are not finished, with the reason.

    Raises:
        UserError: missing data, settings that do not fit them, or an outputs folder that cannot be used.
    """
    missing = [folder for folder in folders if folder.status(epochs) not in ("done", "diverged")]
    if not missing:
        return []
    task, failures = subject.task(arguments, device), []
    for folder in missing:
        task.check(folder.run)
        folder.check(task.fingerprint)
    with writing(arguments.outputs / subject.dataset) as where:
        tempfile.TemporaryFile(dir=where).close()
    for folder in tqdm(missing, "runs", unit="run", leave=False, disable=None):
        try:
            train(task, folder, epochs)
            message = line(folder, epochs)
        except Busy:
            failures.append((folder, "another process is training it"))
            message = f"{folder.run.name}: left to the process that is training it"
        except Exception as error:
            failures.append((folder, f"{_first_line(error)}; see {folder.error_path}"))
            message = f"{folder.run.name}: failed: {_first_line(error)}"
            with contextlib.suppress(OSError):  # a full disk must not stop the runs that follow
                folder.error_path.write_text(traceback.format_exc())
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
    return failures


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if isinstance(error, UserError) else f"{type(error).__name__}: {text[0]}") if text else repr(error)


def line(folder: RunFolder, epochs: int) -> str:
    """A finished run, in a line."""
    rows = folder.rows()
    metrics = {name: value for name, value in rows[-1].items() if name not in ("epoch", "seconds")}
    shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
    seconds = sum(row["seconds"] for row in rows)
    return f"{folder.run.name}: {folder.status(epochs)} at epoch {len(rows)}, {seconds:.1f} s  {shown}"
