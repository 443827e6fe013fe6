"""The distances from theory that are shown, and the slopes that theory predicts of them (see distance_report.py)."""

ANGLE, ACTIVITY, WEIGHT = "degrees_to_backprop", "relative_activity_change", "relative_weight_change"
TITLES = {
    ANGLE: "angle to backprop's gradient (degrees)",
    ACTIVITY: "relative change of the activity that it reads",
    WEIGHT: "relative change of its weight",
}


def predicted_slope(quantity: str, layer: str, layers: tuple[str, ...]) -> float:
    """The exponent of the width (see distance_report.py), of a smooth activation function."""
    return -1.0 if quantity == WEIGHT and layer not in (layers[0], layers[-1]) else -0.5
