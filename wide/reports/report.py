"""Reports: an experiment's .csv, .md and .png, from what is in outputs/. Nothing here trains."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from wide.models.rules import RULES
from wide.reports.shown import Shown
from wide.reports.tables import (
    Metrics,
    Summary,
    Table,
    axis_text,
    make_table,
    section_text,
    settings_text,
    unusual_text,
)
from wide.runs.files import csv_text, replace, replace_text, sweep, writing
from wide.runs.folder import FINISHED, RunFolder


class TableReport:
    """The table of rules and its figure: what an experiment shows of its runs by default (see shown.Report)."""

    def check(self, shown: Shown) -> None:
        """Everything can be shown."""

    def has(self, shown: Shown, folder: RunFolder) -> bool:
        return folder.status(shown.epochs) in FINISHED

    def scored_epochs(self, shown: Shown) -> tuple[int, ...]:
        return ()

    def write(self, shown: Shown) -> str:
        metrics = shown.metrics
        summaries = [Summary.read(folder, shown.epochs, metrics) for folder in shown.folders]
        beside = self.beside(shown, summaries, metrics)
        table = make_table(shown.view, [*summaries, *beside], metrics)
        references = shown.references()
        title = shown.title + unusual_text([summary.run for summary in summaries])
        runs = [summary.run for summary in (*summaries, *beside)]
        settings = settings_text(runs, ("optimizer", "learning_rate", "data_limit", "seed", "decay"))
        # So that figures can be told apart.
        drawn = f"{title}\n{shown.epochs} epoch{'s' * (shown.epochs > 1)}, {settings}"
        examples = max((n for s in summaries if (n := s.training_images)), default=shown.examples)

        def draw(file: BinaryIO) -> None:
            figures().draw_figure(file, drawn, table, references, examples)

        text = markdown(title, table, [*summaries, *beside], references)
        return write_report(shown.path, as_csv(summaries), text, draw)

    def beside(self, shown: Shown, summaries: list[Summary], metrics: Metrics) -> list[Summary]:
        """Finished runs of another experiment on the same data, for comparison; they are not in the .csv."""
        data = {summary.data for summary in summaries}
        compared = [Summary.read(folder, shown.epochs, metrics) for folder in shown.compared_folders]
        return [summary for summary in compared if summary.status == "done" and summary.data in data]


def figures(name: str = "figures") -> ModuleType:
    """A module of figures, imported only now: matplotlib takes a second.

    Without MPLBACKEND: no backend is used, and with one that is not installed, such as the one that a notebook sets for
    itself and its commands, matplotlib refuses to be imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        return importlib.import_module(f".{name}", __package__)
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def write_report(path: Path, rows: str, text: str, draw: Callable[[BinaryIO], None]) -> str:
    """Write `path`.csv, .md and, after them, .png; a figure that cannot be drawn is a note on stderr.

    Args:
        draw: writes the figure into a file.

    Returns:
        The text of the .md file, and where the files are.

    Raises:
        UserError: they cannot be written.
    """
    with writing(path.parent):
        sweep(path.parent)
        replace_text(path.with_suffix(".csv"), rows)
        replace_text(path.with_suffix(".md"), text)
    try:
        replace(path.with_suffix(".png"), draw)
    except Exception as error:  # whatever matplotlib, its configuration or its fonts have
        print(f"note: {path}.png is not drawn: {type(error).__name__}: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # an earlier one would not belong to this table
            path.with_suffix(".png").unlink(missing_ok=True)
        return f"{text}\nwritten to {path}.csv, .md"
    return f"{text}\nwritten to {path}.csv, .md, .png"


def as_csv(summaries: list[Summary]) -> str:
    """A row per run: its settings, final and best metrics, seconds, status."""
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary.final if name != "seconds"))
    names = list(dict.fromkeys(name for summary in summaries for name in summary.run.settings()))
    rows = []
    for summary in summaries:
        row = summary.run.settings() | {"epochs": summary.epochs}
        for kind, values in (("final", summary.final), ("best", summary.best)):
            row |= {f"{kind}_{name}": value for name, value in values.items() if name != "seconds"}
        rows.append(row | {"seconds": round(summary.seconds, 3)})
        rows[-1] |= {name: getattr(summary, name) for name in ("status", "data", "device")}
    shown = [f"{kind}_{name}" for kind in ("final", "best") for name in metrics]
    return csv_text(rows, header=True, columns=[*names, "epochs", *shown, "seconds", "status", "data", "device"])


def markdown(title: str, table: Table, summaries: list[Summary], references: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"# {title}", "", _legend(table, summaries), ""]
    if len({summary.data for summary in summaries if summary.data}) > 1:
        lines += ["**These runs were trained on different data: the cells are not comparable.**", ""]
    for section, rows in table.sections.items():
        if section:
            lines += [f"## {section_text(section)}", ""]
        lines.append("| rule | " + " | ".join(axis_text(table.view.against, column) for column in table.columns) + " |")
        lines.append("|---" * (1 + len(table.columns)) + "|")
        compared = rows.get(table.metrics.relative_to) or [None] * len(table.columns)
        for rule, cells in rows.items():
            texts = [table.text(cell, other) for cell, other in zip(cells, compared, strict=True)]
            lines.append(f"| {RULES[rule].title} | " + " | ".join(texts) + " |")
        for name, metrics in references.items():
            text = " / ".join(table.metrics.text(metrics[metric]) for metric in table.metrics.shown)
            lines.append(f"| {name} | " + " | ".join([text] * len(table.columns)) + " |")
        lines.append("")
    return "\n".join(lines)


def _legend(table: Table, summaries: list[Summary]) -> str:
    metrics = table.metrics
    what = " / ".join(metrics.label(metric) for metric in metrics.shown)
    when = "best over the epochs" if metrics.use_best else "at the last epoch"
    choices = " and ".join(axis.replace("_", " ") for axis in table.choices)
    chosen = f", at the {choices} of the best {metrics.choice.replace('_', ' ')}" if choices else ""
    cells = [cell for rows in table.sections.values() for cells in rows.values() for cell in cells]
    several = any(len(cell.values) > 1 for cell in cells)
    if any(cell.edge for cell in cells):
        chosen += " (at the edge: the largest or smallest that was tried)"
    averaged = " and ".join(axis.replace("_", " ") for axis in table.view.averaged)
    spread = f"; mean ± standard deviation of n runs that differ in {averaged}" if several else ""
    relative = f"; x: times {RULES[metrics.relative_to].title}" if metrics.relative_to else ""
    data = ", ".join(sorted({summary.data for summary in summaries if summary.data}))
    devices = ", ".join(sorted({summary.device for summary in summaries if summary.device}))
    epochs = max(summary.epochs for summary in summaries)
    same = settings_text([summary.run for summary in summaries])
    return f"{what}, {when}{chosen}{spread}{relative}. {epochs} epochs; {same}; data {data or '-'}; {devices or '-'}."
