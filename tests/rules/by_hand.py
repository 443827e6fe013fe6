"""A perceptron and an optimiser by hand, in matrix products alone, for tests that follow a rule over many steps."""

import math
from typing import NamedTuple

import pytest
import torch
from rules_helpers import e_of
from torch import Tensor, nn

from wide.models import networks


class Perceptron(NamedTuple):
    """A network of three layers with tanh between them, and what its weights are multiplied by before they are used."""

    network: nn.Sequential
    scales: list[float]

    def gradients(self, parameters: list[Tensor], sent: list[Tensor], inputs: Tensor) -> list[Tensor]:
        """Of weights and biases, in turn; errors go back through `sent`, which are scaled like the weights."""
        weights = [weight * scale for weight, scale in zip(parameters[::2], self.scales, strict=True)]
        sent = [weight * scale for weight, scale in zip(sent, self.scales, strict=True)]
        activities = [inputs]
        for weight, bias in zip(weights[:-1], parameters[1::2], strict=False):
            activities.append(torch.tanh(activities[-1] @ weight.T + bias))
        delta, found = e_of(activities[-1] @ weights[-1].T + parameters[-1]), []
        for activity, through, scale in reversed(list(zip(activities, sent, self.scales, strict=True))):
            found = [scale * delta.T @ activity, delta.sum(0), *found]
            delta = (delta @ through) * (1 - activity**2)
        return found


def perceptron(kind: str) -> Perceptron:
    """(batch, 6) -> (batch, 3) in float64, "plain" or "ntk" (of layers that divide their weights by sqrt(fan_in))."""
    sizes = [(6, 7), (7, 5), (5, 3)]
    layers = [nn.Linear(*size) if kind == "plain" else networks.Dense(*size) for size in sizes]
    modules = [module for layer in layers for module in (layer, nn.Tanh())][:-1]
    scales = [1.0 if kind == "plain" else 1 / math.sqrt(inputs) for inputs, _ in sizes]
    return Perceptron(nn.Sequential(*modules).double(), scales)


each_perceptron = pytest.mark.parametrize("kind", ["plain", "ntk"])


class Momentum:
    """v <- momentum v + (gradient + decay p), p <- p - rate v."""

    def __init__(self, parameters, rate: float, momentum: float, decay: float):
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]

    def step(self, gradients: list[Tensor]) -> None:
        for parameter, velocity, gradient in zip(self.parameters, self.velocities, gradients, strict=True):
            velocity.copy_(self.momentum * velocity + gradient + self.decay * parameter)
            parameter -= self.rate * velocity


def flipped(before: list[Tensor], after: list[Tensor]) -> int:
    """How many entries have another sign."""
    return sum(int((one.sign() != other.sign()).sum()) for one, other in zip(before, after, strict=True))


def assert_same(tensors, expected, tolerance: float = 1e-10) -> None:
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.detach(), other.detach(), rtol=0, atol=tolerance)
