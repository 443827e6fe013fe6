"""How long the rest of a grid will take."""

import heapq
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from wide.runs.folder import RunFolder
from wide.runs.run import Run

# The products of a step, in those of a forward pass: forward, and backward to weights and to activities. Of rules that
# are not named it is 3, as of backprop.
PASSES = {
    "last_layer": 1,
    "dfa": 2,
    "align_ada": 4,  # forward through two networks, backward through one
    "align_zero": 4,
    "weight_mirror": 5,  # and forward for every layer's noise, and its product with it
    "pair": 6,
}


class Pace:
    """How long the runs that are missing will take, from the epochs trained so far.

    A step takes the rule's passes through the network, each of a part that is the same at every width and one that
    grows with the products of a forward pass. The two are known once two widths are seen. What is seen of a rule
    corrects its number of passes. An epoch counts with its evaluation; the first of all does not count, since it pays
    for what happens only once.

    Args:
        products: of a forward pass, by width.
    """

    def __init__(self, examples: int, epochs: int, products: Mapping[int, float]):
        self.examples, self.epochs, self.products = examples, epochs, products
        self.seen: dict[tuple[int, str], list[float]] = defaultdict(list)  # seconds per step, by width and rule
        self.clock: float | None = None

    def start(self) -> None:
        self.clock = time.monotonic() if self.seen else None

    def epoch(self, run: Run) -> None:
        now = time.monotonic()
        if self.clock is not None:
            self.saw(run, now - self.clock)
        self.clock = now

    def saw(self, run: Run, seconds: float) -> None:
        """An epoch of the run took so long."""
        self.seen[run.width, run.rule].append(seconds / self.steps(run))

    def steps(self, run: Run) -> float:
        return max((run.data_limit or self.examples) / (run.batch_size * run.batches), 1)

    def step_seconds(self, width: int, rule: str) -> float:
        """With nothing seen yet, in a unit of its own; at least so long, where only other widths than this are seen."""
        if (width, rule) in self.seen:
            return statistics.fmean(self.seen[width, rule])
        one_pass, corrections = self._fitted()
        passes = PASSES.get(rule, 3) * corrections.get(rule, 1.0)
        return passes * self._pass_seconds(width, one_pass)

    def _fitted(self) -> tuple[dict[int, float], dict[str, float]]:
        """Seconds of a pass by width, and what corrects the passes by rule: those whose products meet what is seen."""
        seen = {(width, rule): statistics.fmean(t) / PASSES.get(rule, 3) for (width, rule), t in self.seen.items()}
        one_pass, corrections = ({place[k]: 1.0 for place in seen} for k in range(2))
        for _ in range(20):
            for width in one_pass:
                own = [t / corrections[rule] for (of, rule), t in seen.items() if of == width]
                one_pass[width] = statistics.geometric_mean(own)
            for rule in corrections:
                own = [t / one_pass[width] for (width, of), t in seen.items() if of == rule]
                corrections[rule] = statistics.geometric_mean(own)
        usual = statistics.geometric_mean(corrections.values()) if corrections else 1.0  # of a rule that is not seen
        return {w: t * usual for w, t in one_pass.items()}, {r: c / usual for r, c in corrections.items()}

    def _pass_seconds(self, width: int, seen: Mapping[int, float]) -> float:
        """Of one pass at a width, from those at the widths that are seen."""
        products = self.products.get(width, 0.0)
        if not seen:
            return products
        if width in seen:
            return seen[width]
        if len(seen) == 1:  # no less than there, where it is wider; no less than its share, where it is narrower
            ((other, seconds),) = seen.items()
            return seconds * min(products / self.products[other], 1.0)
        near, far = sorted(seen, key=lambda other: abs(self.products[other] - products))[:2]
        slope = (seen[far] - seen[near]) / (self.products[far] - self.products[near])
        slope = min(max(slope, 0.0), seen[near] / self.products[near])  # neither part is below nothing
        return seen[near] + slope * (products - self.products[near])

    def left(self, folders: list[RunFolder]) -> float:
        """Seconds for what these runs still lack."""
        lacking = {folder.run: self.epochs - folder.progress()[0] for folder in folders}
        return sum(epochs * self.steps(run) * self.step_seconds(run.width, run.rule) for run, epochs in lacking.items())

    def text(self, seconds: float, folders: list[RunFolder]) -> str:
        """That these runs take so long: "about 3 h left", or "at least" where they are far from what is seen."""
        seen, asked = {width for width, _ in self.seen}, {folder.run.width for folder in folders}
        known = asked <= seen or (len(seen) > 1 and max(asked) <= 2 * max(seen))
        return f"{'about' if known else 'at least'} {duration(seconds)} left"


def makespan(durations: Iterable[float], slots: int) -> float:
    """When the last of these is over, where each starts, in this order, in the first slot that is free."""
    free = [0.0] * slots
    for length in durations:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def duration(seconds: float) -> str:
    """Rounded for people: 40 s, 12 min, 5 h, 3 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(number: int, noun: str) -> str:
    """With the noun's ending: 1 run, 2 runs."""
    return f"{number} {noun}{'s' * (number != 1)}"
