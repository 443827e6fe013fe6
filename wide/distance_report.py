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

The outputs themselves change by a number of order 1, and so do not vanish against their start; two rules whose
updates differ by a relative 1/sqrt(n) end at outputs that differ by 1/sqrt(n): the mean square falls like 1/n.
A share of flipped units counts there as it is, and not as its root: an output sums over all of them.

All constants depend on learning rate and number of updates; the slopes do not, where networks are wide enough.
"""

import csv
import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, BinaryIO

from wide import UserError
from wide.files import csv_text
from wide.recorders import Angles, Changes, Gaps
from wide.report import figures, write_report
from wide.rules import RULES
from wide.runs import FINISHED, RunFolder
from wide.tables import data_text, settings_text, unusual_text

if TYPE_CHECKING:
    from wide.study import Study

ANGLE, ACTIVITY, WEIGHT = "degrees_to_backprop", "relative_activity_change", "relative_weight_change"
GAP = "mean_squared_gap"
TITLES = {
    ANGLE: "angle to backprop's gradient (degrees)",
    ACTIVITY: "relative change of the activity that it reads",
    WEIGHT: "relative change of its weight",
    GAP: "mean squared distance of outputs from backprop's",
}
# What theory says of angles and outputs, it says of these: no width turns rules with other feedback towards backprop.
OF_THEORY = ("backprop", "align_ada", "align_zero", "align_prop")
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


@dataclasses.dataclass(frozen=True)
class Line:
    """Of one rule, quantity and layer: the geometric mean over seeds at every width.

    `deviations` are factors, the exponentials of the logarithms' standard deviations; 1 for one seed.
    """

    widths: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def slope(self) -> float | None:
        """Of the logarithm of the mean against that of the width, by least squares; None with fewer than three."""
        if len(self.widths) < 3 or min(self.means) <= 0:
            return None
        return statistics.linear_regression([math.log(w) for w in self.widths], [math.log(m) for m in self.means]).slope


def predicted_slope(quantity: str, layer: str, layers: tuple[str, ...]) -> float:
    """The exponent of the width (see the docstring of the module), of a smooth activation function."""
    if quantity == GAP:
        return -1.0
    return -1.0 if quantity == WEIGHT and layer not in (layers[0], layers[-1]) else -0.5


# Of the figure: title and slope of theory.
HIDDEN_ANGLE = "angle to backprop's gradient (degrees), hidden layers"
ACTIVITIES = "relative change of activities"
ENDS = "relative change of weights, first layer and readout"
BETWEEN = "relative change of weights, between hidden layers"
AFTER = [f"after {updates} update{'s' * (updates > 1)}" for updates in (1, 10, 100, 1000)]
PANELS = ((HIDDEN_ANGLE, -0.5), (ACTIVITIES, -0.5), (ENDS, -0.5), (BETWEEN, -1.0), *((after, -1.0) for after in AFTER))


def panel_of(quantity: str, layer: str, layers: tuple[str, ...]) -> str | None:
    """Where the figure shows it; angles of the readout are in the table alone."""
    if quantity == GAP:
        return layer
    if quantity == ANGLE:
        return None if layer == layers[-1] else HIDDEN_ANGLE
    if quantity == ACTIVITY:
        return ACTIVITIES
    return BETWEEN if predicted_slope(quantity, layer, layers) == -1 else ENDS


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
    """Angles, and changes of activities and weights, against width (see experiments.Report)."""

    def check(self, study: "Study") -> None:
        if len(study.experiment.data_limits) * len(study.experiment.learning_rates) > 1:
            raise UserError("--data-limits and --learning-rates take one value here; for others run the command again")

    def has(self, study: "Study", folder: RunFolder) -> bool:
        return folder.status(study.epochs) in FINISHED

    def scored_epochs(self, study: "Study") -> tuple[int, ...]:
        return ()

    def write(self, study: "Study") -> str:
        distances = [d for folder in study.folders for d in read_distances(folder, study.epochs)]
        if not distances:
            raise UserError(
                f"no run has {Angles.file} or {Gaps.file} of epoch {study.epochs}; delete {study.outputs} to train "
                "them anew"
            )
        updates = self.updates(study)
        when = "" if study.experiment.compared else f", after {updates} updates"
        title = f"{study.title}{when}{unusual_text(study.runs)}"
        lines = make_lines(distances)
        layers = tuple(sorted({layer for _, layer, _ in lines}))  # blocks.0, blocks.1, ..., readout

        def draw(file: BinaryIO) -> None:
            figures("distance_figure").draw_distances(file, title, panel_lines(distances, layers))

        text = _markdown(title, lines, layers, study)
        return write_report(
            study.report_path,
            csv_text([dataclasses.asdict(distance) for distance in distances], header=True),
            text,
            draw,
        )

    def updates(self, study: "Study") -> int:
        """Those before what is recorded: all but the last of the epoch."""
        run = study.runs[0]
        return study.epochs * (run.data_limit or study.subject.examples) // run.batch_size - 1


def _markdown(title: str, lines: dict, layers: tuple[str, ...], study: "Study") -> str:
    counts = sorted({count for line in lines.values() for count in line.counts})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    legend = (
        f"Geometric mean over n = {seeds} seeds per width, before the last update; slope: of log(mean) against "
        f"log(width), by least squares; theory: see wide/distance_report.py; {settings_text(study.runs)}; "
        f"{data_text(study.folders)}."
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
