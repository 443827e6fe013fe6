"""How far networks are from the theory of infinitely wide ones, against width, after a fixed number of updates.

What theory predicts, for hidden layers of width n in NTK parameterisation, z = W a / sqrt(n) with W of order 1. The
error at a hidden activity is of order 1/sqrt(n) (it comes through the readout's 1/sqrt(n)), so a fixed number of
updates changes

- an entry of a hidden weight (n x n) by (error 1/sqrt(n)) x (activity 1) / sqrt(n) = 1/n: in Frobenius norm by 1, where
  the weight has n. The relative change falls like 1/n. (Its operator norm, also 1, is compared with sqrt(n).)
- an entry of the first weight (n x inputs) and of the readout (outputs x n) by 1/sqrt(n): in Frobenius norm by 1, where
  the weight has sqrt(n). Their relative change falls like 1/sqrt(n).
- an activity, through these weights, by 1/sqrt(n). It is of order 1, so its relative change falls like 1/sqrt(n).

A rule that reads activities, or weights to send errors back, in the initial network is thus off by a relative
1/sqrt(n), and so, in radians, is the angle to backprop. But the derivative of ReLU jumps: a change of 1/sqrt(n) in what
it reads flips it for a share 1/sqrt(n) of the units, and a vector in which a share s of entries is wrong is off by
sqrt(s). Rules that read ReLU's derivative in the initial network (Align-ada, Align-zero) may therefore fall as slowly
as n^(-1/4). Align-prop reads it in the current network. FA and DFA have random feedback, which no width turns towards
backprop.

The outputs themselves change by a number of order 1. How far two rules' outputs are from each other depends on how far
their kernels are, which are means over the units of a layer: changes of single activities, of 1/sqrt(n), have random
signs there and average to 1/n (Dyer and Gur-Ari 2020; Huang and Yau 2020, of smooth activations). So outputs that are
equal in infinitely wide networks differ by 1/n, and the mean square falls like 1/n^2. Of ReLU's derivative in the
initial network, about sqrt(n) of n units are flipped, with random signs: a mean over units is off by n^(1/4) / n, and
the mean square falls like n^(-3/2). The first update of the Align rules is backprop's own, and no distance is left.

All constants depend on learning rate and number of updates; the slopes do not, where networks are wide enough.
"""

import csv
import dataclasses
import math
import statistics
from typing import BinaryIO

from wide import UserError
from wide.models.rules import RULES
from wide.reports.distances import ACTIVITY, ANGLE, GAP, OF_THEORY, TITLES, WEIGHT, Line, panel_of, predicted_slope
from wide.reports.report import figures, write_report
from wide.reports.shown import Shown
from wide.reports.tables import data_text, settings_text, unusual_text
from wide.runs.files import csv_text
from wide.runs.folder import FINISHED, RunFolder
from wide.training.gaps import Gaps
from wide.training.recorders import Angles, Changes

EXACT = 0.05  # degrees: what rounding in single precision makes of equal gradients


@dataclasses.dataclass(frozen=True)
class Distance:
    """One quantity of one layer of a run, before the last update of an epoch. Layers are numbered from the input.

    Of the distance of outputs, which has no layer, `layer` is the number of updates in words.
    """

    rule: str
    width: int
    seed: int
    quantity: str
    layer: str
    value: float


def read_distances(folder: RunFolder, epoch: int) -> list[Distance]:
    """What a run recorded of an epoch; angles that are zero but for rounding are left out.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for file, quantities in ((Angles.file, (ANGLE,)), (Changes.file, (ACTIVITY, WEIGHT))):
        path = folder.path / file
        if not path.exists():
            continue
        try:
            rows = [
                row
                for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
                if int(row["epoch"]) == epoch
            ]
            for quantity in quantities:
                values = {row["layer"]: float(row[quantity]) for row in rows if row[quantity]}
                found += [_distance(folder, quantity, layer, value) for layer, value in values.items()]
        except (KeyError, ValueError, TypeError) as error:
            raise folder.damaged(path, error) from error
    found += _read_gaps(folder, epoch)
    return [d for d in found if d.value > (EXACT if d.quantity == ANGLE else 0)]


def _read_gaps(folder: RunFolder, epochs: int) -> list[Distance]:
    """Distances of outputs, after any epoch up to this one."""
    path = folder.path / Gaps.file
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        there = [(int(row["updates"]), float(row[GAP])) for row in rows if int(row["epoch"]) <= epochs]
    except (KeyError, ValueError, TypeError) as error:
        raise folder.damaged(path, error) from error
    return [_distance(folder, GAP, f"after {n} update{'s' * (n > 1)}", value) for n, value in there]


def _distance(folder: RunFolder, quantity: str, layer: str, value: float) -> Distance:
    run = folder.run
    return Distance(run.rule, run.width, run.seed, quantity, layer.removesuffix(".layer"), value)


def make_lines(distances: list[Distance]) -> dict[tuple[str, str, str], Line]:
    """By (quantity, layer, rule)."""
    grouped: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for d in distances:
        grouped.setdefault((d.quantity, d.layer, d.rule), {}).setdefault(d.width, []).append(d.value)
    return {key: _line(dict(sorted(by_width.items()))) for key, by_width in grouped.items()}


def panel_lines(distances: list[Distance], layers: tuple[str, ...]) -> dict[tuple[str, str], Line]:
    """By (title of a panel, rule); of every run the geometric mean over the panel's layers."""
    runs: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = {}
    for d in distances:
        if panel := panel_of(d.quantity, d.layer, layers):
            runs.setdefault((panel, d.rule), {}).setdefault((d.width, d.seed), []).append(d.value)
    found = {}
    for key, by_run in runs.items():
        by_width: dict[int, list[float]] = {}
        for (width, _), values in sorted(by_run.items()):
            by_width.setdefault(width, []).append(statistics.geometric_mean(values))
        found[key] = _line(by_width)
    return found


def _line(by_width: dict[int, list[float]]) -> Line:
    groups = list(by_width.values())
    return Line(
        widths=tuple(by_width),
        means=tuple(statistics.geometric_mean(group) for group in groups),
        deviations=tuple(math.exp(statistics.stdev(map(math.log, g))) if len(g) > 1 else 1.0 for g in groups),
        counts=tuple(len(group) for group in groups),
    )


class DistanceReport:
    """Angles, and changes of activities and weights, against width (see shown.Report)."""

    def check(self, shown: Shown) -> None:
        if len({(run.data_limit, run.learning_rate) for run in shown.runs}) > 1:
            raise UserError("--data-limits and --learning-rates take one value here; for others run the command again")

    def has(self, shown: Shown, folder: RunFolder) -> bool:
        return folder.status(shown.epochs) in FINISHED

    def scored_epochs(self, shown: Shown) -> tuple[int, ...]:
        return ()

    def write(self, shown: Shown) -> str:
        distances = [d for folder in shown.folders for d in read_distances(folder, shown.epochs)]
        if not distances:
            raise UserError(
                f"no run has {Angles.file} or {Gaps.file} of epoch {shown.epochs}; delete {shown.path.parent} to train "
                "them anew"
            )
        compared = any(distance.quantity == GAP for distance in distances)
        when = "" if compared else f", after {self.updates(shown)} updates"
        title = f"{shown.title}{when}{unusual_text(shown.runs)}"
        lines = make_lines(distances)
        layers = tuple(sorted({layer for _, layer, _ in lines}))  # blocks.0, blocks.1, ..., readout

        def draw(file: BinaryIO) -> None:
            figures("distance_figure").draw_distances(file, title, panel_lines(distances, layers))

        text = _markdown(title, lines, layers, shown)
        return write_report(
            shown.path,
            csv_text([dataclasses.asdict(distance) for distance in distances], header=True),
            text,
            draw,
        )

    def updates(self, shown: Shown) -> int:
        """Those before what is recorded: all but the last of the epoch."""
        run = shown.runs[0]
        return shown.epochs * (run.data_limit or shown.examples) // run.batch_size - 1


def _markdown(title: str, lines: dict, layers: tuple[str, ...], shown: Shown) -> str:
    counts = sorted({count for line in lines.values() for count in line.counts})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    legend = (
        f"Geometric mean over n = {seeds} seeds per width, before the last update; slope: of log(mean) against "
        f"log(width), by least squares; theory: see wide/reports/distance_report.py; {settings_text(shown.runs)}; "
        f"{data_text(shown.folders)}."
    )
    text = [f"# {title}", "", legend, ""]
    for quantity, what in TITLES.items():
        widths = sorted({w for (q, _, _), line in lines.items() if q == quantity for w in line.widths})
        if not widths:
            continue
        text += [
            f"## {what}",
            "",
            "| | rule | " + " | ".join(f"width {w}" for w in widths) + " | slope | theory |",
        ]
        text.append("|---" * (4 + len(widths)) + "|")
        for (_, layer, rule), line in sorted(
            ((key, line) for key, line in lines.items() if key[0] == quantity), key=lambda pair: pair[0][1]
        ):
            values = dict(zip(line.widths, line.means, strict=True))
            cells = [f"{values[w]:.3g}" if w in values else "-" for w in widths]
            none = quantity in (ANGLE, GAP) and rule not in OF_THEORY
            theory = "none" if none else f"{predicted_slope(quantity, layer, layers):g}"
            slope = "-" if line.slope is None else f"{line.slope:.2f}"
            text.append(f"| {layer} | {RULES[rule].title} | {' | '.join(cells)} | {slope} | {theory} |")
        text.append("")
    return "\n".join(text)
