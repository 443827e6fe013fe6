"""The README's figure, findings and tables, and the figure of little data: fully connected networks beside backprop."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import BinaryIO

from wide.models.rules import RULES
from wide.reports.report import figures
from wide.results import intervals, judging
from wide.results.judging import Setting
from wide.results.keeping import Kept
from wide.results.settings import AT_5, CENTRED, FEW, PLAIN
from wide.results.studies import ALL, SEVEN

# Lines and rows: what they are called, the rule, and where its rate is not the chosen one, that and how it is drawn.
SHOWN = (*((RULES[rule].title, rule) for rule in ALL.split()), (OTHER := "Align-zero, rate 5", "align_zero"))
DRAWN = frozenset(SEVEN.split())  # in figures: the rules of the paper
BACKPROP = RULES["backprop"].title
STYLES = ((0, (1, 1)), "--", "-")  # of the baselines, from the worst

Values = Mapping[str, Mapping[int, Mapping[int, float]]]  # test accuracy in percent: {name: {place: {seed: value}}}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure: a row of panels per setting that has runs, accuracies and gaps to backprop, against `axis`."""

    title: str
    axis: str
    values: Callable[[Setting, list[Kept]], Values]


def against_width(setting: Setting, kept: list[Kept]) -> Values:
    chosen, other = by_rule({None: setting}, kept), by_rule({None: AT_5}, kept) if setting is PLAIN else {}
    found = {name: (other if name == OTHER else chosen).get(rule) for name, rule in SHOWN}
    return {name: row for name, row in found.items() if row}


def against_images(setting: Setting, kept: list[Kept]) -> Values:
    few = by_rule(FEW[setting.title], kept)
    return {name: few[rule] for name, rule in SHOWN if name != OTHER and rule in few}


def by_rule(settings: Mapping[int | None, Setting], kept: list[Kept]) -> dict[str, dict[int, dict[int, float]]]:
    """Values of settings by rule and place: that of the setting, or the width."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for place, setting in settings.items():
        for (rule, width, seed), value in sorted(setting.values(kept).items()):
            found.setdefault(rule, {}).setdefault(width if place is None else place, {})[seed] = value
    return found


WIDTHS = Plot(f"KMNIST, three hidden layers, {PLAIN.epochs} epochs", "width", against_width)
IMAGES = Plot("KMNIST, three hidden layers of width 1024, 900 updates", "data_limit", against_images)


def gaps(values: Values) -> Values:
    """Points behind backprop, of the seeds that both have."""
    backprop = values.get(BACKPROP, {})
    return {
        name: {
            place: common
            for place, seeds in row.items()
            if (common := {s: backprop[place][s] - v for s, v in seeds.items() if s in backprop.get(place, {})})
        }
        for name, row in values.items()
        if name != BACKPROP
    }


def draw(file: BinaryIO, plot: Plot, kept: list[Kept], baselines: Mapping[str, float]) -> None:
    """Args: baselines: test accuracies that are drawn as lines."""
    drawing = figures("drawing")
    found = [(setting, values) for setting in (PLAIN, CENTRED) if (values := plot.values(setting, kept))]
    figure, axes = drawing.panels(2 * len(found) or 1)
    counts = set()
    for k, (setting, values) in enumerate(found):
        left, right = axes[2 * k], axes[2 * k + 1]
        for panel, rows in ((left, values), (right, gaps(values))):
            counts |= _draw(drawing, panel, rows, plot.axis)
        for (name, value), style in zip(sorted(baselines.items(), key=lambda pair: pair[1]), STYLES, strict=False):
            left.axhline(value, color=drawing.GREY, linewidth=1.2, linestyle=style, label=name)
        right.axhline(0, color=RULES["backprop"].color, linewidth=1.5)
        left.set_title(setting.title, fontsize=10)
        left.set_ylabel("test accuracy (%)")
        right.set_ylabel("points behind backprop")
    drawing.legend(figure)
    several = f"\n({drawing.bars_text(counts)} seeds)" if max(counts, default=1) > 1 else ""
    drawing.save(figure, plot.title + several, file)


def _draw(drawing, panel, rows: Values, axis: str) -> set[int]:
    """A line per rule; returns the numbers of seeds."""
    places = sorted({place for row in rows.values() for place in row})
    drawn = {name: row for name, row in rows.items() if dict(SHOWN)[name] in DRAWN}
    for number, (name, row) in enumerate(drawn.items()):
        points = []
        for x, place in zip(drawing.beside(sorted(row), number / len(drawn), places), sorted(row), strict=True):
            values = row[place].values()
            spread = statistics.stdev(values) if len(values) > 1 else 0
            points.append((x, statistics.fmean(values), spread, len(values)))
        drawing.line(panel, dict(SHOWN)[name], points, label=name, **({"linestyle": ":"} if name == OTHER else {}))
    if places:
        drawing.logarithmic(panel, places, drawing.AXIS_LABELS[axis])
    drawing.plain(panel)
    return {len(seeds) for row in drawn.values() for seeds in row.values()}


def findings(setting: Setting, kept: list[Kept]) -> str:
    """A sentence: gaps to backprop at the narrowest and at the widest network of which all rules have enough seeds."""
    found = {rule: judging.gaps(setting, kept, rule) for rule in ("align_ada", "align_zero", "fa", "dfa")}
    found = {rule: row for rule, row in found.items() if row}
    widths = sorted(set.intersection(*map(set, found.values()))) if found else []
    if len(widths) < 2:
        return ""
    ends = (widths[0], widths[-1])
    parts = [
        f"{RULES[rule].title} goes from {' to '.join(_behind(list(row[width].values())) for width in ends)}"
        for rule, row in found.items()
    ]
    backprop = by_rule({None: setting}, kept)["backprop"]
    levels = " and ".join(f"{statistics.fmean(backprop[width].values()):.1f} %" for width in ends)
    seeds = sorted({len(row[width]) for row in found.values() for width in ends})
    return (
        f"**{setting.title}, from width {ends[0]} to width {ends[1]}: {', '.join(parts)}** (points of test accuracy, "
        f"beside backprop's {levels}; mean [95% interval] of {' to '.join(map(str, seeds))} seeds)."
    )


def _behind(values: list[float]) -> str:
    mean, low, high = intervals.of_mean(values)
    if mean < 0:
        mean, low, high = -mean, -high, -low
        return f"{mean:.1f} [{low:.1f}, {high:.1f}] ahead"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}] behind"


def section(kept: list[Kept], baselines: Mapping[str, float]) -> str:
    """For the README: findings, figure, tables."""
    sentences = [text for setting in (PLAIN, CENTRED) if (text := findings(setting, kept))]
    figure = "![Test accuracy and gap to backprop against width](docs/accuracy.png)"
    return "\n\n".join([*sentences, figure, table(kept, baselines)])


def table(kept: list[Kept], baselines: Mapping[str, float]) -> str:
    """Mean ± standard deviation, and how many seeds; of the networks as the paper has them."""
    values = against_width(PLAIN, kept)
    widths = sorted({width for row in values.values() for width in row})
    lines = [
        f"{PLAIN.title}, {PLAIN.epochs} epochs: test accuracy in %, mean ± standard deviation (seeds)",
        "",
        "| | " + " | ".join(f"width {width}" for width in widths) + " |",
        "|---" * (1 + len(widths)) + "|",
    ]
    for name, row in values.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(width, {})) for width in widths) + " |")
    below = ", ".join(f"{name} {value:.1f}" for name, value in baselines.items())
    others = (
        "Kolen-Pollack alone has weight decay ([the same for others](results/reports/mlp_decay.md)). Also: "
        "[centred outputs](results/reports/mlp_centred.md), [little data](docs/little_data.png)"
    )
    return "\n".join([*lines, "", f"On the same images: {below}. {others}."])


def _cell(seeds: Mapping[int, float]) -> str:
    values = list(seeds.values())
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"
