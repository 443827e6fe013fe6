"""Tables from what is in outputs/: runs in figures, the best of them, their averages. Nothing here trains."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping

from wide import UserError
from wide.runs.folder import FINISHED, RunFolder
from wide.runs.run import Run


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Which metrics are shown, and which run is best.

    Args:
        shown: the metrics of a table's cell, in order. The first chooses the best epoch and learning rate.
        drawn: which of them figures draw, by position.
        higher: whether more is better.
        percent: whether to print a share as a percentage.
        use_best: show the best value over the epochs (each metric its own, as published), not the final one.
        unit: of the metrics, for legends and axes.
        relative_to: a rule; cells also say how many times its value theirs is.
    """

    shown: tuple[str, ...]
    higher: bool
    drawn: int = -1
    percent: bool = False
    use_best: bool = False
    unit: str = ""
    relative_to: str | None = None

    @property
    def choice(self) -> str:
        return self.shown[0]

    def text(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3g}"

    def label(self, metric: str) -> str:
        name = {"seconds": "training time of an epoch"}.get(metric, metric.replace("_", " "))
        return f"{name} ({self.unit})" if self.unit else name


ACCURACY = Metrics(("validation_accuracy", "test_accuracy"), higher=True, percent=True, unit="%")
TOP_ACCURACY = Metrics(
    ("validation_accuracy", "validation_top_5_accuracy"), higher=True, drawn=0, percent=True, unit="%"
)
BEST_LOSS = Metrics(("train_loss", "test_loss"), higher=False, use_best=True, unit="squared error per sequence")
EPOCH_TIME = Metrics(("seconds",), higher=False, unit="s", relative_to="backprop")


@dataclasses.dataclass(frozen=True)
class View:
    """How a table and its figure show a grid.

    Args:
        against: the axis of the columns: "width", "learning_rate" or "data_limit".
        best_over: the axes over which the best is chosen.
        averaged: the axes over which values are averaged, with their standard deviation.
        figure: the kind of figure (wide/reports/figures.py).

    Other axes with several values become sections of the table and panels of the figure.
    """

    against: str = "width"
    best_over: tuple[str, ...] = ("learning_rate",)
    averaged: tuple[str, ...] = ("seed",)
    figure: str = "lines"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in figures: its metrics at the last epoch, at their best and at every epoch, up to an experiment's last.

    `best`, for accuracies, is taken at the epoch of the best validation accuracy; for losses each at its own lowest.
    `history` has the epochs after which the run was evaluated, as "epoch", and its metrics then.
    """

    run: Run
    status: str
    epochs: int
    final: Mapping[str, float]
    best: Mapping[str, float]
    history: Mapping[str, tuple[float, ...]]
    seconds: float
    data: str
    device: str

    @classmethod
    def read(cls, folder: RunFolder, epochs: int, metrics: Metrics) -> "Summary":
        """
        Raises:
            UserError: a file is damaged, or lacks what is to be shown.
        """
        rows, config, status = folder.rows()[:epochs], folder.config(), folder.status(epochs)
        _require_values(folder, rows, metrics, status)
        evaluated = [row for row in rows if all(row[name] is not None for name in metrics.shown)]
        names = [name for name in (rows[0] if rows else ()) if name != "epoch"]
        columns = [name for name in names if all(row[name] is not None for row in evaluated)]
        finite = [row for row in evaluated if all(math.isfinite(row[name]) for name in columns)]
        return cls(
            run=folder.run,
            status=status,
            epochs=len(rows),
            final={name: evaluated[-1][name] for name in columns} if evaluated else {},
            best=_best(finite, columns, metrics),
            history={name: tuple(row[name] for row in evaluated) for name in ("epoch", *columns)},
            seconds=sum(row["seconds"] for row in rows),
            data=config.get("run", {}).get("data", ""),
            device=", ".join(dict.fromkeys(session["device"] for session in config.get("sessions", []))),
        )

    @property
    def training_images(self) -> int | None:
        """How many there were to train on, as the data's fingerprint says."""
        count = self.data.partition("-")[0]
        return int(count) if count.isdigit() else None

    def shown(self, metrics: Metrics) -> Mapping[str, float]:
        return self.best if metrics.use_best else self.final


def _require_values(folder: RunFolder, rows: list[dict], metrics: Metrics, status: str) -> None:
    """Raise UserError for rows without what is shown: any without time, or a finished run's last."""
    lacking = {"seconds", *metrics.shown} - (rows[0].keys() if rows else {"seconds", *metrics.shown})
    lacking |= {"seconds"} if any(row.get("seconds") is None for row in rows) else set()
    if lacking:
        raise folder.damaged(folder.metrics_path, ValueError(f"it lacks values of {', '.join(sorted(lacking))}"))
    lacking = [name for name in metrics.shown if rows and rows[-1][name] is None]
    if lacking and status in FINISHED:
        had = [str(row["epoch"]) for row in folder.rows() if all(row[name] is not None for name in metrics.shown)]
        remedy = f"ask for --epochs {' or '.join(had[-3:])}, or " if had else ""
        raise UserError(
            f"{folder.path} has no {', '.join(lacking)} after epoch {len(rows)}, as --evaluate-every leaves it; "
            f"{remedy}train it in another --outputs folder"
        )


def _best(rows: list[dict], columns: list[str], metrics: Metrics) -> dict[str, float]:
    if not rows:
        return {}
    pick = max if metrics.higher else min
    if metrics.use_best:
        return {name: pick(row[name] for row in rows) for name in columns}
    row = pick(rows, key=lambda row: row[metrics.choice])
    return {name: row[name] for name in columns}


# ------------------------------------------------------------------------------------------------------------- cells

AXES = ("parameterisation", "width", "data_limit", "learning_rate", "seed")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of a table: runs that differ in averaged axes only, at the best of the axes that are chosen over.

    `values` has the metrics of each run, `histories` those of each epoch; they are empty where no run came through.
    `chosen` are the axes' best values, `edge` those axes where that is the largest or smallest tried; `untrained` says
    how many others have not been trained to the end. `diverged` of `runs` did, of a cell without values.
    """

    values: tuple[Mapping[str, float], ...]
    chosen: Mapping[str, object]
    status: str
    histories: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    untrained: int = 0
    edge: tuple[str, ...] = ()
    diverged: int = 0
    runs: int = 0

    def mean(self, metric: str) -> float:
        return statistics.fmean(value[metric] for value in self.values)

    def deviation(self, metric: str) -> float:
        """Standard deviation; 0 for one run."""
        return statistics.stdev(value[metric] for value in self.values) if len(self.values) > 1 else 0.0


def make_cell(summaries: list[Summary], view: View, metrics: Metrics) -> Cell:
    """The cell of runs that belong to one rule and column: of the settings chosen over, the best on average."""
    candidates = defaultdict(list)
    for summary in summaries:
        candidates[tuple(getattr(summary.run, axis) for axis in view.best_over)].append(summary)
    untrained = sum(any(summary.status not in FINISHED for summary in group) for group in candidates.values())
    through = [
        Cell(
            tuple(s.shown(metrics) for s in group),
            dict(zip(view.best_over, key, strict=True)),
            "done",
            tuple(s.history for s in group),
            untrained,
        )
        for key, group in candidates.items()
        if all(summary.status == "done" for summary in group)
    ]
    if not through:
        states = [summary.status for summary in summaries]
        status = "diverged" if "diverged" in states else ", ".join(dict.fromkeys(states)) or "-"
        return Cell((), {}, status, diverged=states.count("diverged"), runs=len(states))
    pick = max if metrics.higher else min
    best = pick(through, key=lambda cell: cell.mean(metrics.choice))
    tried = {axis: {key[place] for key in candidates} for place, axis in enumerate(view.best_over)}
    ends = [axis for axis, value in best.chosen.items() if value in (min(tried[axis]), max(tried[axis]))]
    return dataclasses.replace(best, edge=tuple(axis for axis in ends if len(tried[axis]) > 1))


@dataclasses.dataclass(frozen=True)
class Table:
    """Rules against one axis.

    `sections` maps the values of the remaining axes, ((axis, value), ...), to rows of cells by rule. `choices` are the
    axes chosen over that had a choice.
    """

    view: View
    metrics: Metrics
    columns: tuple
    sections: Mapping[tuple, Mapping[str, list[Cell]]]
    choices: tuple[str, ...]

    def text(self, cell: Cell, reference: Cell | None) -> str:
        """A cell in words; `reference` is that of `metrics.relative_to` in the same column."""
        if not cell.values:
            several = f" ({cell.diverged} of {cell.runs})" if cell.diverged and cell.runs > 1 else ""
            return cell.status + several
        several = len(cell.values) > 1
        parts = []
        for metric in self.metrics.shown:
            spread = f" ± {self.metrics.text(cell.deviation(metric))}" if several else ""
            parts.append(self.metrics.text(cell.mean(metric)) + spread)
        notes = [axis_text(axis, cell.chosen[axis]) + " at the edge" * (axis in cell.edge) for axis in self.choices]
        notes += [f"{cell.untrained} more not trained"] if self.choices and cell.untrained else []
        notes += [f"n={len(cell.values)}"] if several else []
        if reference is not None and reference.values:
            notes.insert(0, f"{cell.mean(self.metrics.choice) / reference.mean(self.metrics.choice):.2f}x")
        return " / ".join(parts) + (f" ({', '.join(notes)})" if notes else "")


def make_table(view: View, summaries: list[Summary], metrics: Metrics) -> Table:
    def values(axis: str) -> tuple:
        return tuple(dict.fromkeys(getattr(summary.run, axis) for summary in summaries))

    used = (view.against, *view.best_over, *view.averaged)
    remaining = [axis for axis in AXES if axis not in used and len(values(axis)) > 1]
    columns = tuple(sorted(values(view.against), key=lambda value: (value is None, value or 0)))
    grouped = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for summary in summaries:
        section = tuple((axis, getattr(summary.run, axis)) for axis in remaining)
        grouped[section][summary.run.rule][getattr(summary.run, view.against)].append(summary)
    sections = {
        section: {rule: [make_cell(cells[column], view, metrics) for column in columns] for rule, cells in rows.items()}
        for section, rows in grouped.items()
    }
    choices = tuple(axis for axis in view.best_over if len(values(axis)) > 1)
    varied = tuple(axis for axis in view.averaged if len(values(axis)) > 1)
    view = dataclasses.replace(view, averaged=varied or view.averaged)
    return Table(view, metrics, columns, sections, choices)


def data_text(folders: list[RunFolder]) -> str:
    """What data these runs were trained on."""
    found = {config["run"]["data"] for folder in folders if (config := folder.config())}
    return f"data {', '.join(sorted(found)) or '-'}"


def settings_text(runs: list[Run], names: Collection[str] | None = None) -> str:
    """What all these runs have in common, of all settings or those named."""
    texts = {
        "network": "network {}",
        "variant": "{} variant",
        "optimizer": "{}",
        "learning_rate": "lr {:g}",
        "batch_size": "batch {}",
        "batches": "{} batches per step",
        "data_limit": "first {} images",
        "seed": "seed {}",
        "decay": "weight decay {:g}",
        "precision": "{}",
        "centred": "centred outputs",
    }
    names = texts if names is None else [name for name in texts if name in names]
    common = {name: values.pop() for name in names if len(values := {getattr(run, name) for run in runs}) == 1}
    for name, usual in (("batches", 1), ("decay", 0), ("centred", False)):
        if common.get(name) == usual:
            del common[name]
    return ", ".join(texts[name].format(value) for name, value in common.items() if value is not None)


def unusual_text(runs: list[Run]) -> str:
    """For a title: what is not as in the paper, in all of these runs."""
    unusual = {"mlp": "fully connected", "corrected": "corrected variant", "bf16": "bf16", True: "centred outputs"}
    values = [{getattr(run, name) for run in runs} for name in ("network", "variant", "precision", "centred")]
    words = [unusual[value] for value in (v.pop() for v in values if len(v) == 1) if value in unusual]
    return f" ({', '.join(words)})" if words else ""


def section_text(section: tuple) -> str:
    return ", ".join(axis_text(axis, value) for axis, value in section)


def axis_text(axis: str, value) -> str:
    if axis == "data_limit":
        return "all images" if value is None else f"{value} images"
    if axis == "parameterisation":
        return {"ntk": "NTK parameterisation", "standard": "standard parameterisation"}[value]
    return f"lr {value:g}" if axis == "learning_rate" else f"{axis} {value}"
