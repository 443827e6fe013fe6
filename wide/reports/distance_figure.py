"""Distance from theory against width: a panel per quantity, both axes logarithmic, with the slope of theory dotted."""

import math
import statistics
from collections.abc import Mapping
from typing import BinaryIO

from wide.models.rules import RULES
from wide.reports.distances import OF_THEORY, PANELS, Line
from wide.reports.drawing import AXIS_LABELS, GREY, bars_text, legend, line, logarithmic, panels, save


def draw_distances(file: BinaryIO, title: str, lines: Mapping[tuple[str, str], Line]) -> None:
    """
    Args:
        lines: by (title of a panel, rule).
    """
    shown = [panel for panel in PANELS if any(place == panel[0] for place, _ in lines)]
    figure, axes = panels(len(shown))
    for panel, (what, slope) in zip(axes, shown, strict=True):
        _draw(panel, {rule: one for (place, rule), one in lines.items() if place == what}, slope)
        panel.set_title(what, fontsize=9)
    legend(figure)
    counts = {count for one in lines.values() for count in one.counts}
    bars = f"{bars_text(counts)} seeds, of the logarithm; " if max(counts) > 1 else ""
    save(figure, f"{title}\n({bars}dotted: slope of theory, of smooth activations)", file)


def _draw(panel, lines: Mapping[str, Line], slope: float) -> None:
    widths = sorted({width for one in lines.values() for width in one.widths})
    for rule, one in lines.items():
        line(panel, rule, [(w, m, 0, n) for w, m, n in zip(one.widths, one.means, one.counts, strict=True)])
        below = [mean - mean / factor for mean, factor in zip(one.means, one.deviations, strict=True)]
        above = [mean * factor - mean for mean, factor in zip(one.means, one.deviations, strict=True)]
        bars = {"fmt": "none", "ecolor": RULES[rule].color, "elinewidth": 1, "capsize": 2}
        panel.errorbar(one.widths, one.means, [below, above], **bars)
    panel.set_yscale("log")
    logarithmic(panel, widths, AXIS_LABELS["width"])
    # Through the middle of the rules that theory is about, as far as they are there.
    places = [
        (w, m)
        for rule in OF_THEORY
        if rule in lines
        for w, m in zip(lines[rule].widths, lines[rule].means, strict=True)
    ]
    if not places:
        return
    middle = statistics.fmean(math.log(mean) - slope * math.log(width) for width, mean in places)
    through = [math.exp(middle) * width**slope for width in widths]
    panel.plot(widths, through, color=GREY, linestyle=(0, (1, 1)), linewidth=2, label="slope of theory")
    above = {"xytext": (0, 6), "textcoords": "offset points", "color": GREY, "fontsize": 9, "ha": "right"}
    panel.annotate(f"{slope:g}", (widths[-1], through[-1]), **above)
