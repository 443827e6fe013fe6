"""The alignment experiments, the same for every dataset: pairs of networks, scores against width and against time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from wide import UserError
from wide.alignment.pairs import layer_scores
from wide.alignment.parameters import KINDS, load_pair
from wide.grids.experiments import Experiment, Subject
from wide.reports.alignment_report import COLUMNS, ScoreReport, layer_name


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


def score_files(subject: Subject, files: tuple[Path, Path, Path], shuffle_seed: int) -> str:
    """A table of the scores of a pair of networks from three state_dicts: initial, trained and align.

    Raises:
        UserError: as for `load_pair`, or a kind of network that the subject does not have.
    """
    network, parameters = load_pair(*files, subject.strides)
    if (kind := KINDS[type(network)]) not in subject.networks:
        raise UserError(f"{files[0]} holds a network of the kind {kind}, which {subject.title} has not")
    scores = layer_scores(network, parameters, subject.image_size, shuffle_seed)
    lines = ["| layer | score | weights shuffled |", "|---|---|---|"]
    for number in range(1, len(scores) // 2 + 1):
        cells = [scores[f"{kind}_{number}"] for kind in COLUMNS]
        texts = ["undefined" if value is None else f"{value:.4f}" for value in cells]
        lines.append(f"| {layer_name(kind, number)} | {' | '.join(texts)} |")
    return "\n".join(lines)
