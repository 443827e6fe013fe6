"""What is an activity, and what a weight: constants, draws, state, tensors that no rule knows. FA by plain runs.

Each network is called as Dynamo writes it down, and recorded.
"""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import INITIALLY_BACKPROP, LAYERWISE
from torch import Tensor, nn
from torch.nn.utils import prune

import align_rules

pytestmark = pytest.mark.filterwarnings("ignore:.*is recorded anew")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """(6, 4) -> (6, 3). `product(weight, a)` is a times the weight's transpose, as a rule has it."""

    def __init__(self, recorded: bool = False):
        super().__init__()
        self.i, self.z, self.r, self.o = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.table, self.recorded = torch.linspace(0, 1, 12).reshape(6, 2), recorded
        self.register_buffer("held", self.table.clone())

    def forward(self, x: Tensor, product=F.linear) -> Tensor:
        if self.recorded and x.sum() > 1e9:
            x = x + 1
        return product(self.called(x, product), self.o.weight)

    def through(self, places: Tensor, x: Tensor, product) -> Tensor:
        return torch.tanh(self.i(x) + product(torch.tanh(product(places, self.z.weight)), self.r.weight))


class Zeros(Net):  # a recurrent network that runs before its stimulus comes
    def called(self, x, product):
        h = x.new_zeros(len(x), 5)
        for step in range(4):
            h = torch.tanh(product(h, self.r.weight) + self.r.bias + (self.i(x) if step > 1 else 0))
        return h


class Noise(Net):
    def called(self, x, product):
        return self.through(torch.randn(len(x), 2), x, product)


class Buffer(Net):
    def called(self, x, product):
        return self.through(self.held, x, product)


class Attribute(Net):
    def called(self, x, product):
        return self.through(self.table, x, product)


class Made(Net):
    def called(self, x, product):
        return self.through(torch.tensor([[0.1, 0.2], [0.3, -0.4]]).repeat(3, 1), x, product)


class LearnedState(Net):  # r is a weight at the second step, so it is one at the first
    def called(self, x, product):
        h = self.z.bias.expand(len(x), -1)
        for _ in range(2):
            h = torch.tanh(product(h, self.r.weight) + self.i(x))
        return h


class Kept(Net):
    """A mask that is made of the weights of the last call, in a place of its own or beside a state."""

    def __init__(self, recorded: bool = False):
        super().__init__(recorded)
        self.mask = torch.ones(5, 5)
        self.register_buffer("scale", torch.ones(()))
        self.pair = (torch.ones(5, 5).tril(), torch.zeros(6, 5))

    def called(self, x, product):
        mask, scale, (low, state) = self.mask, self.scale.clone(), self.pair
        h = torch.tanh(product(torch.tanh(self.i(x) + state), self.r.weight * mask * low / scale))
        with torch.no_grad():
            self.mask, self.pair = (self.r.weight.abs() > 0.1).to(x), (low, h.detach())
            self.scale = self.r.weight.norm()
        return h


class Penalised(Net):
    def called(self, x, product):
        self.penalty = (self.r.weight @ torch.ones(5, 5).tril() @ self.r.weight.T).trace()
        return torch.tanh(product(torch.tanh(self.i(x)), self.r.weight))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", [Zeros, Noise, Buffer, Attribute, Made, LearnedState, Kept, Penalised])
def test_feedback_alignment_by_plain_runs(kind, recorded):
    network, plain = kind(recorded), kind()
    plain.load_state_dict(network.state_dict())
    rule = align_rules.FeedbackAlignment(network)
    B = rule.feedback_weights()

    def product(a: Tensor, weight: Tensor) -> Tensor:
        by_feedback = align_rules.swap_grad(F.linear(a, weight), F.linear(a, fed[id(weight)]))
        return align_rules.couple(by_feedback, F.linear(a.detach(), weight))

    for step in range(4):
        x = torch.randn(6, 4)
        runs = []
        for call, net in ((rule, network), (lambda x: plain(x, product), plain)):
            used = plain.r.weight * plain.mask * plain.pair[0] / plain.scale if kind is Kept else None
            fed = {id(p): B[name] for name, p in plain.named_parameters() if name in B}
            if used is not None:  # its product is of a tensor that is made in the call
                fed = _Made(fed, B["r.weight"] * plain.mask * plain.pair[0] / plain.scale)
            torch.manual_seed(step)
            loss = call(x).sin().sum() + getattr(net, "penalty", 0)
            runs.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
        for name, one, other in zip(dict(network.named_parameters()), *runs, strict=True):
            one, other = (torch.zeros(()) if g is None else g for g in (one, other))
            torch.testing.assert_close(one, other.expand_as(one) if other.dim() == 0 else other, msg=name)
        with torch.no_grad():
            for p, q, g in zip(network.parameters(), plain.parameters(), runs[1], strict=True):
                if g is not None:
                    p -= 0.1 * g
                    q -= 0.1 * g


class _Made(dict):
    def __init__(self, known: dict, other: Tensor):
        super().__init__(known)
        self.other = other

    def __missing__(self, key):
        return self.other


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.others, self.o = nn.Linear(4, 5), [nn.Linear(5, 5)], nn.Linear(5, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.others[0](torch.tanh(self.i(x)))))


class MadeBefore(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.W, self.o = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)
        self.used = self.W * torch.ones(5, 5)

    def forward(self, x):
        return self.o(torch.tanh(torch.tanh(self.i(x)) @ self.used))


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.prompt, self.z, self.o = (
            nn.Linear(4, 5),
            nn.Parameter(torch.randn(2)),
            nn.Linear(2, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.o(torch.tanh(self.i(x) + self.z(self.prompt[None])))


@pytest.mark.parametrize("name", LAYERWISE)
@pytest.mark.parametrize(
    ("kind", "told"),
    [(InAList, "none of its parameters"), (MadeBefore, "none of its parameters"), (Prompted, "added=")],
)
def test_learned_tensors_that_no_rule_knows(name, kind, told):
    with pytest.raises(TypeError, match=told):
        align_rules.RULES[name](kind())(torch.randn(6, 4))


def test_direct_feedback_on_weights_that_hooks_make():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.l1_unstructured(network[2], "weight", 0.4)
    rule = align_rules.DirectFeedbackAlignment(network)
    rule(torch.randn(6, 4)).sum().backward()
    (B,) = rule.feedback
    assert torch.count_nonzero(network[2].weight_orig.grad) == torch.count_nonzero(network[2].weight_mask)
    assert B.shape == (3, 5)


class Stochastic(torch.autograd.Function):  # Bengio et al. (2013)
    @staticmethod
    def forward(ctx, p):
        return torch.bernoulli(p)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Drawn(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.i, self.o, self.draw = nn.Linear(4, 50), nn.Linear(50, 3), draw

    def forward(self, x):
        return self.o(self.draw(torch.sigmoid(self.i(x)))).square()


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(
            Stochastic.apply,
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 does not write it down"),
        ),
        lambda p: torch.distributions.Beta(p + 1, torch.ones_like(p)).rsample(),
    ],
)
@pytest.mark.parametrize("name", INITIALLY_BACKPROP)
def test_draws_inside_of_an_operator_are_those_of_the_network(name, draw):
    network, x, found = Drawn(draw), torch.randn(6, 4), []
    rule = align_rules.RULES[name](network)
    rule(x)
    for call in (rule, network):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(call(x).sum(), list(network.parameters())))
        found[-1] += (torch.rand(1),)  # generators are where the network leaves them
    torch.testing.assert_close(*found)


class Hyper(nn.Module):
    """Layers whose weight and bias are made of a learned code, or of learned matrices by learned shares."""

    def __init__(self):
        super().__init__()
        self.z, self.code, self.of_weight, self.of_bias = (
            nn.Parameter(torch.randn(2)),
            *(nn.Linear(n, m) for n, m in ((2, 3), (3, 20), (3, 5))),
        )
        self.i, self.o = nn.Linear(4, 5), nn.Parameter(torch.randn(2, 3, 5))
        self.shares, self.biases = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        code = torch.tanh(self.code(self.z))
        x = torch.tanh(F.linear(self.i(x) @ self.of_weight(code).view(5, 4), self.i.weight, self.of_bias(code)))
        shares = self.shares.softmax(0)
        penalty = (self.i.weight.T @ self.i.weight - torch.eye(4)).square().sum()
        return F.linear(x, torch.einsum("k,koi->oi", shares, self.o), shares @ self.biases).square() + penalty


def test_what_weights_are_made_of_is_no_activity():
    text = align_rules.FeedbackAlignment(Hyper()).explain(torch.randn(6, 4))
    layers = text.split("\n\n")[1]
    assert "of_bias" not in layers
    assert "biases" not in layers
    assert layers.count("->") == 5  # with the title: i, the made one, i again, o


class Items(nn.Module):
    """Features of items go through layers, and are looked up."""

    def __init__(self, relative: bool):
        super().__init__()
        self.a, self.b, self.o, self.relative = nn.Linear(2, 7), nn.Linear(7, 4), nn.Linear(4, 3), relative
        self.register_buffer("features", torch.randn(5, 2))

    def forward(self, which):
        items = self.b(torch.relu(self.a(self.features)))
        return self.o(torch.tanh(items[which] + items.mean(0) if self.relative else items[which]))


@pytest.mark.parametrize("relative", [False, True])
def test_direct_feedback_does_not_take_a_table_for_the_batch(relative):
    rule, which, targets, found = (
        align_rules.DirectFeedbackAlignment(Items(relative)),
        torch.arange(5),
        torch.randn(5, 3),
        [],
    )
    for order in (torch.arange(5), torch.arange(5).flip(0)):
        loss = (rule(which[order]) * targets[order]).sum()
        found.append(torch.autograd.grad(loss, rule.network.a.weight)[0])
    assert found[0].any()
    torch.testing.assert_close(*found)
