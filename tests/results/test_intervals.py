"""Confidence intervals, against published tables and by simulation."""

import numpy as np
import pytest

from wide.results import intervals


def test_of_a_mean():
    values = [1.0, 2.0, 6.0]
    half = 4.302653 * 7**0.5 / 3**0.5  # the variance is 7
    assert intervals.of_mean(values) == pytest.approx((3, 3 - half, 3 + half))


@pytest.mark.parametrize(("n", "low", "high"), [(3, 0.05064, 7.37776), (5, 0.48442, 11.14329), (11, 3.24697, 20.4832)])
def test_of_a_deviation(n, low, high):
    """With chi-square's quantiles of 2.5% and 97.5% at n - 1 degrees of freedom, from tables."""
    values = np.arange(n, dtype=float)
    deviation = np.std(values, ddof=1)
    expected = deviation * np.sqrt((n - 1) / np.array([high, low]))
    assert intervals.of_deviation(list(values)) == pytest.approx((deviation, *expected), rel=1e-4)


@pytest.mark.parametrize(("k", "n", "low", "high"), [(0, 9, 0, 1 - 0.025 ** (1 / 9)), (10, 10, 0.025**0.1, 1)])
def test_of_a_share_at_its_ends(k, n, low, high):
    assert intervals.of_share([1] * k + [0] * (n - k)) == pytest.approx((k / n, low, high), abs=1e-9)


def test_of_a_share_between():
    """1 of 10: 0.25% to 44.5%, from tables."""
    assert intervals.of_share([0] * 9 + [1]) == pytest.approx((0.1, 0.0025, 0.4450), abs=1e-4)


@pytest.mark.parametrize(
    ("estimate", "truth"), [(intervals.of_mean, 0.0), (intervals.of_deviation, 1.0), (intervals.of_share, 0.3)]
)
def test_they_cover_the_truth(estimate, truth):
    random = np.random.RandomState(0)
    samples = random.binomial(1, 0.3, (400, 8)) if estimate is intervals.of_share else random.randn(400, 8)
    covered = [low <= truth <= high for _, low, high in (estimate(list(map(float, row))) for row in samples)]
    assert np.mean(covered) >= 0.92
