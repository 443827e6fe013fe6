"""The alignment scores of a pair of networks (wide/models/pair.py), layer by layer, from their parameters."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wide.alignment.scores import exact_score, input_sizes, shuffled
from wide.options import PAPER_SEED


class PairParameters(NamedTuple):
    """The parameters of a pair of networks, by their names in one network: as both started, N's, and A's."""

    initial: Mapping[str, Tensor]
    normal: Mapping[str, Tensor]
    align: Mapping[str, Tensor]


@torch.no_grad()
def layer_scores(
    network: nn.Module, parameters: PairParameters, image_size: tuple[int, ...] = (), shuffle_seed: int = PAPER_SEED
) -> dict[str, float | None]:
    """The score of every layer between input and readout, and that of its control.

    A recurrent network has one such layer, W_hh. The control is the score with the entries of N's weights shuffled.

    Args:
        network: one with the pair's geometry; its parameters are not read.
        image_size: (h, w) of the input images; () where there are none.

    Returns:
        {"score_1": ..., "control_1": ..., "score_2": ...}, numbered from the input; None for a score that is undefined
        (a layer did not change).
    """
    sizes = input_sizes(network, image_size)
    layers = scored_layers(network)
    mixed = shuffled([parameters.normal[f"{name}.weight"] for name in layers], shuffle_seed)
    scores = {}
    for number, (name, control) in enumerate(zip(layers, mixed, strict=True), start=1):
        initial, normal, align = (part[f"{name}.weight"] for part in parameters)
        for kind, weight in (("score", normal), ("control", control)):
            changes = weight - initial, align - initial
            scores[f"{kind}_{number}"] = exact_score(network.get_submodule(name), *changes, sizes[name])
    return scores


def scored_layers(network: nn.Module) -> list[str]:
    """The names of the layers between input and readout, from the input on."""
    return [name for name in input_sizes(network, (1, 1)) if name not in ("input", "readout")]
