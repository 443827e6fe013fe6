"""Networks that keep a state between calls, or draw random numbers from anywhere: the initial network starts each call
where the current one does."""

import copy
import random

import numpy
import pytest
import torch
from rules_helpers import (
    INITIALLY_BACKPROP,
    TRANSPORTING,
    LeavesTraces,
    assert_close,
    e_of,
    each_rule,
    gradients,
    move,
    through_the_weights,
)  # fmt: skip
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")
FROM_INITIAL = ("align_ada", "align_zero")
each_backprop = pytest.mark.parametrize("name", [*TRANSPORTING, "align_ada", "align_zero"])


class Leaky(nn.Module):
    """An integrator, v <- v/2 + x, detached between calls."""

    def __init__(self):
        super().__init__()
        self.v = 0.0

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.v + x
        self.v = v.detach()
        return v

    def reset(self) -> None:
        self.v = 0.0


class LeakyBuffer(Leaky):
    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("v", torch.zeros(5, 6, dtype=torch.float64))

    def reset(self) -> None:
        self.v = torch.zeros_like(self.v)


class LeakyInPlace(LeakyBuffer):
    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.v + x
        with torch.no_grad():
            self.v.copy_(v)
        return v


class LeakyInContainers(Leaky):
    """A dictionary that holds a list that holds the state."""

    def __init__(self):
        super().__init__()
        self.v = {"states": [0.0]}

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.v["states"][0] + x
        self.v["states"][0] = v.detach()
        return v

    def reset(self) -> None:
        self.v["states"] = [0.0]


class Counting(Leaky):
    """Every other call has another gain."""

    def forward(self, x: Tensor) -> Tensor:
        self.v += 1
        return x * (1 + int(self.v) % 2)


class History(Leaky):
    """All that was seen, as long as it is."""

    def __init__(self):
        super().__init__()
        self.v = []

    def forward(self, x: Tensor) -> Tensor:
        self.v.append(x.detach())
        return x + torch.stack(self.v).mean(0)

    def reset(self) -> None:
        self.v.clear()


STATES = (Leaky, LeakyBuffer, LeakyInPlace, LeakyInContainers, Counting, History)
each_state = pytest.mark.parametrize("kind", STATES)


class Spiking(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two, self.state, self.late = nn.Linear(6, 6), nn.Linear(6, 3), kind(), nn.Linear(3, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.late(torch.tanh(self.two(torch.tanh(self.state(self.one(inputs))))))


@each_state
@each_backprop
def test_a_state_goes_on_from_call_to_call(name, kind):
    """At the parameters where the rule is backprop, over calls, evaluations and a reset, it stays backprop."""
    network = Spiking(kind)
    reference = copy.deepcopy(network)
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    for step in range(6):
        inputs = torch.randn(5, 6).double()
        if step == 2:
            with torch.no_grad():
                assert torch.equal(rule(inputs), reference(inputs))
        if step == 4:
            network.state.reset()
            reference.state.reset()
        assert_close(gradients(rule, network, inputs), gradients(reference, reference, inputs))


@each_state
@each_rule
def test_values_go_on_as_without_the_rule(name, kind):
    network = Spiking(kind)
    reference = copy.deepcopy(network)
    rule = align_rules.RULES[name](network)
    torch.manual_seed(3)
    move(network)
    torch.manual_seed(3)
    move(reference)
    for _ in range(3):
        inputs = torch.randn(5, 6).double()
        assert torch.equal(rule(inputs), reference(inputs))


@each_state
def test_align_zero_starts_from_the_current_networks_state(kind):
    network = Spiking(kind)
    rule, start = align_rules.AlignZero(network), copy.deepcopy(network)
    move(network, 0.3)
    for _ in range(3):
        inputs = torch.randn(5, 6).double()
        with torch.no_grad():
            e = e_of(copy.deepcopy(network)(inputs))
        start.state = copy.deepcopy(network.state)
        start.zero_grad()
        start(inputs).backward(e)
        assert_close(gradients(rule, network, inputs), [p.grad for p in start.parameters()])


@pytest.mark.parametrize("name", ["dfa", "align_ada"])
def test_a_state_that_is_not_detached_is_told(name):
    class Attached(Leaky):
        def forward(self, x: Tensor) -> Tensor:
            self.v = 0.5 * self.v + x
            return self.v

    rule = align_rules.RULES[name](Spiking(Attached))
    rule(torch.randn(5, 6).double())
    with pytest.raises((TypeError, RuntimeError), match=r"keeps from an earlier call|past its output"):
        rule(torch.randn(5, 6).double()).sum().backward()


# ------------------------------------------------------------------------------------------------------- random numbers


class Noise(nn.Module):
    """A random gain for every activity, from one of many sources."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.own = {
            "a torch.Generator": lambda: torch.Generator().manual_seed(1),
            "a random.Random": lambda: random.Random(1),
            "a NumPy Generator": lambda: numpy.random.default_rng(1),
            "a NumPy RandomState": lambda: numpy.random.RandomState(1),
            "generators in a list": lambda: [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)],
        }.get(source, lambda: None)()

    def forward(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if self.source == "a torch.Generator":
            drawn = torch.rand(shape, generator=self.own, dtype=x.dtype)
        elif self.source == "generators in a list":
            drawn = sum(torch.rand(shape, generator=g, dtype=x.dtype) for g in self.own)
        elif self.source == "a random.Random":
            drawn = self.own.random()
        elif self.source == "a NumPy Generator":
            drawn = torch.from_numpy(self.own.random(shape))
        elif self.source == "a NumPy RandomState":
            drawn = torch.from_numpy(self.own.rand(*shape))
        elif self.source == "random":
            drawn = random.random()
        elif self.source == "NumPy":
            drawn = torch.from_numpy(numpy.random.rand(*shape))
        else:
            drawn = torch.rand_like(x)
        return x * drawn


SOURCES = (
    "torch", "random", "NumPy", "a torch.Generator", "a random.Random", "a NumPy Generator", "a NumPy RandomState",
    "generators in a list",
)  # fmt: skip


def noisy(source: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 6), Noise(source), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value)


@pytest.mark.parametrize("source", SOURCES)
@each_backprop
def test_both_networks_draw_the_same(name, source):
    """Over several steps and an evaluation with noise, as for Monte Carlo dropout."""
    network = noisy(source)
    reference = copy.deepcopy(network)
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    for step in range(4):
        inputs, made = torch.randn(5, 6).double(), []
        for function, module in ((rule, network), (reference, reference)):
            seed(step)
            if step == 2:
                with torch.no_grad():
                    function(inputs)
            made.append(gradients(function, module, inputs))
            after = torch.rand(3), random.random(), numpy.random.rand()
            made[-1].append(torch.tensor([*after[0], *after[1:]]))  # what the user draws next is the same, too
        assert_close(*made)


class Drawing(nn.Module):
    """Holds what draws, and not the generator that it draws from."""

    def __init__(self):
        super().__init__()
        self.draw, self.layer = numpy.random.default_rng(1).random, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.draw()


@pytest.mark.parametrize("name", FROM_INITIAL)
def test_a_bound_method_of_a_generator_is_repeated_or_refused(name):
    torch.manual_seed(1)
    network = nn.Sequential(Drawing(), nn.Linear(6, 3)).double()
    torch.manual_seed(1)
    reference = nn.Sequential(Drawing(), nn.Linear(6, 3)).double()
    rule = align_rules.RULES[name](network)
    for step in range(3):
        inputs = torch.randn(5, 6).double()
        if step == 1:
            with torch.no_grad():  # an evaluation draws from the current network's alone
                network(inputs), reference(inputs)
        expected = gradients(reference, reference, inputs)
        try:
            made = gradients(rule, network, inputs)
        except TypeError:
            return
        assert_close(made, expected)


class LayerDrop(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layers, self.draw = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), draw
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        activity = torch.tanh(self.first(inputs))
        for layer in self.layers:
            if not self.training or self.draw() > 0.5:
                activity = activity + torch.tanh(layer(activity))
        return self.last(activity)


@pytest.mark.parametrize("draw", [random.random, lambda: numpy.random.rand(), lambda: torch.rand(()).item()])
@each_backprop
def test_layers_that_are_left_out_at_random(name, draw):
    network = LayerDrop(draw)
    reference = copy.deepcopy(network)
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    for step in range(8):
        inputs, made = torch.randn(5, 6).double(), []
        for function, module in ((rule, network), (reference, reference)):
            seed(step)
            made.append(gradients(function, module, inputs))
        made = [
            [torch.zeros_like(p) if g is None else g for g, p in zip(gs, network.parameters(), strict=True)]
            for gs in made
        ]
        assert_close(*made)


@pytest.mark.parametrize("name", INITIALLY_BACKPROP)
def test_everything_at_once(name):
    network = LeavesTraces().double()
    reference = copy.deepcopy(network)
    rule = align_rules.RULES[name](network)
    for step in range(3):
        inputs, made = torch.randn(5, 6).double(), []
        for function, module in ((rule, network), (reference, reference)):
            seed(step)
            made.append(gradients(function, module, inputs))
        assert_close(*made)
        assert network.calls == reference.calls == step + 1
        assert torch.equal(network.seen, reference.seen)
        assert torch.equal(network.norm.running_mean, reference.norm.running_mean)
        assert torch.equal(network.generator.get_state(), reference.generator.get_state())


@pytest.mark.parametrize("name", FROM_INITIAL)
def test_a_state_that_cannot_be_copied_is_told_by_name(name):
    network = Spiking(Leaky)
    rule = align_rules.RULES[name](network)
    network.state.stream = (number for number in range(3))
    with pytest.raises(TypeError, match=r"stream of a Leaky, of type generator, which cannot be copied"):
        rule(torch.randn(5, 6).double())


@pytest.mark.parametrize("name", FROM_INITIAL)
def test_a_network_that_cannot_be_copied_is_told_by_name(name):
    network = Spiking(Leaky)
    network.state.stream = (number for number in range(3))
    with pytest.raises(TypeError, match=r"state\.stream \(in a Leaky\) cannot be copied: .*remove it before"):
        align_rules.RULES[name](network)


@pytest.mark.parametrize("name", FROM_INITIAL)
def test_a_network_that_was_called_before_can_be_copied(name):
    class Keeps(Spiking):
        def forward(self, inputs: Tensor) -> Tensor:
            self.features = [torch.tanh(self.one(inputs))]
            return self.late(self.two(self.features[0]))

    network, inputs = Keeps(Leaky), torch.randn(5, 6).double()
    network(inputs)
    rule = align_rules.RULES[name](network)
    assert_close(gradients(rule, network, inputs), gradients(network, network, inputs))


@each_rule
def test_what_is_kept_on_parameters_is_there_in_every_pass(name):
    """Multipliers, as mup keeps its infshape, that the network reads and that its value depends on."""

    class Multiplied(nn.Linear):
        def __init__(self, *sizes: int):
            super().__init__(*sizes)
            self.weight.multiplier = {"width": [3.0]}
            self.bias.multiplier = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                x * self.weight.multiplier["width"][0], self.weight, self.bias * self.bias.multiplier
            )

    network = nn.Sequential(Multiplied(6, 6), nn.Tanh(), Multiplied(6, 6), nn.Tanh(), Multiplied(6, 3)).double()
    inputs = torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network, **through_the_weights(name, network))
    if name not in ("dfa", "last_layer"):
        for _ in range(3):
            assert_close(gradients(rule, network, inputs), gradients(network, network, inputs))
    move(network)
    for _ in range(2):
        assert torch.equal(rule(inputs), network(inputs))
