"""Where the rules are backprop, and how they approach it."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import (
    INITIALLY_BACKPROP,
    TRANSPORTING,
    assert_close,
    each_kind,
    gradients,
    make,
    move,
    through_the_weights,
)
from torch import Tensor

import align_rules
from wide.models import networks

pytestmark = pytest.mark.usefixtures("seeded")


@each_kind
@pytest.mark.parametrize("name", TRANSPORTING)
def test_through_the_weights_is_backprop(name, kind):
    rule, inputs = make("backprop", kind, torch.float64)
    move(rule.network)
    added = ("initial_state",) if kind == "recurrent" else ()
    through_weights = align_rules.RULES[name](rule.network, **through_the_weights(name, rule.network), added=added)
    assert_close(gradients(through_weights, rule.network, inputs), gradients(rule, rule.network, inputs))


@each_kind
@pytest.mark.parametrize("name", INITIALLY_BACKPROP)
def test_initially_backprop(name, kind):
    rule, inputs = make(name, kind, torch.float64)
    assert_close(gradients(rule, rule.network, inputs), gradients(rule.network, rule.network, inputs))


def distance_from_backprop(width: int, seed: int, steps: int = 10) -> float:
    """|align_zero - backprop| / |backprop| of the whole gradient, after some steps of backprop on random images."""
    stream = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(16, 36, generator=stream), torch.randint(4, (16,), generator=stream)
    network = networks.FullyConnectedNetwork(36, width, 4)
    networks.draw(network, seed)
    rule, optimiser = align_rules.AlignZero(network), torch.optim.SGD(network.parameters(), lr=1.0)

    def gradient(function) -> Tensor:
        network.zero_grad()
        F.mse_loss(function(images), F.one_hot(labels, 4) - 0.1).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    for _ in range(steps):
        gradient(network)
        optimiser.step()
    expected = gradient(network)
    return ((gradient(rule) - expected).norm() / expected.norm()).item()


def test_align_zero_approaches_backprop_with_width():
    # The mean over eight seeds shrinks by 0.64 to 0.75 whenever the width is quadrupled, in five such groups of seeds.
    distances = [statistics.mean(distance_from_backprop(width, seed) for seed in range(8)) for width in (16, 64, 256)]
    assert distances[1] < 0.85 * distances[0]
    assert distances[2] < 0.85 * distances[1]
