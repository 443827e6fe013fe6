"""The alignment experiments, the same for every dataset: pairs of networks, scores against width and against time."""

import dataclasses
from collections.abc import Mapping

from wide.grids.experiments import Experiment, Subject
from wide.reports.alignment_report import ScoreReport


def scored(subject: Subject) -> Subject:
    """A training script's subject, for pairs of networks whose alignment is scored."""
    axes = tuple(axis for axis in subject.axes if axis not in ("rules", "learning_rates"))
    return dataclasses.replace(subject, axes=axes, stem="alignment", scored=True)


def pairs(widths: tuple[int, ...], learning_rate: float, epochs: int, quick: Mapping[str, object]) -> Experiment:
    """A grid of pairs of networks. `quick`: what --quick replaces."""
    return Experiment(
        title="train the pairs of networks",
        rules=("pair",),
        widths=widths,
        learning_rates=(learning_rate,),
        epochs=epochs,
        quick={"keep": (), **quick},
    )


def alignment_experiments(grid: Experiment, scored_after: int, timed_width: int) -> dict[int, Experiment]:
    """Parts 1, 2 and 3.

    Args:
        grid: of the pairs that part 1 trains.
        scored_after: the epoch of the scores against width; with --quick, the last.
        timed_width: the width of the scores against training time; with --quick, the widest.
    """
    grid = dataclasses.replace(grid, keep=(0, scored_after))
    return {
        1: grid,
        2: dataclasses.replace(
            grid,
            title="alignment score against width",
            epochs=scored_after,
            report=ScoreReport(against="width"),
        ),
        3: dataclasses.replace(
            grid,
            title="alignment score against training time",
            widths=(timed_width,),
            report=ScoreReport(against="epoch"),
            quick={**grid.quick, "widths": grid.quick["widths"][-1:]},
        ),
    }
