"""The README's figure and table: test accuracy, and the gap to backprop, against width of fully connected networks."""

import statistics
from collections.abc import Mapping
from typing import BinaryIO

from wide.models.rules import RULES
from wide.reports.drawing import AXIS_LABELS, GREY, bars_text, beside, legend, line, logarithmic, panels, plain, save
from wide.results import intervals, judging
from wide.results.claims import AT_5, CENTRED, PLAIN
from wide.results.judging import Setting
from wide.results.keeping import Kept
from wide.results.studies import SEVEN

# Lines and rows: what they are called, the rule, and where its rate is not the chosen one, that and how it is drawn.
SHOWN = (*((RULES[rule].title, rule) for rule in SEVEN.split()), (OTHER := "Align-zero, rate 5", "align_zero"))
BACKPROP = RULES["backprop"].title
STYLES = ((0, (1, 1)), "--", "-")  # of the baselines, from the worst

Values = Mapping[str, Mapping[int, Mapping[int, float]]]  # test accuracy in percent: {name: {width: {seed: value}}}


def accuracies(setting: Setting, kept: list[Kept]) -> Values:
    chosen, other = by_rule(setting, kept), by_rule(AT_5, kept) if setting is PLAIN else {}
    found = {name: (other if name == OTHER else chosen).get(rule) for name, rule in SHOWN}
    return {name: row for name, row in found.items() if row}


def by_rule(setting: Setting, kept: list[Kept]) -> dict[str, dict[int, dict[int, float]]]:
    found: dict[str, dict[int, dict[int, float]]] = {}
    for (rule, width, seed), value in sorted(setting.values(kept).items()):
        found.setdefault(rule, {}).setdefault(width, {})[seed] = value
    return found


def gaps(values: Values) -> Values:
    """Points behind backprop, of the seeds that both have."""
    backprop = values.get(BACKPROP, {})
    return {
        name: {
            width: common
            for width, seeds in row.items()
            if (common := {s: backprop[width][s] - v for s, v in seeds.items() if s in backprop.get(width, {})})
        }
        for name, row in values.items()
        if name != BACKPROP
    }


def draw(file: BinaryIO, kept: list[Kept], baselines: Mapping[str, float]) -> None:
    """A row of panels per setting that has runs: accuracies with the baselines, gaps."""
    found = [(setting, values) for setting in (PLAIN, CENTRED) if (values := accuracies(setting, kept))]
    figure, axes = panels(2 * len(found) or 1)
    counts = set()
    for k, (setting, values) in enumerate(found):
        left, right = axes[2 * k], axes[2 * k + 1]
        for panel, rows in ((left, values), (right, gaps(values))):
            counts |= _draw(panel, rows)
        for (name, value), style in zip(sorted(baselines.items(), key=lambda pair: pair[1]), STYLES, strict=False):
            left.axhline(value, color=GREY, linewidth=1.2, linestyle=style, label=name)
        right.axhline(0, color=RULES["backprop"].color, linewidth=1.5)
        left.set_title(setting.title, fontsize=10)
        left.set_ylabel("test accuracy (%)")
        right.set_ylabel("points behind backprop")
    legend(figure)
    several = f"\n({bars_text(counts)} seeds)" if max(counts, default=1) > 1 else ""
    save(
        figure, f"KMNIST, three hidden layers, {PLAIN.epochs} epochs: the wider, the closer to backprop?{several}", file
    )


def _draw(panel, rows: Values) -> set[int]:
    """A line per rule; returns the numbers of seeds."""
    widths = sorted({width for row in rows.values() for width in row})
    for number, (name, row) in enumerate(rows.items()):
        points = []
        for x, width in zip(beside(sorted(row), number / len(rows), widths), sorted(row), strict=True):
            values = row[width].values()
            spread = statistics.stdev(values) if len(values) > 1 else 0
            points.append((x, statistics.fmean(values), spread, len(values)))
        line(panel, dict(SHOWN)[name], points, label=name, **({"linestyle": ":"} if name == OTHER else {}))
    if widths:
        logarithmic(panel, widths, AXIS_LABELS["width"])
    plain(panel)
    return {len(seeds) for row in rows.values() for seeds in row.values()}


def findings(setting: Setting, kept: list[Kept]) -> str:
    """A sentence: gaps to backprop at the narrowest and at the widest network of which all rules have enough seeds."""
    found = {rule: judging.gaps(setting, kept, rule) for rule in ("align_ada", "align_zero", "fa", "dfa")}
    found = {rule: gaps for rule, gaps in found.items() if gaps}
    widths = sorted(set.intersection(*map(set, found.values()))) if found else []
    if len(widths) < 2:
        return ""
    ends = (widths[0], widths[-1])
    parts = [
        f"{RULES[rule].title} from " + " to ".join(_behind(list(gaps[width].values())) for width in ends)
        for rule, gaps in found.items()
    ]
    seeds = min(len(gaps[width]) for gaps in found.values() for width in ends)
    return (
        f"**{setting.title}: from width {ends[0]} to {ends[1]} the distance to backprop, in points of test accuracy, "
        f"goes for {', '.join(parts[:-1])} and {parts[-1]}** (mean [95% interval]; at least {seeds} seeds)."
    )


def _behind(values: list[float]) -> str:
    mean, low, high = intervals.of_mean(values)
    if mean < 0:
        mean, low, high = -mean, -high, -low
        return f"{mean:.1f} [{low:.1f}, {high:.1f}] ahead"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}] behind"


def section(kept: list[Kept], baselines: Mapping[str, float]) -> str:
    """For the README: findings, figure, table."""
    sentences = [text for setting in (PLAIN, CENTRED) if (text := findings(setting, kept))]
    figure = "![Test accuracy and gap to backprop against width](docs/accuracy.png)"
    return "\n\n".join([*sentences, figure, table(kept, baselines)])


def table(kept: list[Kept], baselines: Mapping[str, float]) -> str:
    """Mean ± standard deviation, and how many seeds; of the networks as the paper has them."""
    values = accuracies(PLAIN, kept)
    widths = sorted({width for row in values.values() for width in row})
    lines = [
        f"{PLAIN.title}, {PLAIN.epochs} epochs: test accuracy in %, mean ± standard deviation over seeds (how many; "
        "without: one)",
        "",
        "| | " + " | ".join(f"width {width}" for width in widths) + " |",
        "|---" * (1 + len(widths)) + "|",
    ]
    for name, row in values.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(width, {})) for width in widths) + " |")
    below = ", ".join(f"{name} {value:.1f}" for name, value in baselines.items())
    return "\n".join([*lines, "", f"On the same images: {below}."])


def _cell(seeds: Mapping[int, float]) -> str:
    values = list(seeds.values())
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"
