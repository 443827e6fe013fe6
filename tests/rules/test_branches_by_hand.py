"""The rules' updates by hand where paths meet: skips, convolutions; and AlignZero's as a vector-Jacobian product."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import (
    WITH_FEEDBACK,
    assert_close,
    e_of,
    gradients,
    move,
)
from torch import Tensor, nn
from torchvision.models import resnet

import align_rules
from align_rules import couple

pytestmark = pytest.mark.usefixtures("seeded")


class ConvolutionalSkip(nn.Module):
    """relu(conv), relu(conv), conv beside a skip, relu, mean, readout. (batch, 2, 5, 6) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(inputs, 4, 3, padding=1) for inputs in (2, 4, 4))
        self.readout = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        stem = F.relu(self.one(images))
        branch = self.three(F.relu(self.two(stem)))
        return self.readout(F.relu(stem + branch).mean((2, 3)))


def patches(activity: Tensor) -> Tensor:
    """(batch, channels, h, w) -> (batch, channels * 9, h * w), what a 3x3 convolution multiplies."""
    return F.unfold(activity, 3, padding=1)


def send(error: Tensor, weight: Tensor) -> Tensor:
    """An error at a 3x3 convolution's output, (batch, out, h, w), back to its input through this weight."""
    return F.fold(weight.flatten(1).T @ error.flatten(2), error.shape[2:], 3, padding=1)


def learned(error: Tensor, activity: Tensor) -> list[Tensor]:
    """Gradients of a 3x3 convolution's weight and bias."""
    weight = torch.einsum("bop,bkp->ok", error.flatten(2), patches(activity))
    return [weight.unflatten(1, (-1, 3, 3)), error.sum((0, 2, 3))]


@pytest.mark.parametrize("name", ["dfa", *WITH_FEEDBACK])
def test_feedback_on_a_residual_convolutional_network_by_hand(name):
    network, images = ConvolutionalSkip().double(), torch.randn(4, 2, 5, 6).double()
    if name != "dfa":
        B = [torch.randn_like(weight) for weight in align_rules.layer_weights(network).values()]
        feedback = dict(zip(align_rules.layer_weights(network), B, strict=True))
    else:
        B = feedback = [torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(3)]
    rule = align_rules.RULES[name](network, feedback=feedback)

    with torch.no_grad():
        z1 = network.one(images)
        a1 = z1.clamp(min=0)
        z2 = network.two(a1)
        a2 = z2.clamp(min=0)
        s = a1 + network.three(a2)
        pooled = s.clamp(min=0).mean((2, 3))
        e = e_of(network.readout(pooled))
        if name != "dfa":
            d3 = (e @ B[3])[:, :, None, None] / 30 * (s > 0)
            d2 = send(d3, B[2]) * (z2 > 0)
            d1 = (d3 + send(d2, B[1])) * (z1 > 0)  # the skip carries the error as it is
        else:
            d1, d2, d3 = (torch.einsum("bk,kchw->bchw", e, b) * (z > 0) for b, z in zip(B, (z1, z2, s), strict=True))
        expected = [*learned(d1, images), *learned(d2, a1), *learned(d3, a2), e.T @ pooled, e.sum(0)]

    assert_close(gradients(rule, network, images), expected, 1e-10)


class DenseSkip(nn.Module):
    """Normalisation and a skip between dense layers, (batch, 6) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.readout = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, inputs: Tensor) -> Tensor:
        stem = torch.tanh(self.norm(self.one(inputs)))
        return self.readout(torch.tanh(stem + self.two(stem)))


@pytest.mark.parametrize("coupling", ["preactivation", "activity"])
def test_align_ada_at_a_branch_by_hand(coupling):
    """Every layer's input gets the initial network's error; the skip between them is the current network's own."""
    network, inputs = DenseSkip().double(), torch.randn(8, 6).double()
    rule = align_rules.AlignAda(network, coupling)
    start = copy.deepcopy(network)
    move(network)

    def by_hand(inputs: Tensor) -> Tensor:
        u, u0 = network.norm(network.one(inputs)), start.norm(start.one(inputs))
        h, h0 = torch.tanh(u), torch.tanh(u0)
        arriving = torch.tanh(couple(u0, u)) if coupling == "preactivation" else couple(h0, h)
        g = torch.tanh(h + network.two(h.detach()))
        g0 = torch.tanh(h0 + start.two(arriving))
        return couple(network.readout(g.detach()), start.readout(couple(g0, g)))

    expected = gradients(by_hand, network, inputs)
    assert_close(gradients(rule, network, inputs), expected)
    assert max((a - b).abs().max() for a, b in zip(expected, gradients(network, network, inputs), strict=True)) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_align_zero_is_the_initial_networks_vjp_on_a_resnet(training):
    """J(theta0)^T e, with e at the current network's output, by torch.func."""
    # With running statistics torch.func could not run the network in training mode, where they change in place.
    norm = functools.partial(nn.BatchNorm2d, track_running_stats=not training)
    network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 3, norm_layer=norm).double().train(training)
    theta0 = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    rule, images = align_rules.AlignZero(network), torch.randn(4, 3, 16, 16).double()
    move(network, 0.01)

    e = e_of(network(images).detach())
    _, vjp = torch.func.vjp(lambda theta: torch.func.functional_call(network, theta, (images,)), theta0)
    computed = gradients(rule, network, images)
    assert_close(computed, list(vjp(e)[0].values()), 1e-9)
    assert (computed[0] - gradients(network, network, images)[0]).norm() > 0.01 * computed[0].norm()
