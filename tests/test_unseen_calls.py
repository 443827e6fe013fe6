"""Calls that a rule cannot follow: it raises, and never computes something else."""

import pytest
import torch
from rules_helpers import each_layerwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


@each_layerwise
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_activations_are_told(name):
    class Checkpointed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            first, *rest = self
            return rest[-1](checkpoint(nn.Sequential(*rest[:-1]), first(inputs), use_reentrant=True))

    network = Checkpointed(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(TypeError, match="checkpoints activations"):
        align_rules.RULES[name](network)(torch.randn(5, 6))
