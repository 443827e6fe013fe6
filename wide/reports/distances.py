"""The distances from theory that are shown, and the slopes that theory predicts of them (see distance_report.py)."""

import dataclasses
import math
import statistics

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
    """The exponent of the width (see distance_report.py), of a smooth activation function."""
    if quantity == GAP:
        return -2.0
    return -1.0 if quantity == WEIGHT and layer not in (layers[0], layers[-1]) else -0.5


# Of the figure: title and slope of theory.
HIDDEN_ANGLE = "angle to backprop's gradient (degrees), hidden layers"
ACTIVITIES = "relative change of activities"
ENDS = "relative change of first and last weights"
BETWEEN = "relative change of hidden weights"
AFTER = [f"after {updates} update{'s' * (updates > 1)}" for updates in (1, 10, 100, 1000)]
PANELS = ((HIDDEN_ANGLE, -0.5), (ACTIVITIES, -0.5), (ENDS, -0.5), (BETWEEN, -1.0), *((after, -2.0) for after in AFTER))


def panel_of(quantity: str, layer: str, layers: tuple[str, ...]) -> str | None:
    """Where the figure shows it; angles of the readout are in the table alone."""
    if quantity == GAP:
        return layer
    if quantity == ANGLE:
        return None if layer == layers[-1] else HIDDEN_ANGLE
    if quantity == ACTIVITY:
        return ACTIVITIES
    return BETWEEN if predicted_slope(quantity, layer, layers) == -1 else ENDS
