"""The paper's networks, ours and rebuilt from torch's own modules: the rules give both the same."""

import math

import pytest
import torch
from rules_helpers import RECURRENT_OPTIONS, WITH_FEEDBACK, assert_close, copy_parameters, gradients, move
from torch import Tensor, nn

import align_rules
from wide.models import networks

pytestmark = pytest.mark.usefixtures("seeded")


class Scaled(nn.Module):
    """What follows a linear map in NTK parameterisation: its scaling, and the bias."""

    def __init__(self, fan_in: int, channels: int):
        super().__init__()
        self.fan_in, self.bias = fan_in, nn.Parameter(torch.zeros(channels))

    def forward(self, z: Tensor) -> Tensor:
        return z / math.sqrt(self.fan_in) + self.bias.view(-1, *[1] * (z.dim() - 2))


def normalised(channels: int, *size: int) -> list[nn.Module]:
    """Normalisation over the batch axis alone, by torch's own module."""
    entries = channels * math.prod(size)
    norm = nn.BatchNorm1d(entries, eps=1e-6, affine=False, track_running_stats=False)
    return [nn.Flatten(), norm, nn.Unflatten(1, (channels, *size))] if size else [norm]


class Plain(nn.Module):
    """Blocks, then a readout in NTK parameterisation."""

    def __init__(self, width: int, classes: int, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Sequential(nn.Linear(width, classes, bias=False), Scaled(width, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(self.blocks(inputs))


def plain_convolutional() -> Plain:
    """ConvolutionalNetwork(2, 5, (1, 2, 2), 3), for images of 7 x 8 pixels."""
    modules = []
    # Padding left, right, top, bottom, as TensorFlow's SAME has it on 7 x 8, 7 x 8 and 4 x 4 pixels.
    for inputs, stride, padding, size in (
        (2, 1, (1, 1, 1, 1), (7, 8)),
        (5, 2, (0, 1, 1, 1), (4, 4)),
        (5, 2, (0, 1, 0, 1), (2, 2)),
    ):
        convolution = nn.Conv2d(inputs, 5, 3, stride, bias=False)
        modules += [nn.ZeroPad2d(padding), convolution, Scaled(9 * inputs, 5), *normalised(5, *size), nn.ReLU()]
    return Plain(5, 3, *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain_fully_connected() -> Plain:
    """FullyConnectedNetwork(6, 7, 3)."""
    modules = []
    for inputs in (6, 7, 7):
        modules += [nn.Linear(inputs, 7, bias=False), Scaled(inputs, 7), *normalised(7), nn.ReLU(inplace=True)]
    return Plain(7, 3, *modules)


class PlainRecurrent(Plain):
    """RecurrentNetwork(6, 5)."""

    def __init__(self):
        super().__init__(6, 1, nn.Linear(1, 6, bias=False), nn.Linear(6, 6, bias=False), Scaled(6, 6))
        self.initial_state = nn.Parameter(torch.zeros(5, 6))

    def forward(self, sequences: Tensor) -> Tensor:
        drive, hidden, scaled = self.blocks
        state, states = self.initial_state, []
        for step in sequences.split(1, dim=1):
            state = torch.relu(drive(step) + scaled(hidden(state)))
            states.append(state)
        return self.readout(torch.cat(states)).view(len(states), -1).T


# kind: ours, the same from plain modules, the shape of a batch, and those of the blocks' activities
PAPER = {
    "convolutional": (
        lambda: networks.ConvolutionalNetwork(2, 5, (1, 2, 2), 3), plain_convolutional, (6, 2, 7, 8),
        ((5, 7, 8), (5, 4, 4), (5, 2, 2)),
    ),
    "fully connected": (
        lambda: networks.FullyConnectedNetwork(6, 7, 3), plain_fully_connected, (6, 6), ((7,), (7,), (7,)),
    ),
    "recurrent": (lambda: networks.RecurrentNetwork(6, 5), PlainRecurrent, (5, 4), ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in align_rules.RULES for k in PAPER if (n, k) != ("dfa", "recurrent")]
)
def test_the_papers_networks_from_plain_modules(name, kind):
    build, rebuild, shape, activities = PAPER[kind]
    pair = build().double(), rebuild().double()
    copy_parameters(*pair)
    settings = dict(RECURRENT_OPTIONS.get(name, {})) if kind == "recurrent" else {}
    if name == "last_layer":
        settings.setdefault("learns", ("readout",))
    elif name == "dfa":
        settings["feedback"] = [torch.randn(3, *activity, dtype=torch.float64) for activity in activities]
    drawn = [torch.randn_like(weight) for weight in align_rules.layer_weights(pair[0]).values()]
    rules = []
    for network in pair:
        if name in WITH_FEEDBACK:
            settings["feedback"] = dict(zip(align_rules.layer_weights(network), drawn, strict=True))
        rules.append(align_rules.RULES[name](network, **settings))
    move(pair[0], 0.1)
    copy_parameters(*pair)
    inputs = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(rules[0](inputs), rules[1](inputs), rtol=0, atol=1e-10)
    assert_close(gradients(rules[0], pair[0], inputs), gradients(rules[1], pair[1], inputs), 1e-9)
