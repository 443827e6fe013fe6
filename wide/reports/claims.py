"""The paper's claims, and what the runs in results/ say of each: docs/claims.md.

The rules stand in wide/claims.py. They were written when the first runs were there (the Add task, distance from theory)
and before all others, and have been made stricter since; what was added because of what runs had shown says so.

- A claim names a figure and the range in which it lies if the claim holds. The figure is computed for every seed by
  itself, rules being compared run by run at the same seed (the same initial network and batches), and its mean has a
  t-interval of 95% over the n seeds. Standard deviations have one by chi-square, shares of runs one by Clopper and
  Pearson.
- "holds here" if the interval lies within the range; "does not hold here" if it lies outside of it altogether; "cannot
  be told here" if it does both, or with fewer than three seeds.
- Widths are those at which every compared rule has at least three common seeds; "the widest" is the largest of them.
  Slopes are over all widths at which no compared run diverged, and need two.
- Accuracies are test accuracies after the last epoch, losses the lowest test loss of any epoch, as published. A run
  that diverged counts as guessing; one failed that diverged or ends no better than guessing.
- A rule is comparable to another if it is at most MARGIN points behind (Add: its loss at most 1.1 times as large).
- bf16 does no harm if accuracies stay within MARGIN points of those in fp32, angles within MARGIN degrees, alignment
  scores within 0.02.
- Changes follow theory if their exponent is within 0.25 of its; angles to backprop fall if theirs is below 0.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import torch

from wide import UserError
from wide.models.rules import RULES
from wide.reports import intervals
from wide.reports.distance_report import ACTIVITY, ANGLE, WEIGHT, read_distances
from wide.reports.report import figures
from wide.reports.results import DATASETS, FULL, TRAINED, Kept
from wide.training.tasks import AddTask

MARGIN = 2.0  # percentage points, degrees
SCORE_MARGIN = 0.02
LEAST_SEEDS = 3
PRECISION_RULES = ("backprop", "align_ada", "align_zero", "fa", "dfa", "last_layer")
HOLDS, DOES_NOT, UNTOLD = "holds here", "does not hold here", "cannot be told here"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that may be compared: those with these fields of `Run`, trained for so many epochs.

    Args:
        fields: but rule, width and seed.
        loss: whether test_loss is what counts, and not test_accuracy.
        data: what was trained on, for the headline.
    """

    title: str
    fields: Mapping[str, object]
    epochs: int
    loss: bool = False
    data: str = ""

    @functools.cached_property
    def chance(self) -> float:
        """What guessing gives, in the unit of `values`."""
        return math.log(AddTask(self.fields["variant"], torch.device("cpu")).chance("test")) if self.loss else 10.0

    def values(self, kept: list[Kept]) -> dict[tuple[str, int, int], float]:
        """What counts, by (rule, width, seed): percent, or the natural logarithm of the loss.

        Raises:
            UserError: the runs were trained on different data, or two are of one rule, width and seed.
        """
        return by_place(self.runs(kept), self.value, self.title)

    def runs(self, kept: list[Kept]) -> list[Kept]:
        found = [one for one in kept if one.is_of(self.fields, self.epochs)]
        if len({one.data for one in found}) > 1:
            raise UserError(f"{self.title}: runs on different data cannot be compared; keep those of one")
        return found

    def value(self, one: Kept) -> float:
        if one.diverged(self.epochs):
            return self.chance
        rows = one.rows[: self.epochs]
        if self.loss:
            return math.log(min(row["test_loss"] for row in rows))
        if rows[-1]["test_accuracy"] is None:
            raise UserError(f"{one.folder.path} was not evaluated after epoch {len(rows)}; take it out of results/")
        return 100 * rows[-1]["test_accuracy"]

    def failed(self, one: Kept) -> bool:
        """Whether it ended no better than guessing."""
        value = self.value(one)
        return value >= self.chance if self.loss else value <= self.chance


def by_place(runs: list[Kept], value: Callable[[Kept], float], where: str) -> dict[tuple[str, int, int], float]:
    """The runs' values by (rule, width, seed).

    Raises:
        UserError: two runs have the same; `where` says which runs these are.
    """
    values = {(one.run.rule, one.run.width, one.run.seed): value(one) for one in runs}
    if len(values) < len(runs):
        raise UserError(f"{where}: runs that differ in more than rule, width and seed; keep one of each")
    return values


ADD = {"dataset": "add", "learning_rate": 0.001, "batch_size": 50}
KMNIST = Setting(
    "KMNIST",
    FULL | {"dataset": "kmnist", "learning_rate": 5.0},
    100,
    data="trained on 5,334 of the official test images",
)
CIFAR = Setting(
    "CIFAR-10", FULL | {"dataset": "cifar", "learning_rate": 5.0}, 5, data="trained on 45,000 images of a JPEG copy"
)
# Added when the curves of KMNIST at widths 8 to 32 had been seen, before width 64 and these of CIFAR-10 were trained.
EARLY = dataclasses.replace(KMNIST, title="KMNIST, first 20 epochs", epochs=20)
EARLY_CIFAR = Setting(
    "CIFAR-10, 600 updates",
    FULL | {"dataset": "cifar", "learning_rate": 5.0, "data_limit": 3000, "batch_size": 50},
    10,
)
ADDS = tuple(
    Setting(f"Add, {variant}", ADD | {"variant": variant}, 200, loss=True) for variant in ("published", "corrected")
)
IMAGES = (KMNIST, CIFAR)
ACCURACIES = (KMNIST, EARLY, CIFAR, EARLY_CIFAR)
PAIR = {"rule": "pair", "data_limit": None, "precision": "fp32"}
PAIRS = (
    Setting("KMNIST", PAIR | {"dataset": "kmnist"}, 20),
    Setting("CIFAR-10", PAIR | {"dataset": "cifar"}, 5),
    Setting("Add, published", {"dataset": "add", "rule": "pair", "variant": "published"}, 40),
)
LITTLE = tuple(
    Setting(
        f"CIFAR-10, {images} images",
        TRAINED | {"dataset": "cifar", "learning_rate": 5.0, "data_limit": images, "precision": "fp32"},
        150,
    )
    for images in (45, 150, 450, 1500)
)
PRECISIONS = {name: Setting("KMNIST, 10 epochs", KMNIST.fields | {"precision": name}, 10) for name in ("fp32", "bf16")}
PRECISION_PAIRS = {
    name: Setting("KMNIST", PAIR | {"dataset": "kmnist", "precision": name}, 10) for name in ("fp32", "bf16")
}
THEORY = Setting("KMNIST, 9 updates", FULL | {"dataset": "kmnist", "batch_size": 50, "data_limit": 500}, 1)


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, one value per seed, and the range in which it lies if the claim holds.

    Args:
        what: it is, in words.
        values: of the seeds; empty where runs are missing.
        lower, upper: of the range.
        missing: why there are too few values.
        estimate: what of the values the figure is, with its interval (wide/reports/intervals.py).
        premise: whether the claim says something only if this holds; then it does not count as a part of it.
    """

    what: str
    values: tuple[float, ...]
    lower: float = -math.inf
    upper: float = math.inf
    missing: str = ""
    estimate: Callable[[Sequence[float]], tuple[float, float, float]] = intervals.of_mean
    premise: bool = False

    @property
    def verdict(self) -> str:
        if len(self.values) < LEAST_SEEDS:
            return UNTOLD
        _, low, high = self.estimate(self.values)
        if self.lower < low and high < self.upper:
            return HOLDS
        return DOES_NOT if high <= self.lower or low >= self.upper else UNTOLD

    @property
    def text(self) -> str:
        if not self.values:
            return "-"
        if len(self.values) < LEAST_SEEDS:
            return f"{statistics.fmean(self.values):.3g} (n = {len(self.values)})"
        value, low, high = self.estimate(self.values)
        return f"{value:.3g} [{low:.3g}, {high:.3g}] (n = {len(self.values)})"

    @property
    def why(self) -> str:
        if len(self.values) < LEAST_SEEDS:
            return self.missing or f"{len(self.values)} seeds; {LEAST_SEEDS} are needed"
        range_ = " and ".join(
            f"{word} {bound:g}"
            for word, bound in (("above", self.lower), ("below", self.upper))
            if math.isfinite(bound)
        )
        how = {HOLDS: "is", DOES_NOT: "is not", UNTOLD: "is only partly"}[self.verdict]
        return f"the interval {how} {range_}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the figures that it stands on."""

    title: str
    needs: str
    figures: Callable[[list[Kept]], list[Figure]]


# ------------------------------------------------------------------------------------------------ figures of each claim


def common(values: Mapping[tuple[str, int, int], float], rules: tuple[str, ...]) -> dict[int, list[int]]:
    """Seeds that all rules have, by width, where there are enough."""
    widths = sorted({width for _, width, _ in values})
    seeds = sorted({seed for _, _, seed in values})
    there = {w: [s for s in seeds if all((rule, w, s) in values for rule in rules)] for w in widths}
    return {width: found for width, found in there.items() if len(found) >= LEAST_SEEDS}


def by_width(values: Mapping, rules: tuple[str, ...], figure: Callable[..., float]) -> dict[int, dict[int, float]]:
    """{width: {seed: figure of the rules' values}}, at the widths with enough seeds."""
    return {
        width: {seed: figure(*(values[rule, width, seed] for rule in rules)) for seed in seeds}
        for width, seeds in common(values, rules).items()
    }


def at_widest(table: dict[int, dict[int, float]], what: str, **range_) -> Figure:
    return at_width(max(table, default=0), table, what, **range_)


def at_width(width: int, table: dict[int, dict[int, float]], what: str, **range_) -> Figure:
    if not table:
        return Figure(what, (), **range_, missing="no width has three seeds of all rules")
    return Figure(f"{what}, at width {width}", tuple(table[width].values()), **range_)


def over_widths(table: dict[int, dict[int, float]], what: str, **range_) -> Figure:
    """The slope of the figure against log2(width), by least squares, for every seed that has all widths."""
    if len(table) < 2:
        return Figure(what, (), **range_, missing="fewer than two widths have three seeds of all rules")
    seeds = sorted(set.intersection(*(set(row) for row in table.values())))
    logs = [math.log2(width) for width in table]
    slopes = tuple(statistics.linear_regression(logs, [row[seed] for row in table.values()]).slope for seed in seeds)
    return Figure(f"{what}, per doubling of the width ({min(table)} to {max(table)})", slopes, **range_)


def gaps(setting: Setting, kept: list[Kept], rule: str, other: str = "backprop") -> dict[int, dict[int, float]]:
    """How far a rule is behind another: in points, or in log(loss)."""
    sign = -1 if setting.loss else 1
    return by_width(setting.values(kept), (other, rule), lambda a, b: sign * (a - b))


def unit(setting: Setting) -> str:
    return "log(loss)" if setting.loss else "points"


def align_with_width(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in PAIRS:
        tables = scores(setting, kept)
        above = {w: {s: v["last"] - v["control"] for s, v in row.items()} for w, row in tables.items()}
        last = {w: {s: v["last"] for s, v in row.items()} for w, row in tables.items()}
        where = f"{setting.title}: alignment score, mean of layers, after {setting.epochs} epochs"
        found.append(at_widest(above, f"{where}, above its control", lower=0))
        found.append(over_widths(last, where, lower=0))
    return found


def falls_with_training(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in PAIRS:
        tables = scores(setting, kept)
        change = {w: {s: v["last"] - v["first"] for s, v in row.items()} for w, row in tables.items()}
        above = {w: {s: v["last"] - v["control"] for s, v in row.items()} for w, row in tables.items()}
        where = f"{setting.title}: alignment score, mean of layers"
        found.append(at_widest(change, f"{where}, epoch {setting.epochs} less epoch 1", upper=0))
        what = f"{where}, above its control after {setting.epochs} epochs"
        found.append(at_width(min(above, default=0), above, what, lower=0))  # where they are closest
    return found


def scores(setting: Setting, kept: list[Kept]) -> dict[int, dict[int, dict[str, float]]]:
    """{width: {seed: {"first", "last", "control"}}}: means over layers, of runs that came through."""
    table: dict[int, dict[int, dict[str, float]]] = {}
    for one in setting.runs(kept):
        if len(one.rows) < setting.epochs or one.diverged():
            continue
        first, last = one.rows[0], one.rows[setting.epochs - 1]
        found = {
            "first": _mean_of(first, "score_"), "last": _mean_of(last, "score_"), "control": _mean_of(last, "control_")
        }  # fmt: skip
        if all(value is not None for value in found.values()):
            table.setdefault(one.run.width, {})[one.run.seed] = found
    return {width: dict(sorted(row.items())) for width, row in sorted(table.items()) if len(row) >= LEAST_SEEDS}


def _mean_of(row: Mapping[str, float | None], beginning: str) -> float | None:
    values = [value for name, value in row.items() if name.startswith(beginning) and value is not None]
    return statistics.fmean(values) if values else None


def approach(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in (*ACCURACIES, *ADDS):
        for rule in ("align_ada", "align_zero"):
            runs = [one for one in setting.runs(kept) if one.run.rule in ("backprop", rule)]
            unstable = {one.run.width for one in runs if one.diverged(setting.epochs)}
            table = {width: row for width, row in gaps(setting, kept, rule).items() if width not in unstable}
            what = f"{setting.title}: {RULES[rule].title} behind backprop, change in {unit(setting)}"
            found.append(over_widths(table, what, upper=0))
    return found


def comparable(kept: list[Kept]) -> list[Figure]:
    return [
        at_widest(
            gaps(setting, kept, rule), f"{setting.title}: {RULES[rule].title} behind backprop, points", upper=MARGIN
        )
        for setting in ACCURACIES
        for rule in ("align_ada", "align_zero")
    ]


def grows_with_training(kept: list[Kept]) -> list[Figure]:
    found = []
    for rule in ("align_ada", "align_zero"):
        early, late = (gaps(setting, kept, rule) for setting in (EARLY, KMNIST))
        growth = {w: {s: late[w][s] - early[w][s] for s in row if s in early[w]} for w, row in late.items()}
        what = f"KMNIST: {RULES[rule].title} behind backprop, points, epoch {KMNIST.epochs} less epoch {EARLY.epochs}"
        found += [at_width(width, growth, what, lower=0) for width in growth] or [at_widest(growth, what, lower=0)]
    return found


def fall_behind(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting, rules in ((KMNIST, ("fa", "dfa")), (CIFAR, ("fa", "dfa")), *((setting, ("fa",)) for setting in ADDS)):
        for rule in rules:
            table = gaps(setting, kept, rule, other="align_ada")
            what = f"{setting.title}: {RULES[rule].title} behind Align-ada, {unit(setting)}"
            found.append(at_widest(table, what, lower=0))
    return found


def little_data(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in LITTLE:
        learned = by_width(
            setting.values(kept), ("backprop", "align_ada"), lambda a, b, chance=setting.chance: a - chance
        )
        what = f"{setting.title}: backprop above chance, points (a premise)"
        found.append(dataclasses.replace(at_widest(learned, what, lower=0), premise=True))
        table = gaps(setting, kept, "align_ada")
        what = f"{setting.title}: Align-ada behind backprop, points"
        found.append(at_widest(table, what, upper=MARGIN))
    return found


def align_prop(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in (*IMAGES, *ADDS):
        table = gaps(setting, kept, "align_prop")
        bound = math.log(1.1) if setting.loss else MARGIN
        found.append(
            at_widest(table, f"{setting.title}: Align-prop behind backprop, {unit(setting)}", upper=round(bound, 3))
        )
    return found


def robust(kept: list[Kept]) -> list[Figure]:
    """The deviation over seeds, and how many runs failed."""
    found = []
    for setting in IMAGES:
        for rule in ("align_ada", "align_zero"):
            table = by_width(setting.values(kept), (rule,), lambda a: a)
            what = f"{setting.title}: {RULES[rule].title}, standard deviation over seeds, points"
            figure = at_widest(table, what, upper=MARGIN)
            found.append(dataclasses.replace(figure, estimate=intervals.of_deviation))
    for setting in (*IMAGES, *ADDS):
        for rule in ("align_ada", "align_zero"):
            runs = [one for one in setting.runs(kept) if one.run.rule == rule]
            widths = sorted({one.run.width for one in runs})
            where = f", runs of widths {widths[0]} to {widths[-1]}" if widths else ""
            what = f"{setting.title}: {RULES[rule].title}, share of runs that failed{where}"
            values = tuple(float(setting.failed(one)) for one in runs)
            found.append(Figure(what, values, upper=0.05, missing="no runs", estimate=intervals.of_share))
    return found


def cost(kept: list[Kept]) -> list[Figure]:
    """On every machine that took times, at every width."""
    found = []
    machines = sorted({one.run.timed_on for one in kept} - {None})
    for rule in ("align_ada", "align_zero"):
        what, range_ = f"{RULES[rule].title}: time of an epoch, in multiples of backprop's", {"upper": 2.0}
        for machine in machines:
            timed = [one for one in kept if one.run.timed_on == machine]
            seconds = by_place(timed, lambda one: one.rows[-1]["seconds"], f"times on {machine}")
            table = by_width(seconds, ("backprop", rule), lambda a, b: b / a)
            found += [at_width(width, table, f"{what}, on {machine}", **range_) for width in table]
        if not machines:
            found.append(Figure(what, (), **range_, missing="no timed runs (train_cifar.py 7) are here"))
    return found


def theory(kept: list[Kept]) -> list[Figure]:
    """Exponents of the width, for every seed over all widths that have enough seeds."""
    found = []
    for quantity, layers, predicted in (
        (ACTIVITY, ("blocks.1", "blocks.2", "readout"), -0.5),
        (WEIGHT, ("blocks.0", "readout"), -0.5),
        (WEIGHT, ("blocks.1", "blocks.2"), -1.0),
    ):
        names = {-0.5: "1/sqrt(width)", -1.0: "1/width"}
        what = (
            f"{quantity.replace('_', ' ')} under backprop ({', '.join(layers)}), exponent of the width "
            f"({names[predicted]})"
        )
        found.append(exponent(kept, ("backprop", quantity, layers), what, (predicted - 0.25, predicted + 0.25)))
    for rule in ("align_ada", "align_zero", "align_prop"):
        for layer in ("blocks.0", "blocks.1", "blocks.2"):
            source = (rule, ANGLE, (layer,))
            what = f"angle of {RULES[rule].title} to backprop in {layer}, exponent of the width"
            found.append(exponent(kept, source, what, (-math.inf, 0)))
    return found


def exponent(kept: list[Kept], source: tuple[str, str, tuple[str, ...]], what: str, range_: tuple) -> Figure:
    """Of the geometric mean over layers of a recorded quantity. `source`: rule, quantity, layers."""
    rule, quantity, layers = source
    logs = {}
    for one in THEORY.runs(kept):
        if one.run.rule == rule:
            distances = read_distances(one.folder, THEORY.epochs)
            values = [d.value for d in distances if d.quantity == quantity and d.layer in layers]
            if len(values) == len(layers):
                logs[rule, one.run.width, one.run.seed] = statistics.fmean(math.log2(value) for value in values)
    figure = over_widths(
        by_width(logs, (rule,), lambda a: a), f"{THEORY.title}: {what}", lower=range_[0], upper=range_[1]
    )
    return dataclasses.replace(figure, what=figure.what.replace(", per doubling of the width", ", widths"))


def in_bf16(kept: list[Kept]) -> list[Figure]:
    """What bf16 changes, seed by seed, at every width that was trained in both."""
    found = []
    for rule in PRECISION_RULES:
        accuracies = {name: _of_rule(setting.values(kept), rule) for name, setting in PRECISIONS.items()}
        found += less_fp32(accuracies, f"KMNIST, 10 epochs: {RULES[rule].title}, test accuracy, points", MARGIN)
    for rule in ("align_ada", "align_zero", "fa", "dfa"):
        angles = {name: _angles(setting, kept, rule) for name, setting in PRECISIONS.items()}
        what = f"KMNIST, after 10 epochs: angle of {RULES[rule].title} to backprop, mean of layers, degrees"
        found += less_fp32(angles, what, MARGIN)
    last = {
        name: {(w, s): v["last"] for w, row in scores(setting, kept).items() for s, v in row.items()}
        for name, setting in PRECISION_PAIRS.items()
    }
    return found + less_fp32(last, "KMNIST, after 10 epochs: alignment score, mean of layers", SCORE_MARGIN)


def less_fp32(values: Mapping[str, Mapping[tuple[int, int], float]], what: str, margin: float) -> list[Figure]:
    """Figures of what bf16 gives less what fp32 gives. `values`: by precision and (width, seed)."""
    flat = {(name, *place): value for name, table in values.items() for place, value in table.items()}
    table = by_width(flat, ("fp32", "bf16"), lambda fp32, bf16: bf16 - fp32)
    what, range_ = f"{what}: bf16 less fp32", {"lower": -margin, "upper": margin}
    return [at_width(width, table, what, **range_) for width in table] or [at_widest(table, what, **range_)]


def _of_rule(values: Mapping[tuple[str, int, int], float], rule: str) -> dict[tuple[int, int], float]:
    return {(width, seed): value for (name, width, seed), value in values.items() if name == rule}


def _angles(setting: Setting, kept: list[Kept], rule: str) -> dict[tuple[int, int], float]:
    """The mean over layers of a rule's angle to backprop, by width and seed."""
    found = {}
    for one in setting.runs(kept):
        angles = [d.value for d in read_distances(one.folder, setting.epochs) if d.quantity == ANGLE]
        if one.run.rule == rule and angles:
            found[one.run.width, one.run.seed] = statistics.fmean(angles)
    return found


CLAIMS = (
    Claim("Weight changes align, and alignment grows with width", "pairs at two widths or more", align_with_width),
    Claim("Alignment falls with training, and stays above its control", "pairs", falls_with_training),
    Claim("The Align rules approach backprop with width", "backprop, Align-ada, Align-zero at two widths", approach),
    Claim(
        "In wide networks the Align rules' accuracy is comparable to backprop's", "the same, at one width", comparable
    ),
    Claim(
        "The Align rules' gap grows with training (not a claim of the paper; found in runs of widths 8 to 32)",
        "runs that were evaluated after epochs 20 and 100",
        grows_with_training,
    ),
    Claim("FA and DFA fall behind", "Align-ada, FA, DFA", fall_behind),
    Claim("Align-ada is comparable to backprop with little data", "train_cifar.py 4", little_data),
    Claim("Align-prop is comparable to backprop", "backprop, Align-prop", align_prop),
    Claim("The Align rules are robust over seeds", "Align-ada, Align-zero", robust),
    Claim("A step of the Align rules costs at most twice one of backprop", "train_cifar.py 7", cost),
    Claim("Changes of activities and weights, and angles to backprop, fall with width", "train_kmnist.py 3", theory),
    Claim("bf16 does no harm (not a claim of the paper)", "the same runs in fp32 and bf16, with angles", in_bf16),
)


# ------------------------------------------------------------------------------------------------------------- the page


def page(kept: list[Kept], notes: Mapping[str, str] | None = None) -> str:
    """docs/claims.md.

    Args:
        notes: by a claim's title, what is known of why.
    """
    notes = NOTES if notes is None else notes
    rules = __doc__.partition("\n\n")[2].strip()
    lines = [
        "# The paper's claims, and what the runs here say",
        "",
        "Made from [results/](../results/README.md) by `python3 collect_results.py`. "
        f"{rules.replace('MARGIN', f'{MARGIN:g}')}",
        "",
        "What does not hold here may hold elsewhere. Networks are narrower than the paper's (8 to 512). The learning",
        "rate is 5 everywhere, the largest of the published 5, 2 and 1 (Add: 0.001); none was searched for each rule.",
        "Data:",
        "",
        *(f"- {text}." for text in DATASETS.values()),
        "",
        "| claim | holds here | does not | cannot be told |",
        "|---|---|---|---|",
    ]
    found = {claim: claim.figures(kept) for claim in CLAIMS}
    for claim, parts in found.items():
        told = [part.verdict for part in parts if not part.premise]
        counts = [told.count(verdict) for verdict in (HOLDS, DOES_NOT, UNTOLD)]
        lines.append(f"| {claim.title} | {' | '.join(map(str, counts))} |")
    for claim, parts in found.items():
        lines += ["", f"## {claim.title}", "", f"Needs: {claim.needs}.", ""]
        lines += ["| figure | mean [95% interval] | verdict | why |", "|---|---|---|---|"]
        lines += [f"| {part.what} | {part.text} | {part.verdict} | {part.why} |" for part in parts]
        if note := notes.get(claim.title):
            lines += ["", note]
    return "\n".join([*lines, ""])


# What is known of why a claim does not hold here. No numbers: those are in the tables, which follow from results/.
THEORY_NOTE = (
    "Where angles of Align-ada and Align-zero do not fall: these rules read ReLU's derivative in the initial network, "
    "which falls more slowly than changes of activities do (wide/distance_report.py), and the first blocks' errors go "
    "through the normalisation of pixels that hardly vary over a batch, such as those at the edge of an image. It "
    "divides by their standard deviation, so few pixels make up much of the gradient, and with them the angle. With a "
    "larger epsilon in the normalisation the first block's angle falls with width where it rose "
    "([docs/results.md](results.md)). "
    "It is no matter of rounding: in double precision the angles are the same. Align-prop reads everything but the "
    "weights in the current network, and its angle falls in every block."
)
WIDE_NOTE = (
    "The width of each figure is the widest at which enough seeds are trained so far. The claim is about wide "
    "networks, and says nothing of widths at the narrow end of the paper's: a verdict there stands for that width."
)
APPROACH_NOTE = (
    "The rules take errors from the initial network, so their gap grows as training leads away from it (the next "
    "claim but one), and a wide network stays near for longer: widths compare at equal numbers of updates, and fewer "
    "updates stand for a wider network. The figures of few updates (KMNIST's first 20 epochs, 600 updates of "
    "CIFAR-10) were added when the curves of KMNIST at widths 8 to 32 had been seen; the other runs were trained "
    "after that. After all epochs of KMNIST nothing has converged, and Align-zero's accuracy peaks and falls again, "
    "later and higher in wider networks ([docs/results.md](results.md))."
)
LITTLE_NOTE = (
    "A gap says something only where backprop is above chance. More images are more updates here, as published (the "
    "number of epochs is fixed), so that networks move further from where they began."
)
ROBUST_NOTE = (
    "On CIFAR-10 Align-zero's runs that failed did not diverge: their training loss falls in the first epochs or "
    "not at all, and then rises. Align-zero forms its updates from the initial network alone, so nothing corrects "
    "them once the current one is elsewhere, which happens sooner in narrow networks "
    "([docs/results.md](results.md))."
)
NOTES: Mapping[str, str] = {
    "The Align rules are robust over seeds": ROBUST_NOTE,
    "Changes of activities and weights, and angles to backprop, fall with width": THEORY_NOTE,
    "In wide networks the Align rules' accuracy is comparable to backprop's": WIDE_NOTE,
    "The Align rules approach backprop with width": APPROACH_NOTE,
    "Align-ada is comparable to backprop with little data": LITTLE_NOTE,
}


# --------------------------------------------------------------------------------------------------------- the headline

SHOWN = ("backprop", "align_prop", "align_ada", "align_zero", "fa", "dfa", "last_layer")


def headline(kept: list[Kept]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Test accuracies in percent: {setting: {rule: {width: values of the seeds}}}, of settings that have runs."""
    found = {}
    for setting in IMAGES:
        table: dict[str, dict[int, list[float]]] = {}
        for (rule, width, _), value in sorted(setting.values(kept).items()):
            table.setdefault(rule, {}).setdefault(width, []).append(value)
        if table:
            found[f"{setting.title}, {setting.epochs} epochs\n({setting.data})"] = {
                rule: table[rule] for rule in SHOWN if rule in table
            }
    return found


def draw_headline(file: BinaryIO, kept: list[Kept]) -> None:
    found = headline(kept)
    curves = {title: table for title, table in found.items() if len({w for row in table.values() for w in row}) > 1}
    figures().draw_accuracies(file, "Test accuracy against width, learning rate 5", curves or found)


def headline_table(kept: list[Kept]) -> str:
    """For the README: the first setting alone, mean ± standard deviation, n in the head."""
    found = headline(kept)
    if not found:
        return "No runs yet."
    title, table = next(iter(found.items()))
    widths = sorted({width for row in table.values() for width in row})
    lines = [
        f"{' '.join(title.splitlines())}, learning rate 5 for every rule: test accuracy in %, mean ± standard "
        "deviation over seeds (n; without ±: one seed). Nothing has converged:",
        "",
        "| | " + " | ".join(f"width {width}" for width in widths) + " |",
        "|---" * (1 + len(widths)) + "|",
    ]
    for rule, row in table.items():
        lines.append(f"| {RULES[rule].title} | " + " | ".join(_cell(row.get(width)) for width in widths) + " |")
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"
