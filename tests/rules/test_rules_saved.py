"""Rules that are saved, loaded, copied, cast and drawn again."""

import copy
import io

import pytest
import torch
from rules_helpers import (
    IMAGES,
    WITH_FEEDBACK,
    assert_close,
    each_kind,
    each_rule,
    gradients,
    make,
    mlp,
    move,
    residual,
)
from torch import nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


@each_kind
@each_rule
def test_state_dict(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    expected = gradients(rule, rule.network, inputs)  # draws the feedback weights that wait for the first call
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)

    fresh, _ = make(name, kind)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_close(gradients(fresh, fresh.network, inputs), expected, 0)


@each_kind
@each_rule
def test_deepcopy(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    expected = gradients(rule, rule.network, inputs)
    copied = copy.deepcopy(rule)
    assert_close(gradients(copied, copied.network, inputs), expected, 0)
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert_close(gradients(rule, rule.network, inputs), expected, 0)


@each_rule
def test_a_deep_copy_learns_its_own_network(name):
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    copied = copy.deepcopy(rule)
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    copied(images).square().sum().backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert not torch.equal(copied.network[4].weight, rule.network[4].weight) or name == "last_layer"
    assert not torch.equal(copied.network[6].weight, rule.network[6].weight)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in rule.parameters())


@each_rule
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "after a call"])
def test_pickle(name, called):
    """torch.save of the rule itself, with its network."""
    rule, inputs = make(name, "residual")
    if called:
        gradients(rule, rule.network, inputs)
    file = io.BytesIO()
    torch.save(rule, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for _ in range(2):
        assert loaded.state_dict().keys() == rule.state_dict().keys()
        expected = gradients(rule, rule.network, inputs)
        assert_close(gradients(loaded, loaded.network, inputs), expected, 0)
        assert torch.equal(loaded(inputs), rule(inputs))


@each_rule
def test_double(name):
    rule, inputs = make(name, "residual")
    move(rule.network)
    single = gradients(rule, rule.network, inputs)
    rule.double()
    assert all(tensor.dtype == torch.float64 for tensor in rule.state_dict().values() if tensor.is_floating_point())
    double = gradients(rule, rule.network, inputs.double())
    assert_close([None if g is None else g.double() for g in single], double, 1e-3)


def test_direct_feedback_is_drawn_once_and_in_the_networks_type():
    rule, images = make("dfa", "convolutional", torch.float64)
    first = gradients(rule, rule.network, images)
    assert [tuple(B.shape) for B in rule.feedback] == [(3, 6, 6, 6), (3, 6, 3, 3)]
    assert all(B.dtype == torch.float64 for B in rule.feedback)
    assert_close(gradients(rule, rule.network, images), first, 0)


def test_direct_feedback_from_a_checkpoint_takes_the_networks_type():
    saved = align_rules.DirectFeedbackAlignment(mlp())
    saved(torch.randn(5, 6))
    fresh = align_rules.DirectFeedbackAlignment(mlp().double())
    fresh.load_state_dict(saved.state_dict())
    assert {B.dtype for B in fresh.feedback} == {torch.float64}


@pytest.mark.parametrize("name", ["dfa", *WITH_FEEDBACK])
def test_feedback_follows_the_generator(name):
    network, inputs = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 10)), torch.randn(2, 100)
    drawn = []
    for seed in (1, 1, 2):
        rule = align_rules.RULES[name](network, generator=torch.Generator().manual_seed(seed))
        rule(inputs)
        drawn.append(next(iter(rule.feedback)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    expected = network[0].weight.std().item() if name != "dfa" else 400**-0.5
    assert drawn[0].std().item() == pytest.approx(expected, rel=0.05)
