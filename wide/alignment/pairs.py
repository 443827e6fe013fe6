"""Pairs of networks whose weight changes are compared, and their scores, while they train and from their parameters.

Network N, "normal", learns by backprop. Network A, "align", starts from the same parameters and accumulates what
Align-zero would write, but with the error of N: in every step d(f0)/d(theta0), at the error e that N has, is applied to
A, and N takes its own step. Both take part in one run, with one optimizer.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from align_rules import AlignZero, couple
from wide.alignment.scores import exact_score, input_sizes, shuffled
from wide.options import PAPER_SEED
from wide.training.recorders import Recorder

if TYPE_CHECKING:
    from wide.training.loop import Training


class Pair(AlignZero):
    """Called, it gives N's output; differentiated, N gets the gradient of backprop and A that of Align-zero.

    `network` is N, `align` is A, `initial` both as they started. Of `live` parameters, such as the learned initial
    state of a recurrent network, the initial network reads A's, as Align-zero would for the network that it teaches.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network, live)
        self.align = copy.deepcopy(network)

    def attached(self, *inputs, **keywords) -> Tensor:
        self.prepare_initial()
        return couple(self.network(*inputs, **keywords), self.from_initial(self.align, *inputs, **keywords))


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
            score = exact_score(network.get_submodule(name), weight - initial, align - initial, sizes[name])
            scores[f"{kind}_{number}"] = score.value if score else None
    return scores


def _exact(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By name, on a device that has double precision, which scores are computed in."""
    return {name: p.cpu() if p.device.type == "mps" else p for name, p in parameters}


def scored_layers(network: nn.Module) -> list[str]:
    """The names of the layers between input and readout, from the input on."""
    return [name for name in input_sizes(network, (1, 1)) if name not in ("input", "readout")]


class AlignmentScores(Recorder):
    """The scores of a pair after an epoch, as columns of metrics.csv: score_1, control_1, score_2 and so on.

    Args:
        image_size: (h, w) of the input images; () where there are none.
        epochs: score after these only; None for every epoch. The columns are empty after the others.
    """

    def __init__(self, image_size: tuple[int, ...] = (), epochs: Iterable[int] | None = None):
        self.image_size = image_size
        self.epochs = None if epochs is None else set(epochs)

    def columns(self, training: "Training") -> dict[str, float | None]:
        return self(training.rule, training.epoch)

    def __call__(self, pair: Pair, epoch: int) -> dict[str, float | None]:
        if self.epochs is not None and epoch not in self.epochs:
            numbers = range(1, len(scored_layers(pair.initial)) + 1)
            return {f"{kind}_{k}": None for k in numbers for kind in ("score", "control")}
        networks = (pair.initial, pair.network, pair.align)
        parameters = PairParameters(*(_exact(network.named_parameters()) for network in networks))
        return layer_scores(pair.initial, parameters, self.image_size)
