"""SignSymmetry by hand, over steps in which signs flip; its magnitudes, when they are drawn, and its exact layers."""

import copy
import itertools
import math

import pytest
import torch
from by_hand import Momentum, assert_same, each_perceptron, flipped, perceptron
from rules_helpers import assert_close, gradients, loss, mlp, move
from torch import nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")
STEPS, SETTINGS = 40, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.02}

each_variant = pytest.mark.parametrize("variant", align_rules.SignSymmetry.VARIANTS)


def constant(weight: torch.Tensor) -> float:
    """sqrt(2/(fan_in + fan_out)), a convolution's fans counting its taps."""
    taps = weight[0, 0].numel()
    return math.sqrt(2 / (weight.shape[1] * taps + weight.shape[0] * taps))


@pytest.mark.parametrize("exact", [(), ("4",), ("0", "2")], ids=str)
@each_variant
@each_perceptron
def test_forty_steps_by_hand(kind, variant, exact):
    hand = perceptron(kind)
    network, inputs = hand.network, torch.randn(8, 6, dtype=torch.float64)
    move(network, 0.1)
    rule = align_rules.SignSymmetry(network, variant=variant, exact=exact)
    optimiser = torch.optim.SGD(rule.parameters(), **SETTINGS)
    reference = Momentum(network.parameters(), *SETTINGS.values())
    start, magnitudes = copy.deepcopy(reference.parameters), []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        weights = reference.parameters[::2]
        if variant == "uSF":
            M = [torch.full_like(weight, constant(weight)) for weight in weights]
        else:
            M = [tensor.clone() for tensor in rule.feedback]  # as drawn; the draw's own test is below
        magnitudes.append(M)
        sent = [
            weight if name in exact else m * torch.sign(weight)
            for name, weight, m in zip(("0", "2", "4"), weights, M, strict=True)
        ]
        reference.step(hand.gradients(reference.parameters, sent, inputs))
        optimiser.step()
        assert_same(network.parameters(), reference.parameters)
    assert flipped(start[::2], reference.parameters[::2]) > 10
    same = [torch.equal(one[0], other[0]) for one, other in itertools.pairwise(magnitudes)]
    assert not any(same) if variant == "brSF" else all(same)


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 60, 3), nn.ReLU(), nn.Conv2d(60, 40, 3, groups=2), nn.Flatten(), nn.Linear(40, 9))


@each_variant
def test_magnitudes(variant):
    rule = align_rules.SignSymmetry(convolutional(), variant)
    rule(torch.randn(2, 4, 5, 5))
    for M, weight in zip(rule.feedback, align_rules.layer_weights(rule.network).values(), strict=True):
        if variant == "uSF":
            assert torch.equal(M, torch.full_like(M, constant(weight)))
        else:  # |N(0, 1)| has the mean sqrt(2/pi) and the mean square 1
            assert (M >= 0).all()
            assert M.mean().item() == pytest.approx(constant(weight) * math.sqrt(2 / math.pi), rel=0.15)
            assert M.square().mean().sqrt().item() == pytest.approx(constant(weight), rel=0.15)


@pytest.mark.parametrize("variant", ["frSF", "brSF"])
def test_magnitudes_follow_the_generator(variant):
    inputs, drawn = torch.randn(5, 6), []
    for seed in (1, 1, 2):
        rule = align_rules.SignSymmetry(mlp(), variant, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + 10)  # nothing of torch's own generator comes in
        rule(inputs)
        drawn.append(rule.feedback_weights()["0.weight"].abs())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_magnitudes_are_drawn_at_a_call_that_is_differentiated_and_by_nothing_else():
    rule, inputs = align_rules.SignSymmetry(mlp(), "brSF"), torch.randn(5, 6)

    def drawn():
        return [M.clone() for M in rule.feedback]

    before, random = drawn(), torch.get_rng_state()
    align_rules.feedback_angles(rule)
    rule.feedback_weights()
    with torch.no_grad():
        rule(inputs)
    align_rules.gradient_angles(rule, loss, inputs)
    rule.state_dict()
    copy.deepcopy(rule)(inputs)
    assert all(torch.equal(one, other) for one, other in zip(before, drawn(), strict=True))
    output = rule(inputs)
    after = drawn()
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    loss(output).backward()
    assert all(torch.equal(one, other) for one, other in zip(after, drawn(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_looked_at_is_what_was_sent():
    """feedback_angles after a call are those of the call's own draw."""
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.SignSymmetry(network, "brSF")
    used = gradients(rule, network, inputs)
    as_drawn = align_rules.FeedbackAlignment(network, rule.feedback_weights())
    assert_close(gradients(as_drawn, network, inputs), used)


def test_two_calls_before_one_backward_keep_a_draw_each():
    network, one, other = mlp().double(), torch.randn(5, 6).double(), torch.randn(5, 6).double()
    rule = align_rules.SignSymmetry(network, "brSF")
    apart = copy.deepcopy(rule)
    alone = (gradients(apart, apart.network, inputs) for inputs in (one, other))
    expected = [sum(pair) for pair in zip(*alone, strict=True)]
    network.zero_grad()
    first, second = rule(one), rule(other)
    (loss(first) + loss(second)).backward()
    assert_close([p.grad for p in network.parameters()], expected)


def test_a_saved_rule_goes_on_with_the_same_draws():
    inputs = torch.randn(5, 6)
    rule = align_rules.SignSymmetry(mlp(), "brSF")
    for _ in range(3):
        rule(inputs)
    other = align_rules.SignSymmetry(mlp(), "brSF")
    other.load_state_dict(rule.state_dict())
    for _ in range(3):
        assert_close(gradients(other, other.network, inputs), gradients(rule, rule.network, inputs), 0)


@pytest.mark.parametrize("variant", ["uSF", "frSF"])
def test_given_magnitudes(variant):
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    magnitudes = {name: torch.rand_like(weight) for name, weight in align_rules.layer_weights(network).items()}
    rule = align_rules.SignSymmetry(network, variant, magnitudes)
    sent = {name: M * network.get_parameter(name).detach().sign() for name, M in magnitudes.items()}
    expected = gradients(align_rules.FeedbackAlignment(network, sent), network, inputs)
    assert_close(gradients(rule, network, inputs), expected)


def test_every_layer_exact_is_backprop():
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.SignSymmetry(network, exact=("0", "2", "4"))
    move(network)  # the exact weights are the current ones
    assert_close(gradients(rule, network, inputs), gradients(network, network, inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "xSF"}, "variant must be one of uSF, frSF, brSF, not 'xSF'"),
        ({"exact": ["5"]}, "no parameter '5'"),
        ({"magnitudes": {"0.weight": torch.ones(7, 6)}}, "must have the names and shapes"),
        ({"magnitudes": {f"{k}.weight": -torch.ones(7, 7) for k in (0, 2, 4)}}, "must not be negative"),
        ({"variant": "brSF", "magnitudes": {}}, "brSF draws its magnitudes at every call"),
        ({"added": ["state"]}, "no parameter 'state'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        align_rules.SignSymmetry(mlp(), **options)
