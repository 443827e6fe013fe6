"""What all figures share: their size, a rule's line and its bars, marks of runs that diverged, the legend, the file.

A figure is at most as wide as a page of text, so that it is read there without zooming in: two panels beside each
other, more below. A mark is hollow where it is one run, filled where it is a mean of several.

Figures are matplotlib's objects, without pyplot: whatever backend a notebook or a user has chosen is left alone.
"""

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import offset_copy

from wide.models.rules import RULES

AXIS_LABELS = {
    "width": "width (channels or units per layer)",
    "learning_rate": "learning rate",
    "data_limit": "training images",
}
GREY = "#8a8a8a"
ONE_RUN = "hollow: one run"  # in legends
DIVERGED = "at the edge: k of n runs diverged"


def panels(count: int, sharey: bool = False):
    """A figure, and its panels in rows of two."""
    columns, rows = min(count, 2), math.ceil(count / 2)
    figure = Figure(figsize=(5.8 if columns == 1 else 7.6, 1.6 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for panel in found[count:]:
        panel.remove()
    return figure, found[:count]


def save(figure, title: str, file: BinaryIO) -> None:
    letters = int(12 * figure.get_figwidth())  # of a line of this size, a little fewer than there is room for
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in title.split("\n")), fontsize=10)
    figure.savefig(file, format="png", dpi=150)


def bars_text(counts: Collection[int]) -> str:
    """What bars are, of groups with so many values; what these are follows."""
    return f"bars: standard deviation over n = {' to '.join(map(str, sorted({min(counts), max(counts)})))}"


def line(panel, rule: str, points: Sequence[tuple[float, float, float, int]], **style) -> None:
    """A rule's line through points (x, value, spread, number of runs), with bars where there is a spread.

    Args:
        style: what is not as in the rule's own, its label among it.
    """
    if not points:
        return
    x, y, spread, _ = zip(*points, strict=True)
    spec = RULES[rule]
    panel.plot(x, y, **({"label": spec.title, "markersize": 5} | spec.style | style))
    single = [(place, value) for place, value, _, count in points if count == 1]
    if single:
        hollow(panel, *zip(*single, strict=True), rule)
        panel.plot([], [], "o", markerfacecolor="white", markeredgecolor=GREY, markersize=5, label=ONE_RUN)
    if any(spread):
        panel.errorbar(x, y, spread, fmt="none", ecolor=spec.color, elinewidth=1, capsize=3)


def hollow(panel, x, y, rule: str) -> None:
    style = {"markerfacecolor": "white", "markeredgecolor": RULES[rule].color, "markersize": 5, "zorder": 3}
    panel.plot(x, y, RULES[rule].marker, **style)


def mark_diverged(panel, marks: Sequence[tuple[str, float, str]], top: bool) -> None:
    """Marks on the bad end of the panel, (rule, place, "k of n"), one above the other where several share a place.

    Args:
        top: whether that is its upper edge.
    """
    if not marks:
        return
    places = [place for _, place, _ in marks]
    rows = [places[:number].count(place) for number, place in enumerate(places)]
    _make_room(panel, 0.07 * (max(rows) + 1) + 0.02, top)
    for (rule, place, text), row in zip(marks, rows, strict=True):
        y = 0.035 + 0.07 * row
        y = 1 - y if top else y
        spec = RULES[rule]
        edge = panel.get_xaxis_transform()
        panel.plot(
            [place], [y], spec.marker, color=spec.color, markersize=5, transform=edge, clip_on=False, gid=DIVERGED
        )
        beside = offset_copy(edge, panel.figure, x=5, units="points")
        panel.text(place, y, text, transform=beside, color=spec.color, fontsize=8, va="center")
    panel.plot([], [], " ", label=DIVERGED)


def _make_room(panel, share: float, top: bool) -> None:
    """Give this share of the panel, at its top or bottom, to what has no value."""
    scale = panel.yaxis.get_transform()
    low, high = scale.transform(panel.get_ylim())
    more = (high - low) * share / (1 - share)
    low, high = (low, high + more) if top else (low - more, high)
    panel.set_ylim(*scale.inverted().transform([low, high]))


def beside(positions: Sequence[float], share: float, axis: Sequence[float]) -> list[float]:
    """Positions moved a little, so that the bars of several rules can be told apart.

    Args:
        share: the rule's place among the rules, from 0 to 1.
        axis: all positions of the logarithmic axis.
    """
    span = axis[-1] / axis[0] if len(axis) > 1 else 4
    return [x * span ** (0.04 * (share - 0.5)) for x in positions]


def logarithmic(panel, positions: Sequence[float], label: str) -> None:
    """A logarithmic axis with a tick at each position, and the same room on both sides where some have no value."""
    panel.set_xscale("log")
    room = (positions[-1] / positions[0]) ** 0.05 if len(positions) > 1 else 2
    panel.set_xlim(positions[0] / room, positions[-1] * room)
    panel.set_xticks(positions, [f"{x:g}" for x in positions], rotation=30 if len(positions) > 6 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(label)
    plain(panel)


def plain(panel) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def legend(figure) -> None:
    """The labels of all panels, each once, below the figure."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    rules = [spec.title for spec in RULES.values()]  # in their order; then what else there is, notes on marks last
    notes = [ONE_RUN, DIVERGED]
    labels = sorted(handles, key=lambda label: (label in notes, rules.index(label) if label in rules else len(rules)))
    if labels:
        found = [handles[label] for label in labels]
        columns = 4 if figure.get_figwidth() > 7 else 3
        figure.legend(found, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
