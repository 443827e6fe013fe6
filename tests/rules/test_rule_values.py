"""What a rule leaves as the network has it: its output, running statistics, who learns, types, and what is kept."""

import copy

import pytest
import torch
from rules_helpers import (
    IMAGES,
    assert_close,
    e_of,
    each_kind,
    each_rule,
    gradients,
    gradients_of,
    make,
    move,
    residual,
)
from torch import nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


@each_kind
@each_rule
def test_value_is_the_networks_own(name, kind):
    rule, inputs = make(name, kind)
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.05)
    for _ in range(4):  # before training, and after each step
        assert torch.equal(rule(inputs), rule.network(inputs))
        gradients(rule, rule.network, inputs)
        optimiser.step()
    rule.eval()
    output = rule(inputs)
    assert output.requires_grad
    assert torch.equal(output, rule.network(inputs))
    with torch.no_grad():
        assert torch.equal(rule(inputs), output)


@each_kind
@each_rule
def test_who_learns(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    gradients(rule, rule.network, inputs)
    last = {"residual": ("head.4.",), "recurrent": ("readout.", "initial_state")}.get(kind, ("readout.",))
    for key, parameter in rule.network.named_parameters():
        if (name, key) == ("dfa", "initial_state"):
            continue  # an input of a layer, which gets no error
        assert (parameter.grad is not None) == (name != "last_layer" or key.startswith(last)), key
    kept = [parameter for key, parameter in rule.named_parameters() if not key.startswith("network.")]
    assert all((parameter.grad is not None) == (name == "kolen_pollack") for parameter in kept)


@each_rule
def test_running_statistics_are_updated_once_from_the_current_network(name):
    rule, images = make(name, "residual")
    move(rule.network)
    once = copy.deepcopy(rule.network)
    once(images)
    for expected in (1, 2):
        gradients(rule, rule.network, images)
        assert rule.network.stem[1].num_batches_tracked == expected
        torch.testing.assert_close(rule.network.stem[1].running_mean, once.stem[1].running_mean, rtol=0, atol=0)
        once(images)


@each_rule
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (4,)], ids=str)
def test_freezing_stops_learning_and_nothing_else(name, frozen):
    """Whether some parts are frozen when the rule is made, or later, what learns gets the gradient that it got."""
    network, images = residual().double(), torch.randn(IMAGES).double()
    rule = align_rules.RULES[name](network)
    move(network)
    torch.manual_seed(1)  # direct feedback is drawn at the first call
    expected = gradients(rule, network, images)
    early = copy.deepcopy(network)
    for part in frozen:
        network[part].requires_grad_(False)
        early[part].requires_grad_(False)
    fresh = align_rules.RULES[name](early)
    torch.manual_seed(1)
    fresh(images)
    fresh.load_state_dict(rule.state_dict())
    names = [key for key, _ in network.named_parameters()]
    still = [None if int(key[0]) in frozen else g for key, g in zip(names, expected, strict=True)]
    assert_close(gradients(rule, network, images), still)
    assert_close(gradients(fresh, early, images), still)


@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_the_initial_network_never_learns(name):
    network, inputs = residual(), torch.randn(IMAGES)
    rule = align_rules.RULES[name](network)
    before = copy.deepcopy(rule.initial.state_dict())
    rule.requires_grad_(True)  # as gradual unfreezing does
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    rule(inputs).square().mean().backward()
    optimizer.step()
    for key, parameter in rule.initial.named_parameters():
        assert torch.equal(parameter, before[key]), key
    assert all(parameter.requires_grad for parameter in network.parameters())


@each_rule
def test_parameter_groups(name):
    """Groups, weight decay and momentum see the gradients that autograd left, and nothing of what the rule keeps."""
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    kept = {key: value.clone() for key, value in rule.named_parameters() if not key.startswith("network.")}
    network = rule.network
    groups = [{"params": network[:4].parameters(), "lr": 0.0}, {"params": network[4:].parameters()}]
    optimiser = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    stem, readout = network[0][0].weight.clone(), network[6].weight.clone()
    for _ in range(2):
        gradients(rule, network, images)
        optimiser.step()
    assert torch.equal(network[0][0].weight, stem)
    assert not torch.equal(network[6].weight, readout)
    assert all(torch.equal(dict(rule.named_parameters())[key], value) for key, value in kept.items())


@each_rule
def test_the_mode_of_the_bare_network_is_followed(name):
    network, images = residual().double(), torch.randn(IMAGES).double()
    rule, other = (align_rules.RULES[name](copy.deepcopy(network)) for _ in range(2))
    for _ in range(2):  # running statistics leave their start; direct feedback is drawn
        torch.manual_seed(1)
        rule(images)
    other = copy.deepcopy(rule)
    rule.network.eval()  # as users do who keep their network at hand
    other.eval()
    statistics = {key: value.clone() for key, value in rule.state_dict().items() if "running" in key}
    assert_close(gradients(rule, rule.network, images), gradients(other, other.network, images), 0)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in statistics.items())
    rule.network.train()
    gradients(rule, rule.network, images)
    assert not any(torch.equal(rule.state_dict()[key], value) for key, value in statistics.items())


@each_rule
def test_autocast(name):
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    move(rule.network, 0.05)
    expected = gradients(rule, rule.network, images)
    with torch.autocast("cpu", torch.bfloat16):
        output, own = rule(images), rule.network(images)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, own)
    rule.network.zero_grad()
    e = e_of(output.detach().float())
    (output * e).sum().backward()
    for parameter, full in zip(rule.network.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (full is None)
        if full is not None and full.norm() > 1e-6:  # a bias in front of a normalisation has rounding alone
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - full).norm() < 0.25 * full.norm()


@each_rule
def test_one_number_per_example(name):
    network, inputs = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    assert rule(inputs).shape == (5,)
    assert gradients(rule, network, inputs)[2].any()


def test_a_network_that_is_one_layer():
    network, inputs = nn.Linear(6, 3), torch.randn(5, 6)
    expected = gradients_of(network, network, inputs)
    for name, kind in align_rules.RULES.items():
        for mine, theirs in zip(gradients_of(kind(network), network, inputs), expected, strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", ["align_zero", "align_ada"])
def test_dropout_draws_one_mask_for_both_networks(name):
    network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    rule, inputs = align_rules.RULES[name](network), torch.randn(5, 6).double()
    torch.manual_seed(1)
    expected, state = gradients_of(network, network, inputs), torch.get_rng_state()
    torch.manual_seed(1)
    for mine, theirs in zip(gradients_of(rule, network, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(torch.get_rng_state(), state)  # the copy's draws are not the user's


@pytest.mark.parametrize("function", [align_rules.couple, align_rules.swap_grad])
def test_primitives_keep_the_value_to_the_last_bit(function):
    # Here value + path - path rounds the value away.
    value, path = torch.full((3,), 0.1, requires_grad=True), torch.full((3,), 1e9, requires_grad=True)
    output = function(value, path)
    output.sum().backward()
    assert torch.equal(output, value)
    assert torch.equal(path.grad, torch.ones(3))
    assert (value.grad is None) == (function is align_rules.swap_grad)
