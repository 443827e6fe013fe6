"""The rules' updates on two hidden layers, written by hand in matrix products alone."""

import math
from typing import NamedTuple

import pytest
import torch
from rules_helpers import WITH_FEEDBACK, assert_close, gradients, mlp, move, target
from torch import Tensor

import align_rules
from wide.models import networks

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.quick]


class Step(NamedTuple):
    """A hidden layer's forward pass: input activity, argument of the relu, spread it was divided by (None: was not)."""

    activity: Tensor
    x: Tensor
    spread: Tensor | None


def run(parameters: list[Tensor], inputs: Tensor, normalised: bool) -> list[Step]:
    """The forward pass of both hidden layers."""
    activity, steps = inputs, []
    for weight, bias in (parameters[:2], parameters[2:4]):
        x, spread = activity @ weight.T + bias, None
        if normalised:
            spread = (x.var(0, correction=0) + 1e-6).sqrt()
            x = (x - x.mean(0)) / spread
        steps.append(Step(activity, x, spread))
        activity = x.clamp(min=0)
    return steps


def readout_input(steps: list[Step]) -> Tensor:
    return steps[-1].x.clamp(min=0)


def through(step: Step, error: Tensor, relu: Step | None = None) -> Tensor:
    """An error at the layer's activity, sent to the output of its matrix product; with the relu' of another step."""
    error = error * ((relu or step).x > 0)
    if step.spread is None:
        return error
    return (error - error.mean(0) - step.x * (error * step.x).mean(0)) / step.spread


def errors(name: str, now: list[Step], start: list[Step], W, W0, B, e: Tensor) -> list[Tensor]:
    """What arrives at the matrix products of both hidden layers, by the rule's definition."""
    if name == "dfa":
        return [through(step, e @ feedback) for step, feedback in zip(now, B, strict=True)]
    if name.startswith("align_ada"):
        arriving = e @ W0[2]
        below = through(start[1], arriving) @ W0[1]
        relu = now[0] if name.endswith("activity") else start[0]
        return [through(now[0], below, relu), through(now[1], arriving)]
    if name == "sign_symmetry":
        sent = [M * weight.sign() for M, weight in zip(B, W, strict=True)]
    else:
        sent = {"backprop": W, "align_prop": W0, "align_zero": W0}.get(name, B)
    last = through(now[1], e @ sent[2])
    return [through(now[0], last @ sent[1]), last]


def by_hand(name: str, theta, theta0, B, inputs: Tensor, normalised: bool) -> list[Tensor | None]:
    """The gradients for (weight, bias) of two hidden layers and a readout, by matrix products alone."""
    now, start = (run(parameters, inputs, normalised) for parameters in (theta, theta0))
    output = readout_input(now) @ theta[4].T + theta[5]
    e = 2 * (output - target(output)) / output.numel()
    steps = start if name == "align_zero" else now
    activities = [steps[0].activity, steps[1].activity, readout_input(steps)]
    deltas = [None, None] if name == "last_layer" else errors(name, steps, start, theta[::2], theta0[::2], B, e)
    found = []
    for delta, activity in zip([*deltas, e], activities, strict=True):
        found += [None, None] if delta is None else [delta.T @ activity, delta.sum(0)]
    return found


@pytest.mark.parametrize("ours", [False, True], ids=["plain", "ours"])
@pytest.mark.parametrize("name", [*align_rules.RULES, "align_ada activity"])
def test_update_by_hand(name, ours):
    # Two hidden layers: with one, AlignAda and AlignProp are the same rule.
    network = (networks.FullyConnectedNetwork(6, 7, 3, hidden=2) if ours else mlp()).double()
    move(network)
    weights = align_rules.layer_weights(network)
    layers = {key: torch.randn_like(weight) for key, weight in weights.items()}
    feedback = {
        **dict.fromkeys(WITH_FEEDBACK, layers),
        "sign_symmetry": {key: drawn.abs() for key, drawn in layers.items()},
        "dfa": [torch.randn(3, 7, dtype=torch.float64) for _ in range(2)],
    }.get(name)
    options = {"magnitudes" if name == "sign_symmetry" else "feedback": feedback} if feedback else {}
    if name == "align_ada activity":
        options = {"coupling": "activity"}
    theta0 = [p.detach().clone() for p in network.parameters()]
    rule = align_rules.RULES[name.split()[0]](network, **options)
    move(network)
    inputs = torch.randn(8, 6, dtype=torch.float64)

    computed = gradients(rule, network, inputs)

    # Ours divides a weight by sqrt(fan_in) before it is used, and its feedback with it.
    scales = [1 / math.sqrt(p.shape[1]) if ours and p.dim() == 2 else 1.0 for p in theta0]
    used, used0 = ([p.detach() * s for p, s in zip(ps, scales, strict=True)] for ps in (network.parameters(), theta0))
    B = feedback if name == "dfa" else [b * s for b, s in zip((feedback or {}).values(), scales[::2], strict=False)]
    expected = by_hand(name, used, used0, B, inputs, normalised=ours)
    assert_close(computed, [None if g is None else g * s for g, s in zip(expected, scales, strict=True)])
