"""How long the rest of a grid will take."""

import heapq
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable

from wide.runs.folder import RunFolder
from wide.runs.run import Run


class Pace:
    """How long the runs that are missing will take, from the epochs trained so far.

    The time of a step at a width not seen yet is extrapolated as a power of the width, from the two widest seen. An
    epoch counts with its evaluation; the first of all does not count, since it pays for what happens only once.
    """

    def __init__(self, examples: int, epochs: int):
        self.examples, self.epochs = examples, epochs
        self.seen: dict[int, list[float]] = defaultdict(list)  # seconds per step, by width
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
        self.seen[run.width].append(seconds / self.steps(run))

    def steps(self, run: Run) -> float:
        return max((run.data_limit or self.examples) / (run.batch_size * run.batches), 1)

    def step_seconds(self, width: int) -> float:
        """With nothing seen yet, in a unit of its own."""
        if not self.seen:
            return width
        means = {seen: statistics.fmean(times) for seen, times in sorted(self.seen.items())}
        if width in means:
            return means[width]
        *_, widest = means
        power = 1.0
        if len(means) > 1:
            *_, narrower, widest = means
            power = _power(narrower, widest, means[narrower], means[widest])
        return means[widest] * (width / widest) ** power

    def left(self, folders: list[RunFolder]) -> float:
        """Seconds for what these runs still lack."""
        lacking = {folder.run: self.epochs - folder.progress()[0] for folder in folders}
        return sum(epochs * self.steps(run) * self.step_seconds(run.width) for run, epochs in lacking.items())


def makespan(durations: Iterable[float], slots: int) -> float:
    """When the last of these is over, where each starts, in this order, in the first slot that is free."""
    free = [0.0] * slots
    for length in durations:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def _power(narrower: int, wider: int, seconds: float, more_seconds: float) -> float:
    return min(max(math.log(more_seconds / seconds) / math.log(wider / narrower), 0.0), 2.0)


def duration(seconds: float) -> str:
    """Rounded for people: 40 s, 12 min, 5 h, 3 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
