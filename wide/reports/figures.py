"""Figures from tables, each kind made for its question.

Line figures show the last of the shown metrics against the table's axis, a panel per section and a line per rule.
Where all that a cell could show has diverged, the rule's mark stands hollow on the lower edge of the panel.

Figures are matplotlib's objects, without pyplot: whatever backend a notebook or a user has chosen is left alone.
"""

import math
import operator
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import BinaryIO

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import offset_copy

from wide.models.rules import RULES
from wide.reports.distances import TITLES, predicted_slope
from wide.reports.tables import Cell, Table, section_text

AXIS_LABELS = {
    "width": "width (channels or units per layer)",
    "learning_rate": "learning rate",
    "data_limit": "training images",
}
GREY = "#8a8a8a"
HOLLOW = "hollow: diverged"  # in legends


def draw_figure(
    file: BinaryIO, title: str, table: Table, references: Mapping[str, Mapping[str, float]], examples: int
) -> None:
    """Draw the figure that the table's view asks for, as PNG.

    Args:
        examples: where "all images" lie on an axis of training images.
    """
    figure = KINDS[table.view.figure](table, references, examples)
    bars = table.view.figure not in WITHOUT_BARS
    _save(figure, title + (_bars_note(table) if bars else ""), file)


def _bars_note(table: Table) -> str:
    """What the bars are, where there are any."""
    counts = {len(cell.values) for rows in table.sections.values() for cells in rows.values() for cell in cells} - {0}
    averaged = " and ".join(axis.replace("_", " ") for axis in table.view.averaged)
    return f"\n({_bars(counts)} runs that differ in {averaged})" if max(counts, default=1) > 1 else ""


def _bars(counts: Collection[int]) -> str:
    """Of groups with so many values; what these are follows."""
    return f"bars: standard deviation over n = {_range(counts)}"


def _range(counts: Collection[int]) -> str:
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def lines(table: Table, references, examples: int):
    figure, panels = _panels(len(table.sections), sharey=True)
    for panel, (section, rows) in zip(panels, table.sections.items(), strict=True):
        _draw_lines(panel, table, rows, examples)
        for name, metrics in references.items():
            panel.axhline(_scaled(table, metrics[_drawn(table)]), color=GREY, linewidth=1, label=name)
        _logarithmic(panel, table, examples)
        panel.set_title(section_text(section), fontsize=10)
    panels[0].set_ylabel(table.metrics.label(_drawn(table)))
    _legend(figure)
    return figure


def gap(table: Table, references, examples: int):
    """Beside the lines: how far below backprop each rule is."""
    figure, panels = _panels(2 * len(table.sections))
    for pair, rows in zip(zip(panels[::2], panels[1::2], strict=True), table.sections.values(), strict=True):
        _draw_lines(pair[0], table, rows, examples)
        _draw_gaps(pair[1], table, rows, examples)
        for panel in pair:
            _logarithmic(panel, table, examples)
        pair[0].set_ylabel(table.metrics.label(_drawn(table)))
        pair[1].set_ylabel(f"gap to backprop ({'points' if table.metrics.percent else table.metrics.unit} below it)")
    _legend(figure)
    return figure


def seeds(table: Table, references, examples: int):
    """Every seed a point, their mean a bar, a place for each rule; a panel per column."""
    figure, panels = _panels(len(table.sections) * len(table.columns), sharey=True)
    places = [
        (section, column, {rule: cells[k] for rule, cells in rows.items()})
        for section, rows in table.sections.items()
        for k, column in enumerate(table.columns)
    ]
    for panel, (section, column, cells) in zip(panels, places, strict=True):
        for x, (rule, cell) in enumerate(cells.items()):
            _draw_seeds(panel, x, rule, cell, table)
            _mark_diverged(panel, rule, [x], [cell])
        panel.set_xlim(-0.5, len(cells) - 0.5)
        panel.set_xticks(range(len(cells)), [RULES[rule].title for rule in cells], rotation=30, ha="right")
        panel.set_title(section_text((*section, (table.view.against, column))), fontsize=10)
        _plain(panel)
    panels[0].set_ylabel(table.metrics.label(_drawn(table)))
    _legend(figure)
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
    figure, panels = _panels(len(places))
    for panel, (section, column, k, metric) in zip(panels, places, strict=True):
        rows, last = table.sections[section], 1
        for number, (rule, cells) in enumerate(rows.items()):
            _mark_diverged(panel, rule, [1], cells[k : k + 1], aside=_aside(number, len(rows)))
            if not cells[k].histories:
                continue
            means = _over_epochs(cells[k].histories, metric)
            last = max([last, *means])
            style = RULES[rule].style | {"markevery": max(len(means) // 8, 1), "markersize": 5}
            panel.plot([*means], [_scaled(table, mean) for mean in means.values()], label=RULES[rule].title, **style)
        panel.set_xlim(0.5, last + 0.5)
        panel.set_xlabel("epoch")
        panel.set_ylabel(table.metrics.label(metric))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(section_text((*section, (table.view.against, column))), fontsize=10)
        _plain(panel)
    _legend(figure)
    return figure


def _over_epochs(histories, metric: str) -> dict[int, float]:
    """The mean over seeds of a metric, by the epochs after which all of them were evaluated."""
    values = [dict(zip(history["epoch"], history[metric], strict=True)) for history in histories]
    common = [epoch for epoch in values[0] if all(epoch in one for one in values)]
    return {epoch: statistics.fmean(one[epoch] for one in values) for epoch in common}


def timing(table: Table, references, examples: int):
    """Time on a logarithmic axis, and its ratio to that of the rule that it is compared with."""
    figure, panels = _panels(2 * len(table.sections))
    reference = table.metrics.relative_to
    for pair, rows in zip(zip(panels[::2], panels[1::2], strict=True), table.sections.values(), strict=True):
        _draw_lines(pair[0], table, rows, examples)
        pair[0].set_yscale("log")
        pair[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        pair[0].yaxis.set_major_formatter("{x:g}")
        pair[0].yaxis.set_minor_formatter(NullFormatter())
        pair[0].set_ylabel(table.metrics.label(_drawn(table)))
        places = _positions(table, examples)
        for rule, cells in rows.items():
            _draw_compared(pair[1], table, (rule, cells, rows.get(reference, cells)), operator.truediv, places)
        pair[1].set_ylabel(f"time, in multiples of {RULES[reference].title}'s")
        pair[1].set_ylim(bottom=0)
        for panel in pair:
            _logarithmic(panel, table, examples)
    _legend(figure)
    return figure


KINDS = {"lines": lines, "gap": gap, "seeds": seeds, "timing": timing, "curves": curves}
WITHOUT_BARS = ("seeds", "curves")


# ------------------------------------------------------------------------------------------------------------ pieces


def _panels(count: int, sharey: bool = False):
    figure = Figure(figsize=(1.6 + 4.2 * count, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, sharey=sharey, squeeze=False)[0]


def _save(figure, title: str, file: BinaryIO) -> None:
    letters = int(11 * figure.get_figwidth())  # of a line of this size, a little fewer than there is room for
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in title.split("\n")), fontsize=11)
    figure.savefig(file, format="png", dpi=150)


def _draw_lines(panel, table: Table, rows: Mapping[str, list[Cell]], examples: int) -> None:
    metric, positions = _drawn(table), _positions(table, examples)
    for number, (rule, cells) in enumerate(rows.items()):
        means = [_mean(cell, table) for cell in cells]
        spread = [_scaled(table, cell.deviation(metric)) if len(cell.values) > 1 else 0 for cell in cells]
        _line(panel, rule, _beside(positions, number / len(rows), positions), means, spread)
        _mark_diverged(panel, rule, positions, cells, aside=_aside(number, len(rows)))


def _draw_gaps(panel, table: Table, rows: Mapping[str, list[Cell]], examples: int) -> None:
    positions = _positions(table, examples)
    for number, (rule, cells) in enumerate(rows.items()):
        compared = (rule, cells, rows.get("backprop", cells))
        places = _beside(positions, number / len(rows), positions)
        _draw_compared(panel, table, compared, lambda value, reference: reference - value, places)


def _draw_compared(panel, table: Table, rows: tuple[str, list[Cell], list[Cell]], how: Callable, places: list) -> None:
    """A rule's values compared with those of a reference, and the spread of what the runs' own comparisons give.

    Args:
        rows: rule, its cells, the reference's.
        how: f(value, value of the reference).
    """
    rule, cells, references = rows
    means, spread = [], []
    for cell, reference in zip(cells, references, strict=True):
        there = cell.values and reference.values
        means.append(how(_mean(cell, table), _mean(reference, table)) if there else None)
        # A cell with values has all runs, in the grid's order: those at the same place have the same seed.
        pairs = [(_value(a, table), _value(b, table)) for a, b in zip(cell.values, reference.values, strict=False)]
        spread.append(statistics.stdev(how(*pair) for pair in pairs) if len(pairs) > 1 else 0)
    _line(panel, rule, places, means, spread)


def _draw_seeds(panel, x: int, rule: str, cell: Cell, table: Table) -> None:
    if not cell.values:
        return
    points = [_value(metrics, table) for metrics in cell.values]
    spec = RULES[rule]
    spread = [0.3 * (k - (len(points) - 1) / 2) / max(len(points) - 1, 1) for k in range(len(points))]
    panel.plot([x + dx for dx in spread], points, spec.marker, color=spec.color, markersize=5)
    panel.hlines(_mean(cell, table), x - 0.25, x + 0.25, color=spec.color, linewidth=1.5)


def _mark_diverged(panel, rule: str, positions: list[float], cells: list[Cell], aside: float = 0) -> None:
    """Hollow marks on the lower edge, `aside` points to the right, so that those of several rules can be told apart."""
    places = [x for x, cell in zip(positions, cells, strict=True) if cell.status == "diverged"]
    if not places:
        return
    edge = offset_copy(panel.get_xaxis_transform(), panel.figure, x=aside, units="points")
    hollow = {"linestyle": "none", "markersize": 4, "markerfacecolor": "white"}
    style = {"marker": RULES[rule].marker, "markeredgecolor": RULES[rule].color}
    panel.plot(places, [0] * len(places), transform=edge, clip_on=False, zorder=5, **hollow, **style)
    panel.plot([], [], marker="o", markeredgecolor=GREY, label=HOLLOW, **hollow)


def _aside(number: int, count: int) -> float:
    """Points to the right for the marks of one of several rules."""
    return 4.5 * (number - (count - 1) / 2)


def _line(panel, rule: str, positions: list[float], values: list, spread: list | None = None) -> None:
    """A rule's line through the values that are there, with bars where there is a spread."""
    there = [k for k, value in enumerate(values) if value is not None]
    if not there:
        return
    x, y = [positions[k] for k in there], [values[k] for k in there]
    panel.plot(x, y, label=RULES[rule].title, markersize=5, **RULES[rule].style)
    if spread and any(spread):
        bars = [spread[k] for k in there]
        panel.errorbar(x, y, bars, fmt="none", ecolor=RULES[rule].color, elinewidth=1, capsize=3)


def _beside(positions: Sequence[float], share: float, axis: Sequence[float]) -> list[float]:
    """Positions moved a little, so that the bars of several rules can be told apart.

    Args:
        share: the rule's place among the rules, from 0 to 1.
        axis: all positions of the logarithmic axis.
    """
    span = axis[-1] / axis[0] if len(axis) > 1 else 4
    return [x * span ** (0.04 * (share - 0.5)) for x in positions]


def _positions(table: Table, examples: int) -> list[float]:
    return [examples if column is None else column for column in table.columns]


def _drawn(table: Table) -> str:
    return table.metrics.shown[table.metrics.drawn]


def _mean(cell: Cell, table: Table) -> float | None:
    return _scaled(table, cell.mean(_drawn(table))) if cell.values else None


def _value(metrics: Mapping[str, float], table: Table) -> float:
    return _scaled(table, metrics[_drawn(table)])


def _scaled(table: Table, value: float) -> float:
    return 100 * value if table.metrics.percent else value


def _logarithmic(panel, table: Table, examples: int) -> None:
    positions = _positions(table, examples)
    panel.set_xscale("log")
    room = (positions[-1] / positions[0]) ** 0.05 if len(positions) > 1 else 2
    panel.set_xlim(positions[0] / room, positions[-1] * room)  # the same where some are missing
    panel.set_xticks(positions, [f"{x:g}" for x in positions], rotation=30 if len(positions) > 7 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(AXIS_LABELS[table.view.against])
    _plain(panel)


def _plain(panel) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure) -> None:
    """The labels of all panels, each once, beside the figure."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    rules = [spec.title for spec in RULES.values()]  # in their order; what else there is after them, HOLLOW last
    labels = sorted(handles, key=lambda label: (label == HOLLOW, rules.index(label) if label in rules else len(rules)))
    if labels:
        figure.legend([handles[label] for label in labels], labels, loc="outside right center", frameon=False)


# ----------------------------------------------------------------------------------------------------- alignment scores

MARKERS = "osD^vPX"


def draw_scores(file: BinaryIO, title: str, sections: Mapping[str, list], against: str) -> None:
    """Alignment scores per layer (lines, darker nearer the input) and their controls (dashed), a panel per section."""
    figure, panels = _panels(len(sections), sharey=True)
    for panel, (section, scores) in zip(panels, sections.items(), strict=True):
        layers = sorted({score.layer for score in scores})
        for number, layer in enumerate(layers):
            lightness = 0.75 * number / max(len(layers) - 1, 1)
            style = {"color": matplotlib.colormaps["viridis"](lightness), "marker": MARKERS[number % len(MARKERS)]}
            of_layer = [score for score in scores if score.layer == layer]
            aside = number / len(layers)
            _draw_score(panel, of_layer, "score", against, aside, label=layer, linestyle="-", **style)
            _draw_score(panel, of_layer, "control", against, aside, label=None, linestyle=":", alpha=0.6, **style)
        panel.plot([], [], color=GREY, linestyle=":", label="weights shuffled")
        panel.set_title(section, fontsize=10)
        panel.set_xlabel(AXIS_LABELS.get(against, against))
        panel.set_ylim(-0.02, 1.02)
        panel.set_xscale("log")
        places = sorted({getattr(score, against) for score in scores})
        if len(places) <= 10:
            panel.set_xticks(places, [str(place) for place in places])
            panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        _plain(panel)
    panels[0].set_ylabel("alignment score")
    _legend(figure)
    places = [(name, score.layer, getattr(score, against)) for name, scores in sections.items() for score in scores]
    counts = set(Counter(places).values())
    _save(figure, title + (f"\n({_bars(counts)} seeds)" if max(counts) > 1 else ""), file)


def _draw_score(panel, scores: list, kind: str, against: str, aside: float, **style) -> None:
    """The mean over seeds at every place, with bars for their spread; marks only where there are few places.

    Args:
        aside: the layer's place among the layers, from 0 to 1, by which bars are moved a little.
    """
    places = sorted({getattr(score, against) for score in scores})
    values = [[getattr(s, kind) for s in scores if getattr(s, against) == place] for place in places]
    defined = [[value for value in group if value is not None] for group in values]
    means = [statistics.fmean(group) if group else math.nan for group in defined]
    if len(places) > 20:
        style["marker"] = None
    spread = [statistics.stdev(group) if len(group) > 1 else 0 for group in defined]
    if any(spread):
        places = _beside(places, aside, places)
    panel.plot(places, means, markersize=4, **style)
    if any(spread):
        bars = {"ecolor": style["color"], "elinewidth": 1, "capsize": 3, "alpha": style.get("alpha", 1)}
        panel.errorbar(places, means, spread, fmt="none", **bars)


def draw_distances(file: BinaryIO, title: str, lines: Mapping, layers: tuple[str, ...]) -> None:
    """Distance from theory against width, both logarithmic: a row per quantity, a column per layer, a line per rule.

    The dotted grey line has the slope that theory predicts.

    Args:
        lines: distance_report.Line by (quantity, layer, rule).
    """
    figure = Figure(figsize=(1.6 + 3.4 * len(layers), 3.0 * len(TITLES) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(TITLES), len(layers), sharex=True, sharey="row", squeeze=False)
    for (quantity, what), panels in zip(TITLES.items(), rows, strict=True):
        for layer, panel in zip(layers, panels, strict=True):
            found = {rule: line for (q, place, rule), line in lines.items() if (q, place) == (quantity, layer)}
            panel.set_title(layer if panel in rows[0] else "", fontsize=10)
            if found:
                _draw_distance(panel, found, predicted_slope(quantity, layer, layers))
            else:
                panel.text(0.5, 0.5, "does not change", ha="center", transform=panel.transAxes, color=GREY, fontsize=9)
            _plain(panel)
        bottom, top = panels[-1].get_ylim()
        panels[-1].set_ylim(bottom / 3, top)  # room for the slopes
        panels[0].set_ylabel("\n".join(textwrap.wrap(what, 26)))
    for panel in rows[-1]:
        panel.set_xlabel("width")
    _legend(figure)
    counts = {count for line in lines.values() for count in line.counts}
    bars = (
        f"bars: standard deviation of the logarithm over n = {_range(counts)} seeds" if max(counts) > 1 else "one seed"
    )
    _save(
        figure, f"{title}\n({bars}; in the panels: fitted slopes; dotted: slope of theory, of smooth activations)", file
    )


def _draw_distance(panel, lines: Mapping, theory: float) -> None:
    widths = sorted({width for line in lines.values() for width in line.widths})
    for rule, line in lines.items():
        spec = RULES[rule]
        panel.plot(line.widths, line.means, label=spec.title, markersize=4, **spec.style)
        bars = {"fmt": "none", "ecolor": spec.color, "elinewidth": 1, "capsize": 2}
        below = [mean - mean / factor for mean, factor in zip(line.means, line.deviations, strict=True)]
        above = [mean * factor - mean for mean, factor in zip(line.means, line.deviations, strict=True)]
        panel.errorbar(line.widths, line.means, [below, above], **bars)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(widths, [str(width) for width in widths])
    panel.xaxis.set_minor_locator(NullLocator())
    of_theory = [line for rule, line in lines.items() if RULES[rule].feedback is None] or list(lines.values())
    top = max(max(line.means) for line in of_theory)
    through = [top * 1.3 * (width / widths[0]) ** theory for width in widths]
    of_theory = {"color": GREY, "linestyle": (0, (1, 1)), "linewidth": 2, "label": "slope of theory"}
    panel.plot(widths, through, **of_theory)
    above = {"xytext": (0, 5), "textcoords": "offset points", "color": GREY, "fontsize": 8, "ha": "right"}
    panel.annotate(f"{theory:g}", (widths[-1], through[-1]), **above)
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    slopes = [f"{RULES[rule].title} {line.slope:.2f}" for rule, line in lines.items() if line.slope is not None]
    panel.text(0.03, 0.03, "\n".join(slopes), transform=panel.transAxes, fontsize=6.5, va="bottom", bbox=box)


def draw_accuracies(file: BinaryIO, title: str, tables: Mapping[str, Mapping[str, Mapping[int, list[float]]]]) -> None:
    """Accuracy against width: a panel per setting, a line per rule, bars for the standard deviation over seeds.

    Args:
        tables: {setting: {rule: {width: values of the seeds, in percent}}}.
    """
    figure, panels = _panels(max(len(tables), 1))
    counts = set()
    for panel, (setting, rows) in zip(panels, tables.items(), strict=False):
        widths = sorted({width for row in rows.values() for width in row})
        for number, (rule, row) in enumerate(rows.items()):
            places = sorted(row)
            means = [statistics.fmean(row[width]) for width in places]
            spread = [statistics.stdev(row[width]) if len(row[width]) > 1 else 0.0 for width in places]
            counts |= {len(row[width]) for width in places}
            _line(panel, rule, _beside(places, number / len(rows), widths), means, spread)
        panel.set_xscale("log")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(AXIS_LABELS["width"])
        panel.set_title(setting, fontsize=10)
        _plain(panel)
    panels[0].set_ylabel("test accuracy (%)")
    _legend(figure)
    bars = f"\n({_bars(counts)} seeds)" if max(counts, default=1) > 1 else ""
    _save(figure, title + bars, file)
