"""Pairs of networks whose weight changes are compared, and their scores while they train.

Network N, "normal", learns by backprop. Network A, "align", starts from the same parameters and accumulates what
Align-zero would write, but with the error of N: in every step d(f0)/d(theta0), at the error e that N has, is applied to
A, and N takes its own step. Both take part in one run, with one optimizer.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from align_rules import AlignZero, couple
from wide.scores import exact_score, input_sizes, shuffled


class Pair(AlignZero):
    """Called, it gives N's output; differentiated, N gets the gradient of backprop and A that of Align-zero.

    `network` is N, `align` is A, `initial` both as they started. Of `live` parameters, such as the learned initial
    state of a recurrent network, the initial network reads A's, as Align-zero would for the network that it teaches.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network, live)
        self.align = copy.deepcopy(network)

    def attached(self, *inputs, **keywords) -> Tensor:
        return couple(self.network(*inputs, **keywords), self.from_initial(self.align, *inputs, **keywords))


class AlignmentScores:
    """The score of every layer between input and readout, and that of its control, after an epoch.

    A recurrent network has one such layer, W_hh. The control is the score with the entries of N's weights shuffled.

    Args:
        image_size: (h, w) of the input images; () where there are none.
        epochs: score after these only; None for every epoch.

    Called with a `Pair` and the epoch, gives {"score_1": ..., "control_1": ..., "score_2": ...}, numbered from the
    input; None for a score that is undefined (a layer did not change) or not asked for.
    """

    def __init__(self, image_size: tuple[int, ...] = (), epochs: Iterable[int] | None = None):
        self.image_size = image_size
        self.epochs = None if epochs is None else set(epochs)

    @torch.no_grad()
    def __call__(self, pair: Pair, epoch: int) -> dict[str, float | None]:
        sizes = input_sizes(pair.initial, self.image_size)
        names = [name for name in sizes if name not in ("input", "readout")]
        if self.epochs is not None and epoch not in self.epochs:
            return {f"{kind}_{k}": None for k in range(1, len(names) + 1) for kind in ("score", "control")}
        mixed = shuffled([pair.network.get_submodule(name).weight for name in names])
        metrics = {}
        for number, (name, control) in enumerate(zip(names, mixed, strict=True), start=1):
            initial, normal, align = (m.get_submodule(name) for m in (pair.initial, pair.network, pair.align))
            for kind, weight in (("score", normal.weight), ("control", control)):
                changes = (weight - initial.weight, align.weight - initial.weight)
                score = exact_score(initial, *changes, sizes[name])
                metrics[f"{kind}_{number}"] = score.value if score else None
        return metrics
