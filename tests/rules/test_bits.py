"""A rule's value is the network's own to the last bit: the same operators compute it, in the same order."""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import each_rule, move
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


class Derived(nn.Module):
    """Non-contiguous inputs of three and four dimensions, and a weight that is made of another."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.last = nn.Linear(6, 8), nn.Linear(5, 4), nn.Linear(8, 6), nn.Linear(24, 3)
        self.register_buffer("scale", torch.rand(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:  # (batch, 5, 6)
        one = torch.tanh(F.linear(inputs, self.one.weight * self.scale, self.one.bias))  # (batch, 5, 8)
        two = torch.tanh(F.linear(one.transpose(1, 2), (self.two.weight / 3).chunk(2)[0]))  # (batch, 8, 2)
        two = two.unflatten(1, (2, 4)).permute(0, 3, 2, 1).expand(-1, -1, -1, 2).flatten(2)
        three = F.linear(two, self.three.weight)
        return self.last(torch.tanh(three.movedim(1, -1).reshape(len(inputs), -1).repeat(1, 2)))


class Convolved(nn.Module):
    """Convolutions in another memory format, and products of activities."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(self.one(images.contiguous(memory_format=torch.channels_last)))
        tokens = F.conv2d(images, self.two.weight * 0.5, self.two.bias).flatten(2).transpose(1, 2)
        return self.last((tokens @ tokens.transpose(1, 2) @ tokens).mean(1))


class Wide(nn.Module):
    """F.linear on a 4-dimensional view of a transposed tensor, as channels-last networks have it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(2, 4, 1), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        activity = F.gelu(self.one(images)).permute(0, 2, 3, 1)
        return self.last(F.gelu(F.linear(activity, self.two.weight.double().to(images.dtype))).mean((1, 2)))


NETWORKS = {
    "derived weights": (Derived, lambda: torch.randn(4, 6, 5).transpose(1, 2)),
    "convolutions": (Convolved, lambda: torch.randn(4, 2, 6, 6)),
    "four dimensions": (Wide, lambda: torch.randn(4, 2, 6, 6).transpose(2, 3)),
}
each_network = pytest.mark.parametrize("kind", NETWORKS)


@each_network
@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_to_the_last_bit(name, kind, dtype):
    build, draw = NETWORKS[kind]
    network, inputs = build().to(dtype), draw().to(dtype)
    rule = align_rules.RULES[name](network)
    for _ in range(3):
        assert torch.equal(rule(inputs), network(inputs))
        move(network)
