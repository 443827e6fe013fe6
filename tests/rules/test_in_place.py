"""Changes in place: what a network does with them is what its rule does."""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import assert_close, each_rule, gradients, gradients_of, move
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


class InPlace(nn.Module):
    """Activations in place, by every way of calling them; or the same ones out of place."""

    def __init__(self, changes: bool):
        super().__init__()
        self.changes = changes
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.elu = nn.ELU(inplace=changes)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second, third, fourth, last = self.layers
        activity = self.elu(first(inputs))
        activity = F.leaky_relu(second(activity), 0.1, self.changes)
        activity = F.silu(third(activity), inplace=self.changes)
        z = fourth(activity)
        activity = torch.tanh_(z) if self.changes else torch.tanh(z)
        return last(z if self.changes else activity)  # changed in place, whatever name it goes by


@each_rule
def test_activations_in_place(name):
    rules = []
    for changes in (False, True):
        torch.manual_seed(0)
        network = InPlace(changes).double()
        rules.append(align_rules.RULES[name](network))
        move(network)
    inputs = torch.randn(5, 6).double()
    torch.manual_seed(1)  # direct feedback is drawn at the first call
    expected = gradients(rules[0], rules[0].network, inputs)
    torch.manual_seed(1)
    assert torch.equal(rules[1](inputs), rules[1].network(inputs))
    assert_close(gradients(rules[1], rules[1].network, inputs), expected)


@each_rule
def test_in_place_changes_reach_the_skip(name):
    """A ReLU in place in a branch rectifies what the skip adds, in the network and so in the rule."""

    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            z = self.one(inputs)
            return self.three(z + self.two(F.relu(z, inplace=True)))

    network, inputs = Rectified().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    assert torch.equal(rule(inputs), network(inputs))
    gradients(rule, network, inputs)


def add_in_place(tensor: Tensor, other, changes: bool) -> Tensor:
    return tensor.add_(other) if changes else tensor + other


def activated_then_dropped(net, inputs, changes):
    torch.manual_seed(3)
    return net.two(F.dropout(F.silu(net.one(inputs), inplace=changes), 0.5, inplace=changes))


def rectified_then_added(net, inputs, changes):
    x = net.one(inputs)
    return add_in_place(x, net.two(F.relu(x)), changes)


def argument_changed_afterwards(net, inputs, changes):
    x = net.one(inputs)
    activity = F.relu(x)
    y = net.two(activity)
    return y * add_in_place(x, 1, changes).mean()


def changed_through_a_view(net, inputs, changes):
    activity = F.gelu(net.one(inputs))
    if changes:
        activity.view(5, 2, 3).mul_(2)
        return net.two(activity)
    return net.two((activity.view(5, 2, 3) * 2).view(5, 6))


class Changing(nn.Module):
    def __init__(self, body, changes: bool):
        super().__init__()
        self.body, self.changes = body, changes
        self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.elu(self.body(self, inputs, self.changes)))


@each_rule
@pytest.mark.parametrize(
    "body", [activated_then_dropped, rectified_then_added, argument_changed_afterwards, changed_through_a_view]
)
def test_changes_in_place_change_no_gradient(name, body):
    made = []
    for changes in (False, True):
        torch.manual_seed(0)
        network = Changing(body, changes).double()
        rule = align_rules.RULES[name](network)
        move(network)
        inputs = torch.randn(5, 6).double()
        torch.manual_seed(1)  # direct feedback is drawn at the first call
        made.append(gradients(rule, network, inputs))
    assert_close(made[1], made[0])


def test_an_argument_changed_too_early_is_told_or_harmless():
    def body(net, inputs, changes):
        x = net.one(inputs)
        activity = F.relu(x)
        if changes:
            x.add_(1)
        return net.two(activity)

    made, inputs = [], torch.randn(5, 6).double()
    for changes in (False, True):
        torch.manual_seed(0)
        network = Changing(body, changes).double()
        rule = align_rules.AlignAda(network)
        move(network)
        try:
            made.append(gradients(rule, network, inputs))
        except RuntimeError as error:
            assert changes
            assert "in front of two.weight is changed in place" in str(error)  # noqa: PT017
            return
    assert_close(made[1], made[0])


class ChangedInPlace(nn.Module):
    """An activity that is changed in place before a layer takes it in."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        activity = F.gelu(self.first(inputs))
        activity += inputs
        return self.third(torch.tanh(self.second(activity)))


def test_align_ada_sees_changes_in_place():
    network, inputs = ChangedInPlace().double(), torch.randn(5, 6).double()
    expected = gradients_of(network, network, inputs)
    for mine, theirs in zip(gradients_of(align_rules.AlignAda(network), network, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
