"""The rules through modules that other networks are made of."""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import (
    TRANSPORTING,
    Holding,
    LastState,
    Words,
    assert_close,
    each_layerwise,
    each_rule,
    gradients,
    move,
    through_the_weights,
)
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


VARIANTS = {
    "groups and dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
    "padding same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "padding same, even kernel": lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    "padding valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
    "circular padding": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflected padding, same": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, 2, 1), nn.Conv1d(6, 6, 2, padding="same")),
    "three dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, (2, 3, 3), padding="same", groups=1)
    ),
    "other norms": lambda: nn.Sequential(
        nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm((6, 6, 6))
    ),
    "concatenation": lambda: Concatenated(),
    "activations": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 1), nn.PReLU(6), nn.Conv2d(6, 6, 1), nn.Hardtanh(-2, 2)
    ),
    "a layer twice": lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()] * 2),
    "one weight, two layers": lambda: tied(),
    "split weight": lambda: Split(4, 6),
}  # fmt: skip


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, F.silu(self.left(images)), self.right(images)], 1)


class Split(nn.Linear):
    """Uses a scaled and cast weight in two parts, on the channels of images."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("scale", torch.rand(outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        one, two = (self.weight * self.scale).to(images.dtype).chunk(2)
        images = images.movedim(1, -1)
        return torch.cat([F.linear(images, one), F.linear(images.tanh(), weight=two)], -1).movedim(-1, 1)


def tied() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    network[2].weight = network[0].weight
    return network


def around(build) -> tuple[nn.Sequential, Tensor]:
    """A module between others, so that its input has an error, and a batch for it."""
    middle = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), build(), nn.Tanh(), nn.Flatten()).double()
    images = torch.randn(5, 2, 8, 8).double()
    return nn.Sequential(middle, nn.Linear(middle(images).shape[1], 3).double()), images


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*TRANSPORTING, "align_ada", "align_zero"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_initially_backprop_through_any_module(name, variant):
    network, images = around(VARIANTS[variant])
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    expected = gradients(network, network, images)
    assert all(gradient is not None for gradient in expected)
    assert_close(gradients(rule, network, images), expected)
    move(network, 0.1)  # the weights that errors go back through are now others
    assert torch.equal(rule(images), network(images))
    here = gradients(network, network, images)
    assert (gradients(rule, network, images)[0] - here[0]).norm() > 1e-3 * here[0].norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_direct_feedback_reaches_any_module(variant):
    network, images = around(VARIANTS[variant])
    rule = align_rules.DirectFeedbackAlignment(network)
    assert torch.equal(rule(images), network(images))
    assert all(gradient.any() for gradient in gradients(rule, network, images))


class Gated(nn.Module):
    """A learned gate behind an activation function of a parameter, and a gated head, called last."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gate = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs: Tensor) -> Tensor:
        activity = F.relu(self.one(inputs)) * torch.sigmoid(self.scale)
        return self.two(activity) * torch.sigmoid(self.gate(activity))


@each_rule
def test_gates(name):
    rule, inputs = align_rules.RULES[name](Gated()), torch.randn(5, 6)
    assert torch.equal(rule(inputs), rule.network(inputs))
    made = gradients(rule, rule.network, inputs)
    if name != "last_layer":
        assert all(gradient.any() for gradient in made)


@pytest.mark.parametrize("name", TRANSPORTING)
def test_one_image_without_a_batch(name):
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding="same")).double()
    rule, image = align_rules.RULES[name](network), torch.randn(2, 5, 5).double()
    for alone, batched in zip(gradients(rule, network, image), gradients(rule, network, image[None]), strict=True):
        torch.testing.assert_close(alone, batched)


@each_rule
def test_a_shared_weight_has_each_of_its_names(name):
    network, words = Words(start=True), torch.randint(7, (5,))
    rule = align_rules.RULES[name](network)
    learned = gradients(rule, network, words)
    assert learned[0].any()
    assert (learned[1] is None) == (name == "last_layer")


@each_layerwise
def test_an_embedding_tied_to_the_readout(name):
    rule = align_rules.RULES[name](Words(start=False))
    assert all(gradient.any() for gradient in gradients(rule, rule.network, torch.randint(7, (5, 4))))


@each_layerwise
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x + w,
        lambda x, w: x * w[0] + F.softmax(x @ x.T, -1) @ x,
        lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=w[:, :6])[0],
        lambda x, w: torch.addmm(w, x, x.T)[:, :6],
        lambda x, w: torch.where(x > 0, x, w),
    ],
)
def test_what_is_added_is_taken(name, use):
    rule, inputs = align_rules.RULES[name](Holding(use), added=("own",)), torch.randn(6, 6)
    assert torch.equal(rule(inputs), rule.network(inputs))
    gradients(rule, rule.network, inputs)
    assert rule.network.own.grad.any()


@each_layerwise
@pytest.mark.parametrize("shape", [(1, 6), (6,), (6, 1)], ids=str)
def test_parameters_that_are_no_matrix_need_no_name(name, shape):
    rule = align_rules.RULES[name](Holding(lambda x, own: x[:, :6] + own.expand(6, 6)[:5], *shape))
    gradients(rule, rule.network, torch.randn(5, 6))


def test_align_zero_takes_fused_modules():
    network, sequences = LastState().double(), torch.randn(4, 6, 3, dtype=torch.float64)
    rule = align_rules.AlignZero(network)
    initially = gradients(network, network, sequences)
    assert_close(gradients(rule, network, sequences), initially)
    move(network)
    assert torch.equal(rule(sequences), network(sequences))


@pytest.mark.parametrize("name", ["backprop", "align_zero"])
@pytest.mark.parametrize(
    "module", [nn.LSTM(6, 6), nn.Bilinear(6, 6, 6), Holding(torch.matmul)], ids=lambda module: type(module).__name__
)
def test_backprop_and_align_zero_take_any_network(name, module):
    align_rules.RULES[name](nn.Sequential(nn.Linear(6, 6), module))
