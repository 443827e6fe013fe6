"""The command line that all scripts share."""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from align_rules import RULES
from wide import UserError
from wide.devices import PRECISIONS, choose_device, choose_precision, device_name
from wide.experiments import Experiment, Subject, check_batches, note_other_batches, plan, print_list, train_missing
from wide.processes import Processes, join, leave
from wide.report import report
from wide.runs import RunFolder
from wide.tables import Summary
from wide.training import follow


def main(
    description: str, subject: Subject, experiments: Mapping[int, Experiment], argv: Sequence[str] | None = None
) -> int:
    """Run the command line of a training script.

    Returns:
        The exit status: 0 when every run is done, 1 when one failed, 2 for a wrong command line or missing data,
        130 when interrupted.
    """
    parser = build_parser(description, subject, experiments)
    arguments = parse(parser, experiments, argv)
    return leave(exit_status(parser.prog, subject, experiments, arguments))


def exit_status(
    program: str, subject: Subject, experiments: Mapping[int, Experiment], arguments: argparse.Namespace
) -> int:
    """Carry out a command, and say in a line what went wrong."""
    try:
        failures = carry_out(subject, experiments, arguments)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    for folder, reason in failures:
        print(f"failed: {folder.run.name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def carry_out(
    subject: Subject, experiments: Mapping[int, Experiment], arguments: argparse.Namespace
) -> list[tuple[RunFolder, str]]:
    """List the experiment's runs, or train those that are missing and report.

    Returns:
        The runs that are not finished, with the reason.

    Raises:
        UserError: a wrong command line, missing data, or an outputs folder that cannot be used.
    """
    if arguments.quick:
        subject = dataclasses.replace(subject, **subject.quick)
    arguments.data_dir = arguments.data_dir or subject.data_dir
    experiment = chosen(experiments[arguments.experiment], arguments)
    experiment = dataclasses.replace(experiment, title=f"{subject.title}: {experiment.title}")
    device = choose_device(arguments.device)
    precision = choose_precision(arguments.precision, device)
    processes = join(device)
    if processes.count > 1 and not subject.from_disk:
        raise UserError("a run is trained by one process here; started several times, the command shares out runs")
    if experiment.log_alignment and (processes.count > 1 or (getattr(arguments, "batches_per_step", 0) or 1) > 1):
        raise UserError("--log-alignment needs one process and one batch per step")

    def folders(grid: Experiment) -> list[RunFolder]:
        runs = plan(subject, grid, arguments, precision, device_name(device), processes.count)
        return [RunFolder(arguments.outputs, run) for run in runs]

    if getattr(arguments, "profile", False):
        from wide.throughput import profile  # torchvision takes seconds to import

        profile(subject.task(arguments, device), folders(experiment)[0].run, processes)
        return []
    if not processes.first:
        follow(processes, lambda: subject.task(arguments, device))
        return []
    try:
        mine = folders(experiment)
        others = folders(beside(experiments, experiment)) if experiment.beside else []
        return lead(subject, experiment, mine, others, arguments, device, processes)
    finally:
        processes.dismiss()


def lead(
    subject: Subject,
    experiment: Experiment,
    mine: list[RunFolder],
    others: list[RunFolder],
    arguments: argparse.Namespace,
    device: torch.device,
    processes: Processes,
) -> list[tuple[RunFolder, str]]:
    """What the first process, or the only one, does of `carry_out`."""
    if subject.from_disk:
        note_other_batches(mine)
    if arguments.list:
        print_list(mine, experiment.epochs)
        return []
    check_epochs(experiment, arguments)
    check_batches(mine, arguments)
    failures = train_missing(subject, experiment, mine, arguments, device, processes)
    try:
        print(reported(subject, experiment, mine, others, arguments))
    except UserError:
        if not failures:
            raise
    return failures


def reported(
    subject: Subject,
    experiment: Experiment,
    mine: list[RunFolder],
    others: list[RunFolder],
    arguments: argparse.Namespace,
) -> str:
    """Write the experiment's report; `others` are runs to show beside it where they are done on the same data."""
    path = arguments.outputs / subject.dataset / f"{subject.stem}_{arguments.experiment}"
    if experiment.reporter:
        return experiment.reporter(path, experiment, mine, arguments)
    metrics, epochs = experiment.metrics or subject.metrics, experiment.epochs
    summaries = [Summary.read(folder, epochs, metrics) for folder in mine]
    data, runs = {summary.data for summary in summaries}, {folder.run for folder in mine}
    compared = [Summary.read(folder, epochs, metrics) for folder in others if folder.run not in runs]
    return report(
        path,
        experiment.title,
        experiment.view,
        metrics,
        summaries,
        [summary for summary in compared if summary.status == "done" and summary.data in data],
        subject.references(arguments),
        subject.examples,
    )


def check_epochs(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Raise UserError for epochs that are asked to be scored or kept but will not be trained, before any training."""
    if any(epoch > experiment.epochs for epoch in getattr(arguments, "keep", None) or ()):
        raise UserError(f"--keep-parameters: training ends at epoch {experiment.epochs}")
    asked = getattr(arguments, "score_epochs", None)
    if experiment.scored_last and asked and experiment.epochs not in asked:
        raise UserError(f"scores after epoch {experiment.epochs} are shown; add {experiment.epochs} to --score-epochs")


def chosen(experiment: Experiment, arguments: argparse.Namespace) -> Experiment:
    """The experiment with what the command line replaces in it: first --quick, then the single options."""
    if arguments.quick:
        experiment = dataclasses.replace(experiment, **experiment.quick)
    names = (
        "rules", "widths", "learning_rates", "seeds", "data_limits", "batch_size", "keep", "epochs", "log_alignment",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    unrepeated = {name: tuple(dict.fromkeys(value)) for name, value in given.items() if isinstance(value, list)}
    return dataclasses.replace(experiment, **{**given, **unrepeated})


def beside(experiments: Mapping[int, Experiment], experiment: Experiment) -> Experiment:
    """The part of another experiment that is comparable with this one."""
    number, rules = experiment.beside
    same = {axis: getattr(experiment, axis) for axis in ("widths", "seeds", "data_limits", "epochs", "batch_size")}
    return dataclasses.replace(experiments[number], rules=rules, **same)


def build_parser(description: str, subject: Subject, experiments: Mapping[int, Experiment]) -> argparse.ArgumentParser:
    rows = "\n".join(f"  {number}  {experiment.title}" for number, experiment in experiments.items())
    parser = Parser(
        usage="%(prog)s [NUMBER] [options]",
        description=f"{description.strip()}\n\nexperiments:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    first = "of the experiment; it comes before the options (default 1)"
    add("experiment", type=int, nargs="?", choices=sorted(experiments), metavar="NUMBER", help=first)
    grid = parser.add_argument_group("the grid: each takes one or more values, which replace the experiment's own")
    options = {
        "rules": {"choices": list(RULES), "metavar": "RULE", "help": ", ".join(RULES)},
        "widths": {"type": positive_int, "metavar": "N"},
        "learning_rates": {"type": positive_float, "metavar": "LR"},
        "seeds": {"type": seed, "metavar": "SEED"},
        "data_limits": {"type": positive_int, "metavar": "IMAGES", "help": "training images used"},
    }
    for axis in subject.axes:
        grid.add_argument(f"--{axis.replace('_', '-')}", nargs="+", **options[axis])
    if subject.scores:
        kept = "epochs whose parameters are kept (default: the first and the scored one); none if empty"
        add("--score-epochs", nargs="+", type=positive_int, metavar="K", help="epochs to score (default: every one)")
        add("--keep-parameters", dest="keep", nargs="*", type=epoch_number, metavar="K", help=kept)
    else:
        logged = "in each run that is trained, keep angles between the rule's gradients and backprop's in angles.csv"
        add("--log-alignment", action="store_true", help=logged)
    add("--epochs", type=positive_int, help="train for this many (runs that went on longer are read up to there)")
    add("--batch-size", type=positive_int, help=f"default {subject.batch_size}")
    add("--network", choices=subject.networks, default=subject.networks[0], help="default %(default)s")
    if subject.variants:
        add("--variant", choices=subject.variants, default=subject.variants[0], help="default %(default)s (README)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add("--precision", choices=PRECISIONS, default="auto", help="default: tf32 on a GPU that has it, else fp32")
    add("--data-dir", type=Path, help=f"where the data are, or go (default {subject.data_dir})")
    if subject.from_disk:
        share = "of 100 images each, normalised by itself, shared out among processes (default: one per process)"
        whole = "normalise the batches of all processes as one; N processes equal one with N times --batch-size"
        add("--batches-per-step", type=positive_int, metavar="N", help=share.replace("100", "--batch-size"))
        add("--sync-normalisation", action="store_true", help=whole)
        add("--workers", type=epoch_number, metavar="N", help="that load images, per process (default: one per core)")
        add("--profile", action="store_true", help="train nothing; images per second of the grid's first run")
    add("--outputs", type=Path, default=Path("outputs"), help="where results go (default %(default)s)")
    add("--list", action="store_true", help="print the runs and their state; train nothing")
    add("--quick", action="store_true", help="a small grid with few epochs, for a first look in minutes")
    return parser


def parse(
    parser: argparse.ArgumentParser, experiments: Mapping[int, Experiment], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The parsed command line; exits with status 2 where an option may have taken the number as a value."""
    arguments = parser.parse_intermixed_args(argv)
    if arguments.experiment is not None:
        return arguments
    for values in vars(arguments).values():
        if isinstance(values, list) and len(values) > 1 and values[-1] in experiments:
            given, last = " ".join(f"{value:g}" for value in values), f"{values[-1]:g}"
            parser.error(f"is the {last} of '{given}' a value or the experiment? Put its NUMBER before the options")
    arguments.experiment = 1
    return arguments


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def number(kind: type, accepted: Callable[[float], bool], description: str) -> Callable[[str], float]:
    """A converter for argparse."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if accepted(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")

    return convert


positive_int = number(int, lambda value: value >= 1, "a positive whole number")
epoch_number = number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_float = number(float, lambda value: value > 0 and math.isfinite(value), "a positive number")
seed = number(int, lambda value: 0 <= value < 2**32, "a whole number between 0 and 2**32 - 1")
