"""Tables from what is in outputs/. Nothing here trains."""

import csv
import dataclasses
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from wide.runs import Run, RunFolder, replace, writing

RULE_NAMES = {
    "backprop": "Backprop",
    "align_ada": "Align-ada",
    "align_zero": "Align-zero",
    "align_prop": "Align-prop",
    "fa": "FA",
    "dfa": "DFA",
    "last_layer": "Last layer",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Which metrics are shown, and which run is best.

    Args:
        shown: the metrics of a table's cell, in order. The first chooses the best epoch and learning rate; the last is
            drawn in figures.
        higher: whether more is better.
        percent: whether to print a share as a percentage.
        use_best: show the best value over the epochs (each metric its own, as published), not the final one.
    """

    shown: tuple[str, ...]
    higher: bool
    percent: bool
    use_best: bool

    @property
    def choice(self) -> str:
        return self.shown[0]

    def text(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3g}"

    def label(self, metric: str) -> str:
        words = metric.replace("_", " ")
        return f"{words} (%)" if self.percent else words


ACCURACY = Measured(("validation_accuracy", "test_accuracy"), higher=True, percent=True, use_best=False)
BEST_LOSS = Measured(("train_loss", "test_loss"), higher=False, percent=False, use_best=True)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in figures: its metrics at the last epoch and at their best, up to the epochs that an experiment asks for.

    `best`, for accuracies, is taken at the epoch of the best validation accuracy; for losses each at its own lowest.
    """

    run: Run
    status: str
    epochs: int
    final: Mapping[str, float]
    best: Mapping[str, float]
    seconds: float
    data: str
    device: str

    @classmethod
    def read(cls, folder: RunFolder, epochs: int, measured: Measured) -> "Summary":
        rows, config = folder.rows()[:epochs], folder.config()
        metrics = [name for name in (rows[0] if rows else ()) if name not in ("epoch", "seconds")]
        finite = [row for row in rows if all(math.isfinite(row[name]) for name in metrics)]
        return cls(
            run=folder.run,
            status=folder.status(epochs),
            epochs=len(rows),
            final={name: rows[-1][name] for name in metrics} if rows else {},
            best=_best(finite, metrics, measured),
            seconds=sum(row["seconds"] for row in rows),
            data=config.get("run", {}).get("data", ""),
            device=", ".join(dict.fromkeys(session["device"] for session in config.get("sessions", []))),
        )

    def shown(self, measured: Measured) -> Mapping[str, float]:
        return self.best if measured.use_best else self.final


def _best(rows: list[dict], metrics: list[str], measured: Measured) -> dict[str, float]:
    if not rows:
        return {}
    pick = max if measured.higher else min
    if measured.use_best:
        return {name: pick(row[name] for row in rows) for name in metrics}
    row = pick(rows, key=lambda row: row[measured.choice])
    return {name: row[name] for name in metrics}


# ------------------------------------------------------------------------------------------------------------- cells


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of a table: runs that differ in nothing but their seed, at the best learning rate.

    `values` has the metrics of each seed; it is empty where no run came through.
    """

    values: tuple[Mapping[str, float], ...]
    learning_rate: float | None
    status: str

    def mean(self, metric: str) -> float:
        return statistics.fmean(value[metric] for value in self.values)

    def deviation(self, metric: str) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(value[metric] for value in self.values) if len(self.values) > 1 else 0.0

    def text(self, measured: Measured, rates: int) -> str:
        if not self.values:
            return self.status
        parts = []
        for metric in measured.shown:
            spread = f" ± {measured.text(self.deviation(metric))}" if len(self.values) > 1 else ""
            parts.append(measured.text(self.mean(metric)) + spread)
        notes = [f"lr {self.learning_rate:g}"] if rates > 1 else []
        notes += [f"n={len(self.values)}"] if len(self.values) > 1 else []
        return " / ".join(parts) + (f" ({', '.join(notes)})" if notes else "")


def make_cell(summaries: Iterable[Summary], measured: Measured) -> Cell:
    """The cell of runs that may differ in learning rate and seed: the best learning rate on average over its seeds."""
    summaries = list(summaries)
    by_rate = defaultdict(list)
    for summary in summaries:
        by_rate[summary.run.learning_rate].append(summary)
    through = {
        rate: Cell(tuple(s.shown(measured) for s in group), rate, "done")
        for rate, group in by_rate.items()
        if all(summary.status == "done" for summary in group)
    }
    if not through:
        states = dict.fromkeys(summary.status for summary in summaries)
        return Cell((), None, "diverged" if "diverged" in states else ", ".join(states) or "-")
    pick = max if measured.higher else min
    return pick(through.values(), key=lambda cell: cell.mean(measured.choice))


@dataclasses.dataclass(frozen=True)
class Table:
    """Rules against one axis. `sections` maps the values of another axis, where that has several, to rows of cells."""

    against: str
    columns: tuple
    section_axis: str | None
    sections: Mapping[object, Mapping[str, list[Cell]]]
    rates: int


def make_table(against: str, summaries: list[Summary], measured: Measured) -> Table:
    def values(axis: str) -> tuple:
        return tuple(dict.fromkeys(getattr(summary.run, axis) for summary in summaries))

    others = [axis for axis in ("width", "data_limit") if axis != against and len(values(axis)) > 1]
    section_axis = others[0] if others else None
    sections = {}
    for section in values(section_axis) if section_axis else (None,):
        inside = [s for s in summaries if section_axis is None or getattr(s.run, section_axis) == section]
        sections[section] = {
            rule: [
                make_cell((s for s in inside if s.run.rule == rule and getattr(s.run, against) == column), measured)
                for column in values(against)
            ]
            for rule in values("rule")
        }
    rates = len(values("learning_rate")) if against != "learning_rate" else 1
    return Table(against, values(against), section_axis, sections, rates)


# ------------------------------------------------------------------------------------------------------------- files


def report(
    folder: Path,
    number: int,
    experiment,
    measured: Measured,
    summaries: list[Summary],
    references: Mapping[str, Mapping[str, float]],
) -> str:
    """Write experiment_<number>.csv, .md and .png into `folder`.

    Args:
        references: metrics to compare with, by their name, such as the loss of guessing.

    Returns:
        The text of the .md file, and where the files are.
    """
    from wide.figures import draw_figure  # matplotlib takes a second to import

    table = make_table(experiment.against, summaries, measured)
    text = markdown(experiment.title, table, measured, summaries, references)
    path = folder / f"experiment_{number}.csv"
    with writing(folder):
        replace(path, lambda file: file.write(as_csv(summaries).encode()))
        replace(path.with_suffix(".md"), lambda file: file.write(text.encode()))
        draw_figure(path.with_suffix(".png"), experiment.title, table, measured, references)
    return f"{text}\nwritten to {path.with_suffix('')}.csv, .md, .png"


def as_csv(summaries: list[Summary]) -> str:
    """A row per run: its settings, final and best metrics, seconds, status."""
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary.final))
    names = [field.name for field in dataclasses.fields(Run)]
    final, best = [f"final_{name}" for name in metrics], [f"best_{name}" for name in metrics]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*names, "epochs", *final, *best, "seconds", "status", "data", "device"])
    writer.writeheader()
    for summary in summaries:
        row = dataclasses.asdict(summary.run)
        row |= {f"final_{name}": value for name, value in summary.final.items()}
        row |= {f"best_{name}": value for name, value in summary.best.items()}
        row |= {name: getattr(summary, name) for name in ("epochs", "status", "data", "device")}
        writer.writerow(row | {"seconds": round(summary.seconds, 3)})
    return stream.getvalue()


def markdown(
    title: str,
    table: Table,
    measured: Measured,
    summaries: list[Summary],
    references: Mapping[str, Mapping[str, float]],
) -> str:
    lines = [f"# {title}", "", _legend(table, measured, summaries), ""]
    for section, rows in table.sections.items():
        if table.section_axis:
            lines += [f"## {axis_text(table.section_axis, section)}", ""]
        lines.append("| rule | " + " | ".join(axis_text(table.against, column) for column in table.columns) + " |")
        lines.append("|---" * (1 + len(table.columns)) + "|")
        for rule, cells in rows.items():
            lines.append(f"| {RULE_NAMES[rule]} | " + " | ".join(c.text(measured, table.rates) for c in cells) + " |")
        for name, metrics in references.items():
            text = " / ".join(measured.text(metrics[metric]) for metric in measured.shown)
            lines.append(f"| {name} | " + " | ".join([text] * len(table.columns)) + " |")
        lines.append("")
    return "\n".join(lines)


def _legend(table: Table, measured: Measured, summaries: list[Summary]) -> str:
    what = " / ".join(measured.label(metric) for metric in measured.shown)
    when = "best over the epochs" if measured.use_best else "after the last epoch"
    chosen = f", at the learning rate of the best {measured.choice.replace('_', ' ')}" if table.rates > 1 else ""
    spread = ", mean ± standard deviation over n seeds" if len({s.run.seed for s in summaries}) > 1 else ""
    epochs = max(summary.epochs for summary in summaries)
    data = ", ".join(sorted({summary.data for summary in summaries if summary.data}))
    devices = ", ".join(sorted({summary.device for summary in summaries if summary.device}))
    return f"{what}, {when}{chosen}{spread}. {epochs} epochs; data {data or '-'}; device {devices or '-'}."


def axis_text(axis: str, value) -> str:
    if axis == "data_limit":
        return "all images" if value is None else f"{value} images"
    return f"lr {value:g}" if axis == "learning_rate" else f"{axis} {value}"
