"""95% confidence intervals from a few values: of a mean, of a standard deviation, of a share.

The tails are of 2.5% each. Values are taken to be independent, for the first two normally distributed.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

TAIL = 0.025


def of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lower, upper), by Student's t; two values at least."""
    n, mean = len(values), statistics.fmean(values)
    half = float(stats.t.ppf(1 - TAIL, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def of_deviation(values: Sequence[float]) -> tuple[float, float, float]:
    """(standard deviation, lower, upper), by chi-square with n - 1 degrees of freedom; two values at least."""
    freedom, deviation = len(values) - 1, statistics.stdev(values)
    lower, upper = (math.sqrt(freedom / float(stats.chi2.ppf(p, freedom))) for p in (1 - TAIL, TAIL))
    return deviation, deviation * lower, deviation * upper


def of_share(values: Sequence[float]) -> tuple[float, float, float]:
    """(share of ones, lower, upper) among zeros and ones, by Clopper and Pearson."""
    n, k = len(values), round(sum(values))
    interval = stats.binomtest(k, n).proportion_ci(1 - 2 * TAIL, method="exact")
    return k / n, float(interval.low), float(interval.high)
