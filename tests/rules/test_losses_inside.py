"""Losses on more than the output, and backward passes that are repeated, joined, kept, or differentiated again."""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import (
    INITIALLY_BACKPROP,
    LAYERWISE,
    TRANSPORTING,
    assert_close,
    each_rule,
    gradients,
    loss,
    mlp,
    move,
    through_the_weights,
)  # fmt: skip
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")
ONLY_THE_OUTPUT = ("dfa", "align_ada", "align_zero")  # rules that know no error but that at the output


class Penalised(nn.Module):
    """Keeps a loss term, or an activity, beside its output."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.penalty = what, None
        self.one, self.two, self.last = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        first = torch.tanh(self.one(inputs))
        z = self.two(first)
        second = torch.relu(z)
        self.penalty = {
            "activity": lambda: second.square().mean(),
            "first activity": lambda: first.abs().sum(),
            "argument": lambda: z.square().mean(),
            "weights": lambda: self.one.weight.square().sum() + self.last.weight.abs().sum(),
            "auxiliary head": lambda: self.last(first).square().mean(),
        }[self.what]()
        return self.last(second)


PENALTIES = ("activity", "first activity", "argument", "weights", "auxiliary head")
each_penalty = pytest.mark.parametrize("what", PENALTIES)


@each_penalty
@pytest.mark.parametrize("name", ["backprop", *TRANSPORTING])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_kept_loss_term_sends_its_own_error_back(name, what, steps):
    network, inputs = Penalised(what), torch.randn(5, 6).double()

    def both(function):
        network.zero_grad()
        output = function(inputs)
        (loss(output) + 0.3 * network.penalty).backward()
        return [p.grad.clone() for p in network.parameters()]

    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    expected = both(network)
    for _ in range(steps):
        gradients(rule, network, inputs)
    made = both(rule)
    assert_close(made, expected)
    only_output = gradients(network, network, inputs)
    assert max((a - b).abs().max() for a, b in zip(made, only_output, strict=True)) > 1e-4


@each_penalty
@pytest.mark.parametrize("name", ONLY_THE_OUTPUT)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_kept_loss_term_is_told_by_rules_that_cannot_send_it(name, what, steps):
    network, inputs = Penalised(what), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    for _ in range(steps):
        gradients(rule, network, inputs)
    output = rule(inputs)
    with pytest.raises(RuntimeError, match="past its output"):
        (loss(output) + network.penalty).backward()


@each_penalty
@pytest.mark.parametrize("name", ONLY_THE_OUTPUT)
def test_a_kept_loss_term_that_only_is_read_is_no_error(name, what):
    network, inputs = Penalised(what), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    for _ in range(3):
        loss(rule(inputs)).backward()
        assert network.penalty.item() > 0


@each_rule
@pytest.mark.parametrize("steps", [0, 2])
def test_an_activity_caught_by_a_hook(name, steps):
    """As with a kept loss term: its own errors, or an error."""
    network, inputs, caught = mlp().double(), torch.randn(5, 6).double(), {}
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    network[1].register_forward_hook(lambda module, given, output: caught.update(activity=output))
    for _ in range(steps):
        gradients(rule, network, inputs)

    def both(function):
        network.zero_grad()
        output = function(inputs)
        (loss(output) + caught["activity"].square().mean()).backward()
        return [None if p.grad is None else p.grad.clone() for p in network.parameters()]

    if name in ONLY_THE_OUTPUT:
        with pytest.raises(RuntimeError, match="past its output"):
            both(rule)
    elif name == "last_layer":
        assert_close(both(rule)[4:], both(network)[4:])
    else:
        assert_close(both(rule), both(network))


@each_rule
def test_a_penalty_on_the_parameters_outside_adds_its_gradient(name):
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    torch.manual_seed(1)
    alone = gradients(rule, network, inputs)
    torch.manual_seed(1)
    network.zero_grad()
    (loss(rule(inputs)) + sum(p.square().sum() for p in network.parameters())).backward()
    zero = torch.zeros(())
    expected = [2 * p.detach() + (zero if g is None else g) for p, g in zip(network.parameters(), alone, strict=True)]
    assert_close([p.grad for p in network.parameters()], expected)


# ------------------------------------------------------------------------------------------------------ backward passes


def learned(rule: align_rules.Rule) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in rule.parameters()]


@each_rule
@pytest.mark.parametrize("steps", [0, 2])
def test_a_kept_graph_gives_the_same_again(name, steps):
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    for _ in range(steps):
        gradients(rule, network, inputs)
    rule.zero_grad()
    value = loss(rule(inputs))
    value.backward(retain_graph=True)
    once = learned(rule)
    value.backward()
    assert_close(learned(rule), [None if g is None else 2 * g for g in once], 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@each_rule
def test_two_calls_before_one_backward_add_up(name):
    network = mlp().double()
    one, other = torch.randn(5, 6).double(), torch.randn(4, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    expected = [None if g is None else g + h for g, h in
                zip(gradients(rule, network, one), gradients(rule, network, other), strict=True)]  # fmt: skip
    network.zero_grad()
    first, second = rule(one), rule(other)
    (loss(second) + loss(first)).backward()
    assert_close([p.grad for p in network.parameters()], expected)


@each_rule
def test_two_backward_passes_in_the_other_order(name):
    network = mlp().double()
    one, other = torch.randn(5, 6).double(), torch.randn(4, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    expected = [gradients(rule, network, inputs) for inputs in (other, one)]
    first, second = loss(rule(one)), loss(rule(other))
    for value, gradient in zip((second, first), expected, strict=True):
        network.zero_grad()
        value.backward()
        assert_close([p.grad for p in network.parameters()], gradient)


@each_rule
def test_torch_autograd_grad_gives_what_backward_leaves(name):
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    left = gradients(rule, network, inputs)
    network.zero_grad()
    made = torch.autograd.grad(loss(rule(inputs)), list(network.parameters()), allow_unused=True)
    assert_close(list(made), left, 1e-14)
    assert all(p.grad is None for p in network.parameters())
    (some,) = torch.autograd.grad(loss(rule(inputs)), [network[4].weight])
    torch.testing.assert_close(some, left[4])


@pytest.mark.parametrize("name", [*LAYERWISE, "align_zero"])
@pytest.mark.parametrize("of", ["inputs", "parameters"])
def test_differentiating_twice_is_refused(name, of):
    network, inputs = mlp(), torch.randn(5, 6, requires_grad=of == "inputs")
    rule = align_rules.RULES[name](network)
    if name == "dfa" and of == "inputs":
        pytest.skip("inputs get no error")
    wanted = [inputs] if of == "inputs" else list(network.parameters())
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again .*only Backprop allows it"):
        torch.autograd.grad(loss(rule(inputs)), wanted, create_graph=True)


def test_backprop_allows_gradient_penalties():
    network, made = mlp().double(), []
    for function in (align_rules.Backprop(network), network):
        inputs = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).requires_grad_()
        network.zero_grad()
        (slope,) = torch.autograd.grad(loss(function(inputs)), [inputs], create_graph=True)
        slope.square().sum().backward()
        made.append([p.grad for p in network.parameters()])
    assert_close(made[0], made[1], 0)


@each_rule
def test_hooks_of_parameters_see_the_rules_gradient_once(name):
    network, inputs, seen = mlp().double(), torch.randn(5, 6).double(), []
    rule = align_rules.RULES[name](network)
    move(network)
    expected = gradients(rule, network, inputs)
    network[4].weight.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    network[4].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    made = gradients(rule, network, inputs)
    assert_close(seen, [expected[4], 2 * expected[4]], 1e-14)
    assert_close(made, [2 * g if k == 4 else g for k, g in enumerate(expected)], 1e-14)


@each_rule
def test_two_rules_on_one_network(name):
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    other = align_rules.AlignAda(network)
    move(network)
    expected = [gradients(r, network, inputs) for r in (rule, other)]
    network.zero_grad()
    (loss(rule(inputs)) + loss(other(inputs))).backward()
    summed = [h if g is None else g + h for g, h in zip(*expected, strict=True)]
    assert_close([p.grad for p in network.parameters()], summed)


@pytest.mark.parametrize("name", [*TRANSPORTING, *INITIALLY_BACKPROP])
def test_a_rule_as_part_of_a_network(name):
    """Trained by backprop in front of it and behind it; the rule's own part at its backprop point."""
    part = mlp().double()
    before, behind = nn.Linear(4, 6).double(), nn.Linear(3, 2).double()
    rule = align_rules.RULES[name](part, **through_the_weights(name, part))
    whole, inputs = nn.ModuleList([before, part, behind]), torch.randn(5, 4).double()
    expected = gradients(lambda x: behind(F.relu(part(torch.tanh(before(x))))), whole, inputs)
    assert_close(gradients(lambda x: behind(F.relu(rule(torch.tanh(before(x))))), whole, inputs), expected)
