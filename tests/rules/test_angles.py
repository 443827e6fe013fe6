"""Angles between a rule's gradients and backprop's, and between feedback weights and weights."""

import math

import pytest
import torch
from rules_helpers import IMAGES, WITH_FEEDBACK, each_rule, mean_square, move, residual
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


def stepped(name: str) -> tuple[align_rules.Rule, Tensor]:
    """A rule on a residual network away from its start, with the gradients of a step, and the images of that step."""
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    move(rule.network, 0.1)
    rule(images).square().mean().backward()
    return rule, images


@each_rule
def test_gradient_angles(name):
    rule, images = stepped(name)
    left = {key: p.grad for key, p in rule.network.named_parameters()}
    angles = align_rules.gradient_angles(rule, mean_square, images)
    rule.network.zero_grad()
    mean_square(rule.network(images)).backward()
    assert list(angles) == list(align_rules.layer_weights(rule.network))
    for key, degrees in angles.items():
        if name == "last_layer" and key != "6.weight":
            assert degrees is None
            continue
        one, other = left[key].flatten().double(), rule.network.get_parameter(key).grad.flatten().double()
        cosine = one @ other / one.norm() / other.norm()
        assert degrees == pytest.approx(math.degrees(torch.arccos(cosine.clamp(-1, 1))), abs=0.02)
        if name == "backprop" or (key == "6.weight" and name != "align_zero"):
            assert degrees < 0.01
        else:
            assert degrees > 1


@each_rule
def test_gradient_angles_disturb_nothing(name):
    rule, images = stepped(name)
    rule.network.insert(5, nn.Dropout(0.5))
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    left = {key: None if p.grad is None else p.grad.clone() for key, p in rule.network.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        align_rules.gradient_angles(rule, mean_square, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in state.items())
    for key, parameter in rule.network.named_parameters():
        assert (parameter.grad is None) == (left[key] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, left[key])


def test_gradient_angles_repeat_a_steps_dropout():
    network = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3))
    rule, inputs = align_rules.Backprop(network), torch.randn(5, 6)
    before = torch.get_rng_state()
    mean_square(rule(inputs)).backward()
    assert align_rules.gradient_angles(rule, mean_square, inputs)["0.weight"] > 1
    torch.set_rng_state(before)
    assert align_rules.gradient_angles(rule, mean_square, inputs)["0.weight"] < 0.01


@each_rule
def test_feedback_angles(name):
    rule, _ = stepped(name)
    angles = align_rules.feedback_angles(rule)
    if name in ("backprop", "last_layer", "dfa"):
        assert angles == {}
        return
    assert list(angles) == list(align_rules.layer_weights(rule.network))
    if name in WITH_FEEDBACK:  # random directions in 12 or more dimensions
        assert all(45 < degrees < 135 for degrees in angles.values())
    else:
        assert all(1 < degrees < 60 for degrees in angles.values())
    for weight, B in zip(
        align_rules.layer_weights(rule.network).values(), rule.feedback_weights().values(), strict=True
    ):
        weight.data.copy_(-2 * B)
    opposite = 0 if name == "sign_symmetry" else 180  # its feedback has the signs that the weights now have
    assert all(degrees == pytest.approx(opposite) for degrees in align_rules.feedback_angles(rule).values())


def test_angles_that_are_undefined():
    rule = align_rules.AlignProp(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    rule.network[0].weight.data.zero_()
    rule.network[0].bias.data.fill_(-1)  # no unit is active
    mean_square(rule(torch.randn(5, 6))).backward()
    angles = align_rules.gradient_angles(rule, mean_square, torch.randn(5, 6))
    assert angles == {"0.weight": None, "2.weight": None}
    assert align_rules.feedback_angles(rule) == {"0.weight": None, "2.weight": pytest.approx(0)}
