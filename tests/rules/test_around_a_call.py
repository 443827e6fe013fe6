"""What is around a rule's call: hooks, modes, objects, classes and networks that change, checks of values."""

import collections
import contextlib
import copy
import gc
import itertools
import random
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import TRANSPORTING, loss, mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import align_rules

pytestmark = pytest.mark.filterwarnings("ignore:.*is recorded anew")


class Branching(nn.Sequential):
    """Recorded in training."""

    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() < 1e9 else x + 1


def branching() -> Branching:
    return Branching(*mlp())


@pytest.mark.parametrize("make", [mlp, branching])
def test_activities_that_hooks_keep(make):
    kept, listed, network = {}, [], make()
    network[0].register_forward_hook(lambda module, inputs, output: kept.__setitem__("h", output.detach()))
    network[2].register_forward_hook(lambda module, inputs, output: listed.append(output.detach().numpy()[0, 0]))
    rule, inputs = align_rules.FeedbackAlignment(network), torch.randn(5, 6)
    for _ in range(2):
        rule(inputs).sum().backward()
    assert torch.equal(kept["h"], network[0](inputs))
    assert listed == [listed[0]] * len(listed) == [network[:3](inputs)[0, 0].item()] * 2


class Slot:
    __slots__ = ("h",)


class Lazy(dict):
    """Which nobody may look into."""

    __iter__ = items = values = keys = copy = update = None


def test_a_recorded_call_leaves_what_a_network_keeps_wherever_it_is():
    slot, inputs, network = Slot(), torch.randn(5, 6), branching()
    network.lazy = Lazy()

    def keep(module, inputs, output):
        slot.h = output
        network.lazy["rows"] = [(row, None) for row in output]
        cycle = [output * 2]
        cycle.append(cycle)

    network[0].register_forward_hook(keep)
    rule = align_rules.AlignAda(network)
    for _ in range(2):
        output = rule(inputs)
        assert torch.equal(slot.h, network[0](inputs))
        rows = torch.stack([row for row, _ in dict.__getitem__(network.lazy, "rows")])
        assert torch.equal(rows, slot.h)
        (gradient,) = torch.autograd.grad(slot.h.sum(), network[0].bias)
        assert torch.equal(gradient, torch.full((7,), 5.0))
        output.sum().backward()


def settles(network, h):
    """By steps down an energy, as predictive coding does."""
    for _ in range(3):
        z = h.detach().requires_grad_()
        h = h - 0.1 * torch.autograd.grad(z.cos().sum(), z)[0]
    return h


def vectorised(network, h):
    return torch.vmap(lambda row: row * network.scale)(h) + torch.func.jacrev(torch.sin)(h[0].detach()).sum(0)


def weakly(network, h):
    network.seen = weakref.ref(h)
    return h


def hooks_come(network, h):
    if not network.hooked:
        network.hooked = True
        network.layer.register_forward_hook(lambda module, inputs, output: None)
    return h


def of_a_library(network, h):
    return doubled(h)


def parameter(network, h):
    network.kept = [nn.Parameter(h.detach().mean(0), requires_grad=False)]
    return h + network.kept[0]


def step_by_step(network, h):
    steps = h.new_zeros(len(h), 3, 7)
    for t in range(3):
        steps[:, t] = h * (t + 1)
    network.kept = [steps[:, 0]]
    return steps[:, -1]


def a_leaf_of_its_own(network, h):
    noise = torch.full((7,), 0.1, dtype=h.dtype)
    noise.requires_grad = True
    return h + noise


def view_of_a_weight(network, h):
    network.kept = network.kept or [network.layer.weight.detach()]
    return h / network.kept[0].norm()


@torch.library.custom_op("test_around_a_call::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: 2 * gradient)


class Uses(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.layer, self.readout, self.use, self.hooked, self.kept = nn.Linear(6, 7), nn.Linear(7, 3), use, False, None
        self.scale = 3.0

    def forward(self, x):
        h = self.use(self, torch.tanh(self.layer(x)))
        return self.readout(h if h.sum() < 1e9 else h + 1)


@pytest.mark.parametrize(
    "use",
    [
        settles,
        vectorised,
        weakly,
        hooks_come,
        of_a_library,
        parameter,
        view_of_a_weight,
        step_by_step,
        a_leaf_of_its_own,
    ],
)
def test_what_a_recorded_network_does(use):
    network, inputs = Uses(use), torch.randn(5, 6)
    plain = copy.deepcopy(network)
    rule = align_rules.AlignAda(network)
    for _ in range(3):
        outputs = [call(inputs) for call in (rule, plain)]
        torch.testing.assert_close(*outputs)
        with torch.no_grad():
            network.layer.weight *= 1.1
            plain.layer.weight *= 1.1
    align_rules.verify(align_rules.AlignAda(network), loss, inputs, double=True)
    assert gc.isenabled()


def test_scripted_code_in_a_recorded_network():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        by_script = torch.jit.script(softsign)
    with pytest.raises(TypeError, match="writes Uses down wrongly"):  # it cuts its inputs from the graph
        align_rules.AlignAda(Uses(lambda network, h: by_script(h)))(torch.randn(5, 6))


def softsign(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.abs())


def test_a_rule_has_no_gradient_to_retain():
    def retains(network, h):
        h.retain_grad()
        return h

    with pytest.raises(TypeError, match="no gradient that retain_grad could keep"):
        align_rules.FeedbackAlignment(Uses(retains))(torch.randn(5, 6))


def test_memory_that_tensors_share_is_not_written_into_when_recorded():
    class Shares(Uses):
        def forward(self, x):
            self.slots[0].add_(1)
            return super().forward(x) + self.whole.sum()

    network = Shares(lambda network, h: h)
    network.whole = torch.zeros(2, 3)
    network.slots = network.whole.unbind()
    with pytest.raises(TypeError, match="memory that several of its tensors share"):
        align_rules.AlignAda(network)(torch.randn(5, 6))
    assert not network.whole.any()


@pytest.mark.parametrize("name", ["align_zero", "last_layer", "fa"])
def test_another_network_in_its_place(name):
    rule = align_rules.RULES[name](mlp())
    rule.network = mlp()
    with pytest.raises(RuntimeError, match="the network is another than when the rule was made"):
        rule(torch.randn(5, 6))


def test_verify_leaves_gradients_and_needs_some():
    rule, inputs = align_rules.AlignAda(mlp()), torch.randn(5, 6)
    loss(rule(inputs)).backward()
    before = [p.grad for p in rule.network.parameters()]
    align_rules.verify(rule, loss, inputs, double=True)
    assert all(p.grad is g and g.dtype == p.dtype for p, g in zip(rule.network.parameters(), before, strict=True))
    for nothing in (lambda output: torch.zeros((), requires_grad=True), lambda output: loss(output) * torch.nan):
        with pytest.raises(ValueError, match="nothing can be compared"):
            align_rules.verify(rule, nothing, inputs)


@pytest.mark.parametrize("name", TRANSPORTING)
def test_verify_looks_below_a_readout_of_zeros(name, monkeypatch):
    network = mlp()
    nn.init.zeros_(network[4].weight)
    rule, inputs = align_rules.RULES[name](network), torch.randn(5, 6)
    align_rules.verify(rule, loss, inputs)
    right = align_rules._transposed
    monkeypatch.setattr(align_rules, "_transposed", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(RuntimeError, match=r"gradients differ.*0\.weight"):
        align_rules.verify(rule, loss, inputs)


def test_a_patched_rule_shares_no_code(monkeypatch):
    inputs, right = torch.randn(5, 6), align_rules.FeedbackAlignment.layer
    align_rules.verify(align_rules.FeedbackAlignment(mlp()), loss, inputs)
    patched = align_rules.FeedbackAlignment(mlp())
    patched.layer = lambda draft, layer, now, B: draft.cut(layer, now)
    with pytest.raises(RuntimeError, match="gradients differ"):
        align_rules.verify(patched, loss, inputs)
    monkeypatch.setattr(align_rules.FeedbackAlignment, "layer", lambda rule, *others: patched.layer(*others))
    with pytest.raises(RuntimeError, match="gradients differ"):
        align_rules.verify(align_rules.FeedbackAlignment(mlp()), loss, inputs)
    monkeypatch.setattr(align_rules.FeedbackAlignment, "layer", right)
    align_rules.verify(align_rules.FeedbackAlignment(mlp()), loss, inputs)


def written_down(rule, inputs) -> bool:
    rule(inputs)
    return align_rules._now.read[1] is not None


def test_one_odd_call_does_not_decide_about_others():
    rule, inputs = align_rules.AlignAda(mlp()), torch.randn(5, 6)
    assert written_down(rule, inputs)
    with FlopCounterMode(display=False):
        assert not written_down(rule, inputs)
    with torch.compiler.set_stance("force_eager"):
        assert not written_down(rule, inputs)
    assert written_down(rule, inputs)
    rule = align_rules.AlignAda(branching())
    assert not written_down(rule, inputs)
    rule.network.forward = lambda x: nn.Sequential.forward(rule.network, x)
    assert written_down(align_rules.AlignAda(rule.network), inputs)


def test_classes_and_attributes_that_change():
    class Net(nn.Sequential):
        def forward(self, x):
            with contextlib.suppress(AttributeError):
                x = x + self.state
            self.state = x.detach() * 0.5
            return super().forward(x)

    torch.manual_seed(0)
    rule, network = (align_rules.FeedbackAlignment(Net(*mlp())), Net(*mlp()))
    network.load_state_dict(rule.network.state_dict())
    for _ in range(3):
        inputs = torch.randn(5, 6)
        assert torch.equal(rule(inputs), network(inputs))
    Net.forward = lambda self, x: 2 * nn.Sequential.forward(self, x)
    assert torch.equal(rule(inputs), network(inputs))


class Batch:
    pass


def test_attributes_of_a_batch_that_are_tried():
    class Net(nn.Sequential):
        def forward(self, batch):
            try:
                return super().forward(batch.x * batch.weight)
            except AttributeError:
                return super().forward(batch.x)

    rule, batch = align_rules.FeedbackAlignment(Net(*mlp())), Batch()
    batch.x = torch.randn(5, 6)
    rule(batch)
    batch.weight = torch.rand(5, 1)
    assert torch.equal(rule(batch), rule.network(batch))


def test_checks_of_values_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, k):
            h = self.i(x)
            h = torch.linalg.solve(k * (h.T @ h + torch.eye(6)), h.T).T
            return self.o(h @ torch.linalg.cholesky(torch.eye(6) * k) @ torch.linalg.inv(k * torch.eye(6)))

    rule, x = align_rules.FeedbackAlignment(Net()), torch.randn(8, 6)
    rule(x, torch.tensor(1.0)).sum().backward()
    for k in (0.0, -1.0):
        with pytest.raises(torch.linalg.LinAlgError):
            rule(x, torch.tensor(k))
    with pytest.raises(ValueError, match="to satisfy"):
        torch.distributions.Normal(torch.tensor(float("nan")), 1.0)


def test_a_generator_that_is_handed_over():
    class Noisy(nn.Sequential):
        def forward(self, x, generator):
            return super().forward(x + torch.randn(x.shape, generator=generator))

    network, inputs = Noisy(*mlp()), torch.randn(5, 6)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    rule = align_rules.AlignAda(network)
    for _ in range(2):
        assert torch.equal(rule(inputs, generators[0]), network(inputs, generators[1]))


def test_torch_func_inside_of_a_network():
    class Energy(nn.Sequential):
        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda row: super(Energy, self).forward(row).sum()))(x)

    inputs = torch.randn(5, 6)
    with contextlib.suppress(TypeError):  # it may be refused, but must leave the process as it was
        align_rules.AlignAda(Energy(*mlp()))(inputs)
    rule = align_rules.AlignAda(mlp())
    torch.utils.checkpoint.checkpoint(rule, inputs.requires_grad_(), use_reentrant=False).sum().backward()
    assert inputs.grad.any()


def test_values_that_a_recorded_network_reads(capsys):
    class Reads(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            print(f"{h.mean():.3f}", h)
            order = torch.from_numpy(h.detach().numpy().sum(1).argsort())
            return self[4](self[2](h[order])) + h.detach().tolist()[0][0]

    rule, inputs = align_rules.FeedbackAlignment(Reads(*mlp())), torch.randn(5, 6)
    output = rule(inputs)
    assert "unctional" not in capsys.readouterr().out
    assert torch.equal(output, rule.network(inputs))


class Statistics(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def test_no_call_runs_the_network_twice():
    rule, inputs = align_rules.AlignAda(Statistics()), torch.randn(5, 6)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            rule(inputs)
    with FlopCounterMode(display=False):
        rule(inputs)
    rule(inputs)
    assert rule.network[1].num_batches_tracked == 5


PYTHONS = {
    "random": lambda _: random.random(),
    "sample": lambda _: random.sample(range(6), 6)[0],
    "object": lambda settings: settings.generator.random(),
    "list": lambda settings: settings.generators[0].random(),
}


class DrawsInPython(nn.Linear):
    def __init__(self, draw):
        super().__init__(6, 3)
        self.draw = draw
        self.settings = types.SimpleNamespace(generator=random.Random(0), generators=[random.Random(0)])

    def forward(self, x):
        return super().forward(x * self.draw(self.settings))


@pytest.mark.parametrize("draw", PYTHONS.values(), ids=list(PYTHONS))
def test_draws_of_python_are_no_constants(draw):
    torch.manual_seed(0)
    rule, network, inputs = align_rules.FeedbackAlignment(DrawsInPython(draw)), DrawsInPython(draw), torch.randn(5, 6)
    network.load_state_dict(rule.network.state_dict())
    found = []
    for called in (rule, network):
        random.seed(0)
        found.append([called(inputs) for _ in range(5)])
    torch.testing.assert_close(*found)


def test_a_generator_may_be_handed_over():
    torch.manual_seed(0)
    network, inputs = nn.Linear(6, 3), torch.randn(5, 6)
    network.forward = lambda x, generator: F.linear(x * generator.random(), network.weight)
    rule, generators = align_rules.FeedbackAlignment(network), [random.Random(0), random.Random(0)]
    found = [[called(inputs, g) for _ in range(4)] for called, g in zip((rule, network), generators, strict=True)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("iterator", [lambda: (k for k in range(9)), lambda: iter(range(9)), itertools.count])
def test_an_iterator_is_refused(iterator):
    network = DrawsInPython(lambda settings: next(settings.values))
    network.settings.values = iterator()
    with pytest.raises(TypeError, match="has an iterator, which cannot be put back"):
        align_rules.FeedbackAlignment(network)(torch.randn(5, 6))
    assert next(network.settings.values) == 0


def test_recorded_calls_leave_no_graphs():
    rule, inputs, counts = align_rules.AlignAda(branching()), torch.randn(5, 6), []
    rule(inputs)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            rule(inputs).sum().backward()
            counts.append(sum(type(held) is torch.fx.Node for held in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[-1] < 2 * counts[0]


@pytest.mark.parametrize("make", [mlp, branching])
def test_another_default_device(make):
    rule, inputs = align_rules.AlignAda(make()), torch.randn(5, 6)
    torch.set_default_device("meta")
    try:
        output = rule(inputs)
    finally:
        torch.set_default_device(None)
    assert torch.equal(output, rule.network(inputs))


REGISTRY = {"numbers": list(range(3))}
REGISTRY["itself"] = REGISTRY


class Cyclic(nn.Sequential):
    """What it computes is kept by a function that refers to itself; it names what holds itself; its states, too."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.states = collections.deque(maxlen=2)

    def forward(self, x):
        def walk(depth):
            return h if depth == 0 else walk(depth - 1)

        h = torch.relu(self[0](x))
        h = self[2](walk(len(REGISTRY["numbers"])) + sum(self.states))
        self.states.append(h.detach())
        return self[4](h) if h.sum() < 1e9 else h


def test_cycles_and_a_deque_of_limited_length():
    torch.manual_seed(0)
    rule, network = align_rules.AlignAda(Cyclic(*mlp())), Cyclic(*mlp())
    network.load_state_dict(rule.network.state_dict())
    for _ in range(5):
        inputs = torch.randn(5, 6)
        torch.testing.assert_close(rule(inputs), network(inputs))


@pytest.mark.parametrize("make", [mlp, branching])
@pytest.mark.parametrize("name", TRANSPORTING)
def test_an_input_may_be_a_parameter(make, name):
    """As images that are optimised are."""
    rule, inputs = align_rules.RULES[name](make()), nn.Parameter(torch.randn(5, 6))
    found = [torch.autograd.grad(loss(rule(x)), x)[0] for x in (inputs, inputs.detach().requires_grad_())]
    assert torch.equal(*found)
