"""Figures from tables, each kind made for its question.

Line figures show the last of the shown metrics against the table's axis, a panel per section and a line per rule.
Where the rates that were chosen differ along a line, each point is labelled with its own. Where all that a cell could
show has diverged, the rule's mark stands at the bad end of the panel, with the number of runs.
"""

import operator
import statistics
from collections.abc import Callable, Mapping
from typing import BinaryIO

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from wide.models.rules import RULES
from wide.reports.drawing import (
    AXIS_LABELS,
    GREY,
    bars_text,
    beside,
    legend,
    line,
    logarithmic,
    mark_diverged,
    panels,
    plain,
    save,
)
from wide.reports.tables import Cell, Table, axis_text, section_text


def draw_figure(
    file: BinaryIO, title: str, table: Table, references: Mapping[str, Mapping[str, float]], examples: int
) -> None:
    """Draw the figure that the table's view asks for, as PNG.

    Args:
        examples: where "all images" lie on an axis of training images.
    """
    figure = KINDS[table.view.figure](table, references, examples)
    bars = table.view.figure not in WITHOUT_BARS
    save(figure, title + (_bars_note(table) if bars else ""), file)


def _bars_note(table: Table) -> str:
    """What the bars are, where there are any."""
    counts = {len(cell.values) for rows in table.sections.values() for cells in rows.values() for cell in cells} - {0}
    averaged = " and ".join(axis.replace("_", " ") for axis in table.view.averaged)
    return f"\n({bars_text(counts)} runs that differ in {averaged})" if max(counts, default=1) > 1 else ""


def lines(table: Table, references, examples: int):
    """Shares as they are; losses on a logarithmic axis."""
    figure, axes = panels(len(table.sections), sharey=True)
    for panel, (section, rows) in zip(axes, table.sections.items(), strict=True):
        for name, metrics in references.items():
            panel.axhline(_scaled(table, metrics[_drawn(table)]), color=GREY, linewidth=1, label=name)
        if not table.metrics.percent:
            _logarithmic_values(panel)
        _draw_lines(panel, table, rows, examples)
        logarithmic(panel, _positions(table, examples), AXIS_LABELS[table.view.against])
        panel.set_title(section_text(section), fontsize=10)
    axes[0].set_ylabel(table.metrics.label(_drawn(table)))
    legend(figure)
    return figure


def gap(table: Table, references, examples: int):
    """Beside the lines: how far below backprop each rule is."""
    figure, axes = panels(2 * len(table.sections))
    for pair, rows in zip(zip(axes[::2], axes[1::2], strict=True), table.sections.values(), strict=True):
        _draw_lines(pair[0], table, rows, examples)
        _draw_gaps(pair[1], table, rows, examples)
        for panel in pair:
            logarithmic(panel, _positions(table, examples), AXIS_LABELS[table.view.against])
        pair[0].set_ylabel(table.metrics.label(_drawn(table)))
        pair[1].set_ylabel(f"gap to backprop ({'points' if table.metrics.percent else table.metrics.unit} below it)")
    legend(figure)
    return figure


def seeds(table: Table, references, examples: int):
    """Every seed a point, their mean a bar, a place for each rule; a panel per column."""
    figure, axes = panels(len(table.sections) * len(table.columns), sharey=True)
    places = [
        (section, column, {rule: cells[k] for rule, cells in rows.items()})
        for section, rows in table.sections.items()
        for k, column in enumerate(table.columns)
    ]
    for panel, (section, column, cells) in zip(axes, places, strict=True):
        for x, (rule, cell) in enumerate(cells.items()):
            _draw_seeds(panel, x, rule, cell, table)
        _mark(panel, table, [(rule, x, cell) for x, (rule, cell) in enumerate(cells.items())])
        panel.set_xlim(-0.5, len(cells) - 0.5)
        panel.set_xticks(range(len(cells)), [RULES[rule].title for rule in cells], rotation=30, ha="right")
        panel.set_title(section_text((*section, (table.view.against, column))), fontsize=10)
        plain(panel)
    axes[0].set_ylabel(table.metrics.label(_drawn(table)))
    legend(figure)
    return figure


def curves(table: Table, references, examples: int):
    """Every shown metric against the epoch, averaged over seeds; a panel for each, and for each column."""
    metrics = table.metrics.shown
    places = [
        (section, column, k, metric)
        for section in table.sections
        for k, column in enumerate(table.columns)
        for metric in metrics
    ]
    figure, axes = panels(len(places))
    for panel, (section, column, k, metric) in zip(axes, places, strict=True):
        rows, last = table.sections[section], 1
        for rule, cells in rows.items():
            if not cells[k].histories:
                continue
            means = _over_epochs(cells[k].histories, metric)
            last = max([last, *means])
            style = RULES[rule].style | {"markevery": max(len(means) // 8, 1), "markersize": 5}
            panel.plot([*means], [_scaled(table, mean) for mean in means.values()], label=RULES[rule].title, **style)
        _mark(panel, table, [(rule, 1, cells[k]) for rule, cells in rows.items()])
        panel.set_xlim(0.5, last + 0.5)
        panel.set_xlabel("epoch")
        panel.set_ylabel(table.metrics.label(metric))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(section_text((*section, (table.view.against, column))), fontsize=10)
        plain(panel)
    legend(figure)
    return figure


def _over_epochs(histories, metric: str) -> dict[int, float]:
    """The mean over seeds of a metric, by the epochs after which all of them were evaluated."""
    values = [dict(zip(history["epoch"], history[metric], strict=True)) for history in histories]
    common = [epoch for epoch in values[0] if all(epoch in one for one in values)]
    return {epoch: statistics.fmean(one[epoch] for one in values) for epoch in common}


def timing(table: Table, references, examples: int):
    """Time on a logarithmic axis, and its ratio to that of the rule that it is compared with."""
    figure, axes = panels(2 * len(table.sections))
    reference = table.metrics.relative_to
    for pair, rows in zip(zip(axes[::2], axes[1::2], strict=True), table.sections.values(), strict=True):
        _logarithmic_values(pair[0])
        _draw_lines(pair[0], table, rows, examples)
        pair[0].set_ylabel(table.metrics.label(_drawn(table)))
        places = _positions(table, examples)
        for rule, cells in rows.items():
            _draw_compared(pair[1], table, (rule, cells, rows.get(reference, cells)), operator.truediv, places)
        pair[1].set_ylabel(f"time, in multiples of {RULES[reference].title}'s")
        pair[1].set_ylim(bottom=0)
        for panel in pair:
            logarithmic(panel, _positions(table, examples), AXIS_LABELS[table.view.against])
    legend(figure)
    return figure


KINDS = {"lines": lines, "gap": gap, "seeds": seeds, "timing": timing, "curves": curves}
WITHOUT_BARS = ("seeds", "curves")


# ------------------------------------------------------------------------------------------------------------ pieces


def _logarithmic_values(panel) -> None:
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _draw_lines(panel, table: Table, rows: Mapping[str, list[Cell]], examples: int) -> None:
    metric, positions = _drawn(table), _positions(table, examples)
    for number, (rule, cells) in enumerate(rows.items()):
        places = beside(positions, number / len(rows), positions)
        there = [(x, cell) for x, cell in zip(places, cells, strict=True) if cell.values]
        line(panel, rule, [(x, _mean(c, table), _scaled(table, c.deviation(metric)), len(c.values)) for x, c in there])
        chosen = [", ".join(axis_text(axis, cell.chosen[axis]) for axis in table.choices) for _, cell in there]
        if len(set(chosen)) > 1:
            for (x, cell), text in zip(there, chosen, strict=True):
                small = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 7, "color": RULES[rule].color}
                panel.annotate(text, (x, _mean(cell, table)), **small)
    _mark(panel, table, [(rule, x, c) for rule, cells in rows.items() for x, c in zip(positions, cells, strict=True)])


def _mark(panel, table: Table, places: list[tuple[str, float, Cell]]) -> None:
    """Cells, (rule, place, cell), that diverged."""
    marks = [(rule, x, f"{cell.diverged} of {cell.runs}") for rule, x, cell in places if cell.status == "diverged"]
    mark_diverged(panel, marks, top=not table.metrics.higher)


def _draw_gaps(panel, table: Table, rows: Mapping[str, list[Cell]], examples: int) -> None:
    positions = _positions(table, examples)
    for number, (rule, cells) in enumerate(rows.items()):
        compared = (rule, cells, rows.get("backprop", cells))
        places = beside(positions, number / len(rows), positions)
        _draw_compared(panel, table, compared, lambda value, reference: reference - value, places)


def _draw_compared(panel, table: Table, rows: tuple[str, list[Cell], list[Cell]], how: Callable, places: list) -> None:
    """A rule's values compared with those of a reference, and the spread of what the runs' own comparisons give.

    Args:
        rows: rule, its cells, the reference's.
        how: f(value, value of the reference).
    """
    rule, cells, references = rows
    points = []
    for x, cell, reference in zip(places, cells, references, strict=True):
        if not (cell.values and reference.values):
            continue
        # A cell with values has all runs, in the grid's order: those at the same place have the same seed.
        pairs = [(_value(a, table), _value(b, table)) for a, b in zip(cell.values, reference.values, strict=False)]
        spread = statistics.stdev(how(*pair) for pair in pairs) if len(pairs) > 1 else 0
        points.append((x, how(_mean(cell, table), _mean(reference, table)), spread, len(pairs)))
    line(panel, rule, points)


def _draw_seeds(panel, x: int, rule: str, cell: Cell, table: Table) -> None:
    if not cell.values:
        return
    points = [_value(metrics, table) for metrics in cell.values]
    spec = RULES[rule]
    spread = [0.3 * (k - (len(points) - 1) / 2) / max(len(points) - 1, 1) for k in range(len(points))]
    panel.plot([x + dx for dx in spread], points, spec.marker, color=spec.color, markersize=5)
    panel.hlines(_mean(cell, table), x - 0.25, x + 0.25, color=spec.color, linewidth=1.5)


def _positions(table: Table, examples: int) -> list[float]:
    return [examples if column is None else column for column in table.columns]


def _drawn(table: Table) -> str:
    return table.metrics.shown[table.metrics.drawn]


def _mean(cell: Cell, table: Table) -> float:
    return _scaled(table, cell.mean(_drawn(table)))


def _value(metrics: Mapping[str, float], table: Table) -> float:
    return _scaled(table, metrics[_drawn(table)])


def _scaled(table: Table, value: float) -> float:
    return 100 * value if table.metrics.percent else value
