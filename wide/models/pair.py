"""Two networks that learn beside each other, as one rule.

Network N, "normal", learns by backprop. Network A, "align", starts from the same parameters and accumulates what
Align-zero would write, but with the error of N: in every step d(f0)/d(theta0), at the error e that N has, is applied to
A, and N takes its own step. Both take part in one run, with one optimizer.
"""

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from align_rules import AlignZero, Draft, couple


class Pair(AlignZero):
    """Called, it gives N's output; differentiated, N gets the gradient of backprop and A that of Align-zero.

    `network` is N, `align` is A, `initial` both as they started. Of `live` parameters, such as the learned initial
    state of a recurrent network, the initial network reads A's, as Align-zero would for the network that it teaches.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network, live)
        self.align = copy.deepcopy(network)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{f"align.{name}": p for name, p in self.align.named_parameters()}}

    def derive(self, draft: Draft) -> list:
        receivers = {place: draft.own(f"align.{name}") for place, name in draft.graph.parameters.items()}
        now, first = draft.follow(draft.places, None, self.received_by(receivers, draft), self.kept)
        return [draft.call(couple, f, f0) for f, f0 in zip(draft.outputs(now), draft.outputs(first), strict=True)]
