"""The command lines of all scripts. Only this file knows argparse; what is asked for leaves it as typed values."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from align_rules import RULES
from wide import UserError
from wide.data.datasets import ImageDataset
from wide.grids.alignment_experiments import score_files
from wide.grids.experiments import Experiment, Subject
from wide.grids.grid import Failures, run
from wide.grids.study import Machine, Study
from wide.options import PAPER_SEED, DataOptions, Options, ParallelOptions, RecordOptions, StepOptions
from wide.printing import lasting
from wide.training.devices import DEVICES, PRECISIONS
from wide.training.memory import keep_memory
from wide.training.processes import leave

GRID = ("rules", "widths", "learning_rates", "seeds", "data_limits", "batch_size", "epochs")
# Options that not every script has, where they are absent.
ABSENT = {
    **dict.fromkeys(GRID),
    "variant": None, "workers": None, "profile": False, "batches_per_step": None, "sync_normalisation": False,
    "log_alignment": False, "keep": None, "score_epochs": None, "shuffle_seed": PAPER_SEED, "files": None,
    "evaluate_every": 1, "centred": False,
}  # fmt: skip


def main(
    description: str, subject: Subject, experiments: Mapping[int, Experiment], argv: Sequence[str] | None = None
) -> int:
    """Run the command line of a training or alignment script.

    Returns:
        The exit status: 0 when every run is done, 1 when one failed, 2 for a wrong command line or missing data,
        130 when interrupted.
    """
    parser = build_parser(description, subject, experiments)

    def command(arguments: argparse.Namespace) -> Failures | None:
        if arguments.files:
            return print(score_files(subject, tuple(arguments.files), arguments.shuffle_seed))
        keep_memory()
        options = as_options(arguments, subject)
        return run(Study.of(subject, experiments, options, Machine.chosen(options)))

    with lasting():
        try:
            status = exit_status(parser.prog, lambda: command(parse(parser, experiments, argv)))
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            status = 130
        return leave(status)


def exit_status(program: str, command: Callable[[], Failures | None]) -> int:
    """Run a command that returns what failed, if anything, and say in a line what went wrong."""
    try:
        failures = command() or []
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    for folder, reason in failures:
        print(f"failed: {folder.run.name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def asked(subject: Subject, experiments: Mapping[int, Experiment], argv: Sequence[str]) -> Options:
    """What a command line asks of a training or alignment script."""
    return as_options(parse(build_parser("", subject, experiments), experiments, argv), subject)


def as_options(arguments: argparse.Namespace, subject: Subject) -> Options:
    """A parsed command line as typed values."""
    given = {name: value for name in GRID if (value := vars(arguments)[name]) is not None}
    return Options(
        experiment=arguments.experiment,
        network=arguments.network,
        data=DataOptions(
            folder=arguments.data_dir or subject.chosen(arguments.quick).data_dir,
            variant=arguments.variant,
            workers=arguments.workers,
        ),
        step=StepOptions(
            arguments.batches_per_step, arguments.sync_normalisation, arguments.weight_decay, arguments.centred
        ),
        record=RecordOptions(
            angles=arguments.log_alignment,
            keep=_unrepeated(arguments.keep),
            score_epochs=_unrepeated(arguments.score_epochs),
            shuffle_seed=arguments.shuffle_seed,
            evaluate_every=arguments.evaluate_every,
        ),
        parallel=_parallel(arguments),
        device=arguments.device,
        precision=arguments.precision,
        deterministic=arguments.deterministic,
        compile=arguments.compile,
        threads=arguments.threads,
        outputs=arguments.outputs,
        grid={name: _unrepeated(value) for name, value in given.items()},
        quick=arguments.quick,
        action=next((name for name in ("profile", "list", "evaluate", "report") if vars(arguments)[name]), "train"),
    )


def _parallel(arguments: argparse.Namespace) -> ParallelOptions | None:
    """
    Raises:
        UserError: an option that needs another, or contradicts it.
    """
    given = {name: value for name in ("runs_per_gpu", "threads_per_run") if (value := vars(arguments)[name])}
    if arguments.parallel and arguments.threads:
        raise UserError("--threads is for runs one after the other; with --parallel use --threads-per-run")
    if not arguments.parallel:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} is for runs side by side; add --parallel")
        return None
    if arguments.profile:
        raise UserError("--profile measures one process; leave out --parallel")
    return ParallelOptions(arguments.runs_per_gpu or 1, arguments.threads_per_run or 1)


def _unrepeated(value):
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else value


def build_parser(description: str, subject: Subject, experiments: Mapping[int, Experiment]) -> argparse.ArgumentParser:
    rows = "\n".join(f"  {number}  {experiment.title}" for number, experiment in experiments.items())
    parser = Parser(
        usage="%(prog)s [NUMBER] [options]",
        description=f"{description.strip()}\n\nexperiments:\n{rows}",
    )
    parser.set_defaults(**ABSENT)
    first = "number of the experiment; put it before the options (default 1)"
    parser.add_argument("experiment", type=int, nargs="?", choices=sorted(experiments), metavar="NUMBER", help=first)
    _add_grid(parser, subject)
    _add_records(parser, subject)
    _add_settings(parser, subject)
    _add_placing(parser)
    if subject.distributed:
        _add_steps(parser)
    if subject.from_files:
        _add_loading(parser)
    add = parser.add_argument
    add("--outputs", type=Path, default=Path("outputs"), help="where results go (default %(default)s)")
    add("--list", action="store_true", help="print the runs and their state; train nothing")
    evaluated = "measure finished runs again, from what they kept, and compare with metrics.csv; train nothing"
    add("--evaluate", action="store_true", help=evaluated)
    add("--report", action="store_true", help="make table and figure from the runs that are there; train nothing")
    add("--quick", action="store_true", help="a small grid with few epochs, for a first look in a minute or two")
    return parser


def _add_grid(parser: argparse.ArgumentParser, subject: Subject) -> None:
    grid = parser.add_argument_group("the grid: each takes one or more values, which replace the experiment's own")
    options = {
        "rules": {"choices": list(RULES), "metavar": "RULE", "help": ", ".join(RULES)},
        "widths": {"type": positive_int, "metavar": "N"},
        "learning_rates": {"type": positive_float, "metavar": "LR"},
        "seeds": {"type": seed, "metavar": "SEED"},
        "data_limits": {"type": positive_int, "metavar": "IMAGES", "help": "train on this many of the images"},
    }
    for axis in subject.axes:
        grid.add_argument(f"--{axis.replace('_', '-')}", nargs="+", **options[axis])


def _add_records(parser: argparse.ArgumentParser, subject: Subject) -> None:
    add = parser.add_argument
    if not subject.metrics.use_best:  # the best epoch is known only if each is evaluated
        every = "evaluate on validation and test images after every N epochs and the last (default 1, as published)"
        add("--evaluate-every", type=positive_int, default=1, metavar="N", help=every)
    if not subject.scored:
        logged = "write angles between the rule's gradients and backprop's to angles.csv in each run that is trained"
        add("--log-alignment", action="store_true", help=logged)
        return
    kept = "keep the parameters of these epochs (default: the initial and the scored ones); without a value, none"
    shuffled = "shuffle the control with this seed (default %(default)s); another needs kept parameters, or keeps them"
    files = "print the scores of a pair of networks from the files of three state_dicts; train nothing"
    add(
        "--score-epochs",
        nargs="+",
        type=positive_int,
        metavar="K",
        help="score after these epochs (default: every one)",
    )
    add("--keep-parameters", dest="keep", nargs="*", type=epoch_number, metavar="K", help=kept)
    add("--shuffle-seed", type=seed, default=PAPER_SEED, metavar="SEED", help=shuffled)
    add("--files", nargs=3, type=Path, metavar=("INITIAL", "TRAINED", "ALIGN"), help=files)


def _add_settings(parser: argparse.ArgumentParser, subject: Subject) -> None:
    add = parser.add_argument
    add("--epochs", type=positive_int, help="how many epochs to train (of longer runs the first ones are shown)")
    add("--batch-size", type=positive_int, help=f"examples in a batch (default {subject.batch_size})")
    decay = "weight decay of every rule (L2; default: none, of kolen_pollack 1e-4)"
    add("--weight-decay", type=non_negative, metavar="D", help=decay)
    centred = "subtract the initial network's outputs: f - f0, with every rule (not in the paper)"
    add("--centred", action="store_true", help=centred)
    add(
        "--network",
        choices=subject.networks,
        help=f"kind of network (default {subject.networks[0]}; --quick may choose another)",
    )
    if subject.variants:
        default = "with the published code's errors, or without (default %(default)s; docs/differences.md)"
        add("--variant", choices=subject.variants, default=subject.variants[0], help=default)
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: a GPU where there is one)")
    same = "use only algorithms that give the same numbers every time, on GPUs too; slower, and some have none"
    add("--deterministic", action="store_true", help=same)
    faster = "hand steps to torch's compiler: on GPUs faster, after a first step of each network of 10 to 50 seconds"
    add("--compile", action="store_true", help=faster)
    cores = "use so many threads of a processor for a run (default: one for narrow networks, else one per core)"
    add("--threads", type=positive_int, metavar="N", help=cores)
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="number format of the arithmetic (default: tf32 on a GPU that has it, else fp32)",
    )
    add("--data-dir", type=Path, help=f"where the data are, or are put (default {subject.data_dir})")


def _add_placing(parser: argparse.ArgumentParser) -> None:
    """Of runs, side by side."""
    add = parser.add_argument
    add("--parallel", action="store_true", help="train runs side by side, on all cores or GPUs (docs/parallel.md)")
    add(
        "--runs-per-gpu",
        type=positive_int,
        metavar="N",
        help="with --parallel, how many runs at once on each GPU (default 1)",
    )
    add(
        "--threads-per-run",
        type=positive_int,
        metavar="N",
        help="with --parallel, threads of each run (default 1)",
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    """How a step is made up, where several processes may train one run."""
    share = "make each step from N batches of --batch-size, each normalised by itself (default: one per process)"
    whole = "normalise the batches of all processes as one: N processes train as one with N times --batch-size"
    parser.add_argument("--batches-per-step", type=positive_int, metavar="N", help=share)
    parser.add_argument("--sync-normalisation", action="store_true", help=whole)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Of images from files."""
    loaders = "how many processes load images (default: one per core)"
    parser.add_argument("--workers", type=epoch_number, metavar="N", help=loaders)
    profile = "measure images per second of the grid's first run; train nothing"
    parser.add_argument("--profile", action="store_true", help=profile)


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


def setup(
    dataset: type[ImageDataset],
    argv: Sequence[str] | None = None,
    split: Callable[[Path, str, Path], str] | None = None,
) -> int:
    """Run the command line of a setup script: get and read the dataset, and say what is there.

    Args:
        split: from the data's folder, the address of downloads and a folder, writes a split of the test images alone
            to the latter and returns where it lies.

    Returns:
        The exit status: 0, or 2 after a one-line message on stderr.
    """
    parser = Parser(description=f"Get {dataset.title}, if it is not there yet, and read it.")
    parser.add_argument("--data-dir", default="data", help=f"folder that holds {dataset.directory}/ (%(default)s)")
    parser.add_argument("--url", metavar="BASE", default=dataset.url, help="where to download from (%(default)s)")
    if split:
        what = "first split the official test images into training and test files, in FOLDER, which is then read"
        parser.add_argument("--split-test-images", type=Path, metavar="FOLDER", help=what)

    def command(arguments: argparse.Namespace) -> None:
        folder = arguments.data_dir
        if split and arguments.split_test_images:
            folder = split(folder, arguments.url, arguments.split_test_images)
        data = dataset(folder, arguments.url)
        sizes = f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test images"
        print(f"{data.title} in {data.folder}: {sizes} of shape {'x'.join(map(str, data.image_shape))}")
        print(f"fingerprint {data.fingerprint}")

    return carry_out(parser, argv, command)


def carry_out(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], None]
) -> int:
    """Do what a command line asks for.

    Returns:
        The exit status: 0, or 2 after a one-line message on stderr.
    """
    with lasting():
        return exit_status(parser.prog, lambda: command(parser.parse_args(argv)))


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and shows a description as it is written."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

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


positive_int = number(int, lambda value: 1 <= value < 2**31, "a positive whole number below 2**31")
epoch_number = number(int, lambda value: value >= 0, "a whole number of at least 0")
non_negative = number(float, lambda value: value >= 0 and math.isfinite(value), "a number of at least 0")
positive_float = number(float, lambda value: value > 0 and math.isfinite(value), "a positive number")
seed = number(int, lambda value: 0 <= value < 2**32, "a whole number between 0 and 2**32 - 1")
