"""Inputs in containers of all kinds: their gradient comes once, or not at all where the rule takes them as data."""

import collections
import dataclasses
import types
from typing import NamedTuple

import pytest
import torch
from rules_helpers import LAYERWISE, assert_close, each_rule, gradients, loss, mlp, move
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return self.second(torch.relu(input=self.first(inputs + state)))


def test_inputs_get_their_gradient_once_however_they_are_given():
    rule, inputs = align_rules.AlignAda(Stateful()), torch.randn(5, 6)
    gradients = []
    for by_name in (False, True):
        state = torch.zeros(5, 6, requires_grad=True)
        (rule(inputs, state=state) if by_name else rule(inputs, state)).sum().backward()
        gradients.append(state.grad)
    torch.testing.assert_close(*gradients)


def test_direct_feedback_takes_inputs_with_a_gradient_as_data():
    rule, inputs = align_rules.DirectFeedbackAlignment(mlp()), torch.randn(5, 6, requires_grad=True)
    rule(inputs).sum().backward()
    assert inputs.grad is None
    assert len(rule.feedback) == 2


class Pair(NamedTuple):
    data: Tensor
    other: Tensor


@dataclasses.dataclass
class Data:
    data: Tensor
    other: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    data: Tensor
    other: Tensor


@dataclasses.dataclass
class Outer:
    pair: Pair
    name: str = "outer"


class Mapped(collections.UserDict):
    """As tokenisers return."""


class Opaque:
    """What no library can look into."""

    def __init__(self, data: Tensor, other: Tensor):
        self.data, self.other = data, other


# kind: how the two inputs are packed, and taken out again
CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda given: given),
    "list": (lambda a, b: [a, b], lambda given: given),
    "dictionary": (lambda a, b: {"a": a, "b": b}, lambda given: given.values()),
    "ordered dictionary": (lambda a, b: collections.OrderedDict(a=a, b=b), lambda given: given.values()),
    "named tuple": (Pair, lambda given: given),
    "dataclass": (Data, lambda given: (given.data, given.other)),
    "frozen dataclass": (Frozen, lambda given: (given.data, given.other)),
    "dataclass of a named tuple": (lambda a, b: Outer(Pair(a, b)), lambda given: given.pair),
    "nested": (
        lambda a, b: {"x": [(a, {"y": b}), 3, None, "name"]}, lambda given: (given["x"][0][0], given["x"][0][1]["y"]),
    ),
    "named tuple in a list": (lambda a, b: [Pair(a, b), 1.0], lambda given: given[0]),
    "user's dictionary": (lambda a, b: Mapped(a=a, b=b), lambda given: (given["a"], given["b"])),
    "deque": (lambda a, b: collections.deque([a, b]), lambda given: given),
    "default dictionary": (lambda a, b: collections.defaultdict(list, a=a, b=b), lambda given: given.values()),
    "namespace": (lambda a, b: types.SimpleNamespace(a=a, b=b), lambda given: (given.a, given.b)),
    "opaque": (Opaque, lambda given: (given.data, given.other)),
}  # fmt: skip
UNKNOWN = ("namespace", "opaque")  # which a rule cannot look into


class Taking(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.take, self.net = take, mlp()
        self.double()

    def forward(self, given) -> Tensor:
        data, other = self.take(given)
        return self.net(data) + other


def by_container(name: str, kind: str) -> list[Tensor | None]:
    """Gradients of the network, of an encoder in front of it, and of a target tensor beside it."""
    pack, take = CONTAINERS[kind]
    torch.manual_seed(1)
    network, encoder = Taking(take), nn.Linear(6, 6).double()
    other = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    for _ in range(2):
        encoder.zero_grad()
        network.zero_grad()
        other.grad = None
        torch.manual_seed(2)
        loss(rule(pack(encoder(inputs), other))).backward()
    return [*(p.grad for p in network.parameters()), encoder.weight.grad, encoder.bias.grad, other.grad]


@pytest.mark.parametrize("kind", CONTAINERS)
@each_rule
def test_as_in_a_tuple(name, kind):
    expected = by_container(name, "tuple")
    try:
        made = by_container(name, kind)
    except TypeError:
        assert kind in UNKNOWN
        return
    assert_close(made, expected)


class Packed(nn.Module):
    """Takes a packed sequence, or its data."""

    def __init__(self):
        super().__init__()
        self.net = mlp().double()

    def forward(self, given: PackedSequence | Tensor) -> Tensor:
        return self.net(given.data if isinstance(given, PackedSequence) else given)


@each_rule
def test_a_packed_sequence(name):
    network, encoder = Packed(), nn.Linear(6, 6).double()
    rows = [torch.randn(length, 6).double() for length in (3, 2, 1)]
    rule = align_rules.RULES[name](network)
    move(network)
    made = []
    for take in (lambda packed: packed, lambda packed: packed.data):
        encoder.zero_grad()
        network.zero_grad()
        loss(rule(take(pack_sequence([encoder(row) for row in rows])))).backward()
        made.append([p.grad for module in (network, encoder) for p in module.parameters()])
        network.zero_grad(set_to_none=True), encoder.zero_grad(set_to_none=True)
    assert_close(*made)


@pytest.mark.parametrize("name", LAYERWISE)
def test_what_is_given_is_not_changed(name):
    given = {"x": Data(torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.zeros(3))}
    data = given["x"].data
    network = Taking(lambda given: (given["x"].data, given["x"].other))
    gradients(align_rules.RULES[name](network), network, given)
    assert given["x"].data is data
