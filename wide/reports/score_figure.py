"""Alignment scores: a line per layer against width or training time; where there are two widths, a row per layer."""

import math
import statistics
from collections.abc import Mapping
from typing import BinaryIO

import matplotlib

from wide.reports.drawing import AXIS_LABELS, GREY, bars_text, beside, legend, logarithmic, panels, plain, save

MARKERS = "osD^vPX"
FEWEST = 3  # places that make a line


def draw_scores(file: BinaryIO, title: str, sections: Mapping[str, list], against: str) -> None:
    """A panel per section. `sections`: scores (alignment_report.LayerScore)."""
    figure, axes = panels(len(sections), sharey=True)
    counts = set()
    for panel, (section, scores) in zip(axes, sections.items(), strict=True):
        places = sorted({getattr(score, against) for score in scores})
        draw = _draw_lines if len(places) >= FEWEST else _draw_rows
        counts |= draw(panel, scores, against, places)
        panel.set_title(section, fontsize=10)
    legend(figure)
    save(figure, title + (f"\n({bars_text(counts)} seeds)" if max(counts) > 1 else ""), file)


def _draw_lines(panel, scores: list, against: str, places: list) -> set[int]:
    """Scores against places, darker nearer the input, and their controls dotted; returns numbers of seeds."""
    layers, counts = _layers(scores), set()
    for number, layer in enumerate(layers):
        color = _color(number, len(layers))
        for kind, style in (
            ("score", {"linestyle": "-", "label": layer}),
            ("control", {"linestyle": ":", "alpha": 0.6}),
        ):
            found = [_mean(scores, layer, kind, (against, place)) for place in places]
            counts |= {count for *_, count in found}
            bars = any(spread for _, spread, _ in found)
            x = beside(places, number / len(layers), places) if bars else places
            marker = None if len(places) > 20 else MARKERS[number % len(MARKERS)]
            means = [mean for mean, _, _ in found]
            panel.plot(x, means, markersize=4, marker=marker, color=color, **style)
            if bars:
                lines = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 3, "alpha": style.get("alpha", 1)}
                panel.errorbar(x, means, [spread for _, spread, _ in found], **lines)
    panel.plot([], [], color=GREY, linestyle=":", label="weights shuffled")
    if len(places) <= 10:
        logarithmic(panel, places, AXIS_LABELS.get(against, against))
    else:
        panel.set_xscale("log")
        panel.set_xlabel(AXIS_LABELS.get(against, against))
        panel.xaxis.set_major_formatter("{x:g}")
        plain(panel)
    panel.set_ylim(-0.02, 1.02)
    panel.set_ylabel("alignment score")
    return counts


def _draw_rows(panel, scores: list, against: str, places: list) -> set[int]:
    """A row per layer, the input's on top: its score at each place, and its controls'."""
    layers, counts = _layers(scores), set()
    for k, place in enumerate(places):
        for kind, fill in (("score", "full"), ("control", "none")):
            found = [_mean(scores, layer, kind, (against, place)) for layer in layers]
            counts |= {count for *_, count in found}
            y = [number + 0.24 * (k - (len(places) - 1) / 2) for number in range(len(layers))]
            label = f"{against} {place}" + (", weights shuffled" if kind == "control" else "")
            panel.errorbar(
                [mean for mean, _, _ in found], y, xerr=[spread for _, spread, _ in found], fmt=MARKERS[k],
                color=_color(k, 2), fillstyle=fill, markersize=5, elinewidth=1, capsize=2, label=label,
            )  # fmt: skip
    panel.set_yticks(range(len(layers)), layers)
    panel.set_ylim(len(layers) - 0.5, -0.5)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xlabel("alignment score")
    plain(panel)
    return counts


def _layers(scores: list) -> list[str]:
    return sorted({score.layer for score in scores})


def _color(number: int, count: int):
    return matplotlib.colormaps["viridis"](0.75 * number / max(count - 1, 1))


def _mean(scores: list, layer: str, kind: str, place: tuple[str, int]) -> tuple[float, float, int]:
    """Over seeds: mean, standard deviation, and how many."""
    against, where = place
    values = [getattr(s, kind) for s in scores if s.layer == layer and getattr(s, against) == where]
    values = [value for value in values if value is not None]
    if not values:
        return math.nan, 0, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0, len(values)
