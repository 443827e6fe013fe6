"""What a script declares: its subject, and experiments on it. Nothing here trains."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from wide.options import PAPER_SEED, DataOptions, Options
from wide.reports.report import TableReport
from wide.reports.shown import Report
from wide.reports.tables import Metrics, View
from wide.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of runs, every combination of its axes, and the question it answers.

    Args:
        title: what it shows, for --help and, after the subject's, as the caption of table and figure.
        view: what the table's columns are, what is chosen and what is averaged, and the figure.
        metrics: which are shown; default: the subject's.
        beside: another experiment and some of its rules, whose finished runs are shown for comparison.
        timed: measure the time of an epoch: every run comes after a warm-up, and belongs to the device.
        logged: keep angles.csv and changes.csv of every run, as --log-alignment does.
        keep: epochs whose parameters are kept.
        compared: epochs after which outputs are compared with those of backprop's network (gaps.csv).
        report: what is shown; default: the table of rules and its figure.
        batch_size: default: the subject's.
        network: default: the subject's first.
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
    network: str | None = None
    optimizer: str = "sgd"
    parameterisation: str = "ntk"
    view: View = dataclasses.field(default_factory=View)
    metrics: Metrics | None = None
    beside: tuple[int, tuple[str, ...]] | None = None
    timed: bool = False
    logged: bool = False
    keep: tuple[int, ...] = ()
    compared: tuple[int, ...] = ()
    report: Report = dataclasses.field(default_factory=TableReport)
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def chosen(self, options: Options) -> "Experiment":
        """With what the command line replaces in it: first --quick, then the single options."""
        quick = dataclasses.replace(self, **self.quick) if options.quick else self
        return dataclasses.replace(quick, **options.grid)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a script's experiments are about.

    Args:
        dataset: the name of its folder in outputs/.
        title: its name, for people.
        task: reads the data and makes the Task, on a device.
        networks: choices of --network; the first is the default.
        batch_size: default.
        metrics: those that tables and figures show.
        examples: number of training examples in the full dataset.
        image_size: (h, w) of the images that networks take; () where there are none.
        strides: of a convolutional network's blocks.
        axes: the axes of the grid that the command line can replace.
        stem: what names of reports begin with.
        scored: whether runs train pairs of networks, whose alignment is scored.
        variants: choices of --variant; the first is the default.
        references: metrics to compare with, by name.
        data_dir: default.
        from_files: whether images are read from files while training, by processes of their own.
        distributed: whether several processes may train one run together.
        quick: what --quick replaces here.
    """

    dataset: str
    title: str
    task: Callable[[DataOptions, torch.device], Task]
    networks: tuple[str, ...]
    batch_size: int
    metrics: Metrics
    examples: int
    image_size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    axes: tuple[str, ...] = ("rules", "widths", "learning_rates", "seeds", "data_limits")
    stem: str = "experiment"
    scored: bool = False
    variants: tuple[str, ...] = ()
    references: Callable[[DataOptions], dict[str, dict[str, float]]] = lambda data: {}
    data_dir: Path = Path("data")
    from_files: bool = False
    distributed: bool = False
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def chosen(self, quick: bool) -> "Subject":
        """With what --quick replaces, where it is given."""
        return dataclasses.replace(self, **self.quick) if quick else self


def beside(experiments: Mapping[int, Experiment], experiment: Experiment) -> Experiment:
    """The part of another experiment that is comparable with this one."""
    number, rules = experiment.beside
    same = {
        axis: getattr(experiment, axis)
        for axis in ("widths", "seeds", "data_limits", "epochs", "batch_size", "network")
    }
    return dataclasses.replace(experiments[number], rules=rules, **same)
