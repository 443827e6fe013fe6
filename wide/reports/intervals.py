"""95% confidence intervals from a few values: of a mean, of a standard deviation, of a share.

The tails are of 2.5% each. Values are taken to be independent, for the first two normally distributed.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

TAIL = 0.025
# Student's t for 95%, by degrees of freedom from 1; beyond, the last.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lower, upper), by Student's t; two values at least."""
    n, mean = len(values), statistics.fmean(values)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def of_deviation(values: Sequence[float]) -> tuple[float, float, float]:
    """(standard deviation, lower, upper), by chi-square with n - 1 degrees of freedom; two values at least."""
    freedom, deviation = len(values) - 1, statistics.stdev(values)

    def ratio(probability: float) -> float:
        """Deviation of the population over that of the sample, at a quantile of chi-square."""
        return math.sqrt(freedom / _root(lambda x: _chi_square(x, freedom) - probability, 0, 1000))

    return deviation, deviation * ratio(1 - TAIL), deviation * ratio(TAIL)


def of_share(values: Sequence[float]) -> tuple[float, float, float]:
    """(share of ones, lower, upper) among zeros and ones, by Clopper and Pearson."""
    n, k = len(values), round(sum(values))
    lower = _root(lambda p: _at_least(k, n, p) - TAIL, 0, 1) if k else 0.0
    upper = _root(lambda p: TAIL - (1 - _at_least(k + 1, n, p)), 0, 1) if k < n else 1.0
    return k / n, lower, upper


def _chi_square(x: float, freedom: int) -> float:
    """Its distribution function."""
    half = torch.tensor([freedom / 2, x / 2], dtype=torch.float64)
    return torch.special.gammainc(*half).item()


def _at_least(k: int, n: int, p: float) -> float:
    """The probability of k or more of n."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where the function crosses zero, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2
