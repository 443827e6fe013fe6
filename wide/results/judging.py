"""How a claim is judged: runs that may be compared, figures of them with intervals, and verdicts."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from wide import UserError
from wide.models.rules import RULES
from wide.results import intervals
from wide.results.keeping import Kept
from wide.training.tasks import AddTask

MARGIN = 2.0  # percentage points, degrees
RATIO = 1.1  # of losses
SCORE_MARGIN = 0.02
LEAST_SEEDS = 3
HOLDS, DOES_NOT, UNTOLD = "holds", "does not hold", "cannot be told"

RULES_OF_JUDGING = f"""\
- A claim names figures, and the range in which each lies if the claim holds. A figure is computed for every seed by
  itself, rules being compared run by run at the same seed (the same initial network and batches), and its mean has a
  t-interval of 95% over the n seeds. Standard deviations have one by chi-square, shares of runs one by Clopper and
  Pearson.
- "{HOLDS}" if the interval lies within the range; "{DOES_NOT}" if it lies outside of it altogether; "{UNTOLD}"
  if it does both, or with fewer than three seeds.
- A slope over widths is judged twice, with and without the narrowest width: unless both come out
  alike, it cannot be told.
- Widths are those at which every compared rule has at least three common seeds; "the widest" is the largest of them.
  Slopes are over all widths at which no compared run diverged, and need two. Deviations over seeds are at width 256,
  the paper's, where it was run.
- Accuracies are test accuracies after the last epoch, losses the lowest test loss of any epoch, as published
  ("last epoch": that after the last, which no choice has made lower). A run that diverged counts as guessing; one
  failed that diverged or ends no better than guessing.
- A rule is comparable to another if it is at most {MARGIN:g} points behind (Add: its loss at most {RATIO:g}
  times as large).
- bf16 does no harm if accuracies stay within {MARGIN:g} points of those in fp32, angles within {MARGIN:g} degrees,
  alignment scores within {SCORE_MARGIN:g}.
- Changes of weights and activities follow theory if their exponent of the width is within 0.25 of the predicted one.
  Angles to backprop, and distances of outputs from backprop's, fall if theirs is below 0. (Of distances, an exponent
  within 0.5 of -1 was asked for at first. The first runs, to width 256, fell faster, as theory says when it is looked
  at more closely: wide/reports/distance_report.py. The claim is that they fall.)
- With little data a gap says something if backprop itself is above guessing.
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that may be compared: those with these fields of `Run` (see `matches`), trained for so many epochs.

    Args:
        fields: but rule, width and seed.
        loss: whether test_loss is what counts, and not test_accuracy.
        last: whether it counts after the last epoch, and not at its lowest.
    """

    title: str
    fields: Mapping[str, object]
    epochs: int
    loss: bool = False
    last: bool = False

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
            return math.log(rows[-1]["test_loss"] if self.last else min(row["test_loss"] for row in rows))
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


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, one value per seed, and the range in which it lies if the claim holds.

    Args:
        what: it is, in words.
        values: of the seeds; empty where runs are missing.
        lower, upper: of the range.
        missing: why there are too few values.
        estimate: what of the values the figure is, with its interval (wide/results/intervals.py).
        shown: what a value is shown as, such as the ratio whose logarithm it is.
        without_narrowest: of a slope, its values without the narrowest width; they must be judged alike.
        premise: what must hold for the figure to say something.
    """

    what: str
    values: tuple[float, ...]
    lower: float = -math.inf
    upper: float = math.inf
    missing: str = ""
    estimate: Callable[[Sequence[float]], tuple[float, float, float]] = intervals.of_mean
    shown: Callable[[float], float] = float
    without_narrowest: tuple[float, ...] = ()
    premise: "Figure | None" = None

    @property
    def enough(self) -> bool:
        return len(self.values) >= LEAST_SEEDS

    @property
    def setting(self) -> str:
        """What `what` begins with."""
        return self.what.partition(": ")[0]

    @property
    def verdict(self) -> str:
        if self.premise and self.premise.verdict != HOLDS:
            return UNTOLD
        found = {self._judged(values) for values in (self.values, self.without_narrowest) if values}
        return found.pop() if self.enough and len(found) == 1 else UNTOLD

    def _judged(self, values: tuple[float, ...]) -> str:
        if len(values) < LEAST_SEEDS:
            return UNTOLD
        _, low, high = self.estimate(values)
        if self.lower < low and high < self.upper:
            return HOLDS
        return DOES_NOT if high <= self.lower or low >= self.upper else UNTOLD

    @property
    def centre(self) -> float:
        """Mean, deviation or share, as it is shown."""
        return self.shown(self.estimate(self.values)[0] if self.enough else statistics.fmean(self.values))

    @property
    def text(self) -> str:
        if not self.values:
            return "-"
        if not self.enough:
            return f"{self.centre:.3g} (n = {len(self.values)})"
        value, low, high = (round(self.shown(v), 9) for v in self.estimate(self.values))  # no 1e-16 of rounding
        return f"{value:.3g} [{low:.3g}, {high:.3g}] (n = {len(self.values)})"

    @property
    def why(self) -> str:
        if not self.enough:
            return self.missing or f"{len(self.values)} seeds; {LEAST_SEEDS} are needed"
        if self.premise and self.premise.verdict != HOLDS:
            return f"says nothing: {self.premise.what} {self.premise.text}"
        range_ = " and ".join(
            f"{word} {self.shown(bound):g}"
            for word, bound in (("above", self.lower), ("below", self.upper))
            if math.isfinite(bound)
        )
        alone = self._judged(self.values)
        how = {HOLDS: "is", DOES_NOT: "is not", UNTOLD: "is only partly"}[alone]
        otherwise = "" if alone == self.verdict else "; not so without the narrowest width"
        return f"the interval {how} {range_}{otherwise}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, and the figures that it stands on.

    Args:
        paper: where it is made; empty for claims that are not the paper's.
        about: for which widths and epochs.
        decides: settings that are on the first page; those of the others are in the details.
        needs: which runs.
    """

    title: str
    paper: str
    about: str
    decides: tuple[str, ...]
    needs: str
    figures: Callable[[list[Kept]], list[Figure]]


def verdict(figures: Sequence[Figure]) -> str:
    """Of all of these together; of some this and some that, how many hold."""
    found = [one.verdict for one in figures]
    if len(set(found)) == 1:
        return found[0]
    return f"{found.count(HOLDS)} of {len(found)} hold, {found.count(DOES_NOT)} do not"


# ------------------------------------------------------------------------------------------------------- over widths


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

    def slopes(widths: list[int]) -> tuple[float, ...]:
        logs = [math.log2(width) for width in widths]
        return tuple(statistics.linear_regression(logs, [table[w][seed] for w in widths]).slope for seed in seeds)

    widths = sorted(table)
    rest = slopes(widths[1:]) if len(widths) > 2 else ()
    what = f"{what}, per doubling of the width ({widths[0]} to {widths[-1]})"
    return Figure(what, slopes(widths), without_narrowest=rest, **range_)


def gaps(setting: Setting, kept: list[Kept], rule: str, other: str = "backprop") -> dict[int, dict[int, float]]:
    """How far a rule is behind another: in points, or in log(loss)."""
    sign = -1 if setting.loss else 1
    return by_width(setting.values(kept), (other, rule), lambda a, b: sign * (a - b))


def unit(setting: Setting) -> str:
    return "log(loss)" if setting.loss else "points"


def behind(setting: Setting, kept: list[Kept], rules: tuple[str, str], most: bool = True) -> Figure:
    """How far a rule is behind another at the widest width: in points, or how many times as large its loss is.

    Args:
        rules: the rule and the other.
        most: whether the claim says at most so far; else that it is behind.
    """
    rule, other = rules
    title = RULES[other].title if other != "backprop" else other
    bound = {"upper": math.log(RATIO) if setting.loss else MARGIN} if most else {"lower": 0.0}
    what = f"loss in multiples of {title}'s" if setting.loss else f"points behind {title}"
    table = gaps(setting, kept, rule, other)
    figure = at_widest(table, f"{setting.title}: {RULES[rule].title}, {what}", **bound)
    return dataclasses.replace(figure, shown=math.exp if setting.loss else float)
