"""What is an activity, and what a weight: constants, draws, state, tensors that no rule knows. FA by plain runs.

Each network is called as Dynamo writes it down, and recorded.
"""

import copy
import dataclasses

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
    torch.manual_seed(0)
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


class OwnOutput(nn.Module):
    """At points that the network holds, beside the batch: a physics-informed network."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        self.register_buffer("constant", torch.randn(7, 4))

    def forward(self, x, points):
        return self.f(x), self.f(points)


class TiedToken(nn.Module):
    """A decoder whose embeddings are its readout, too, from a start token."""

    def __init__(self):
        super().__init__()
        self.i, self.e, self.b, self.constant = nn.Linear(4, 5), nn.Embedding(9, 5), nn.Linear(5, 5), torch.tensor([3])

    def forward(self, x, token):
        h, y, outputs = self.i(x), self.e(token), []
        for _ in range(2):
            h = torch.tanh(self.b(y) + h)
            outputs.append(h @ self.e.weight.T)
            y = outputs[-1].softmax(-1) @ self.e.weight
        return torch.stack(outputs)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", [OwnOutput, TiedToken])
def test_constants_go_through_layers_as_inputs_do(kind, recorded):
    class Network(kind):
        def forward(self, x, constant=None):
            if recorded and x.sum() > 1e9:
                x = x + 1
            return super().forward(x, self.constant if constant is None else constant)

    network, x, found = Network(), torch.randn(6, 4), []
    rule = align_rules.FeedbackAlignment(network)
    for given in ((), (network.constant,)):
        loss = sum(f.sin().sum() for f in rule(x, *given))
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(*found)


class Prototypes(nn.Module):
    """Learned ones go through layers whose weight is made of two parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5, bias=False))
        self.W, self.A, self.C, self.prototypes = (nn.Parameter(torch.randn(n, 5)) for n in (3, 2, 2, 1))
        self.prototypes = nn.Parameter(torch.randn(2, 4))

    def encoded(self, x):
        return torch.relu(self.a(x)) @ (self.W + self.A.T[:3] @ self.C).T

    def forward(self, x):
        return (self.encoded(x)[:, None] - self.encoded(self.prototypes)).square().sum(-1)


def test_of_two_learned_factors_the_weight_is_one_elsewhere():
    network, x, found = Prototypes(), torch.randn(6, 4), []
    for added in ((), ("prototypes",)):
        rule = align_rules.AlignProp(network, added=added)
        with torch.no_grad():
            network.a.parametrizations.weight.original1 += 1
        found.append(torch.autograd.grad(rule(x).sin().sum(), list(network.parameters())))
        with torch.no_grad():
            network.a.parametrizations.weight.original1 -= 1
    torch.testing.assert_close(*found)


@dataclasses.dataclass
class Trace:
    hebb: Tensor


class Slot:
    __slots__ = ("hebb",)

    def __init__(self, hebb: Tensor):
        self.hebb = hebb


# How a network keeps the state h: what it puts down, and what it finds there.
KEPT = {
    "tensor": (lambda kept, h: h, lambda kept: kept),
    "tuple": (lambda kept, h: (h,), lambda kept: kept[0]),
    "list": (lambda kept, h: [h], lambda kept: kept[0]),
    "nested": (lambda kept, h: {"a": [h]}, lambda kept: kept["a"][0]),
    "object": (lambda kept, h: Trace(h), lambda kept: kept.hebb),
}
SLOT = {**KEPT, "slot": (lambda kept, h: Slot(h), lambda kept: kept.hebb)}
DELAYED = {
    "stacked": (lambda kept, h: torch.stack([h if kept is None else kept[1], h]), lambda kept: kept[0]),
    "pair": (lambda kept, h: (h if kept is None else kept[1], h), lambda kept: kept[0]),
    "list": (lambda kept, h: [h if kept is None else kept[1], h], lambda kept: kept[0]),
}


class Plastic(nn.Module):
    """Fast weights (Miconi et al., 2018)."""

    def __init__(self, put, get, recorded):
        super().__init__()
        self.i, self.o, self.W, self.alpha = (
            nn.Linear(4, 5),
            nn.Linear(5, 3),
            *(nn.Parameter(torch.randn(5, 5)) for _ in range(2)),
        )
        self.put, self.get, self.recorded = put, get, recorded
        self.kept = put(None, torch.full((5, 5), 0.1))

    def forward(self, x):
        if self.recorded and x.sum() > 1e9:
            x = x + 1
        a, hebb = torch.tanh(self.i(x)), self.get(self.kept)
        b = torch.tanh(a @ (self.W + self.alpha * hebb))
        self.kept = self.put(self.kept, (0.9 * hebb + 0.1 * a.mT @ b).detach())
        return self.o(b)


@pytest.mark.parametrize(("ways", "recorded"), [(KEPT, False), (SLOT, True), (DELAYED, False), (DELAYED, True)])
def test_state_is_state_however_it_is_kept(ways, recorded):
    found = []
    for put, get in ways.values():
        torch.manual_seed(0)
        network = Plastic(put, get, recorded)
        rule = align_rules.FeedbackAlignment(network)
        found.append([])
        for step in range(4):
            loss = rule(torch.randn(6, 4)).square().sum()
            if step or ways is not SLOT:  # a slot's first content is a constant, as anything that is not found
                found[-1] += torch.autograd.grad(loss, list(network.parameters()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


class Normalises(nn.Module):
    """Batch normalisation by hand."""

    def __init__(self, in_place):
        super().__init__()
        self.i, self.o, self.in_place = nn.Linear(4, 5), nn.Linear(5, 3), in_place
        self.register_buffer("running_mean", torch.zeros(5))

    def forward(self, x):
        h = self.i(x)
        mean = 0.9 * self.running_mean + 0.1 * h.detach().mean(0)
        if self.training and self.in_place:
            self.running_mean.copy_(mean)
        elif self.training:
            self.running_mean = mean
        return self.o(torch.tanh(h - mean))


@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_the_initial_network_has_its_own_statistics_however_they_are_kept(name):
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        rule = align_rules.RULES[name](Normalises(in_place))
        for _ in range(3):
            rule(5 + torch.randn(6, 4)).sum().backward()
            with torch.no_grad():
                rule.network.i.weight += 0.1
        found.append([p.grad for p in rule.network.parameters()] + [rule.initial.named()["running_mean"]])
    assert found[0][-1].all()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_the_initial_network_has_its_own_vectors_of_spectral_norm(normalise):
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), normalise(nn.Linear(5, 3)))
    rule, initial = align_rules.AlignAda(network), copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape)
    for _ in range(3):
        rule(torch.randn(6, 4))
        initial(torch.randn(6, 4))
    kept, current = rule.initial.named(), dict(network.named_buffers())
    for name, vector in initial.named_buffers():
        torch.testing.assert_close(kept[name], vector)
        assert not torch.allclose(current[name], vector)


class Cell(nn.Module):
    """Gates whose names are i, f, g, o; and a rank-one part of a weight (Mastrogiuseppe & Ostojic, 2018)."""

    def __init__(self, vectors):
        super().__init__()
        self.weight_g, self.weight_v = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 4))
        self.m, self.n = (nn.Parameter(torch.randn(5) if vectors else torch.randn(5, 1)) for _ in "mn")
        self.J, self.o = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(x @ self.weight_v @ self.weight_g.T)
        return self.o(h @ (self.J + self.m.view(5, 1) * self.n.view(5)))


def test_every_matrix_has_feedback():
    rule = align_rules.FeedbackAlignment(Cell(vectors=False))
    assert rule.feedback_weights().keys() == {"weight_g", "weight_v", "m", "n", "J", "o.weight"}
    rule(torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"the weight \('.', '.'\) has no feedback; give it two dimensions"):
        align_rules.AlignProp(Cell(vectors=True))(torch.randn(6, 4))
    rule = align_rules.AlignProp(Cell(vectors=True), vectors=("m", "n"))
    align_rules.verify(rule, lambda output: output.sin().sum(), torch.randn(6, 4))
    assert {"m", "n"} <= rule.feedback_weights().keys()


class Relative(nn.Module):
    """Keys that a layer makes of a learned table, as in attention to relative positions."""

    def __init__(self):
        super().__init__()
        self.a, self.table, self.keys = nn.Linear(4, 5), nn.Embedding(6, 5), nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.a(x)) @ self.keys(self.table.weight).T


@pytest.mark.parametrize("name", ["fa", "align_prop", "sign_symmetry", "kolen_pollack"])
def test_a_bias_in_a_weight_has_feedback_where_it_is_named(name):
    rule, inputs = align_rules.RULES[name], torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"the weight \('keys.bias',\) has no feedback"):
        rule(Relative())(inputs)
    network, found = Relative(), []
    named = rule(network, vectors=[""])
    for change in (0, 1):  # of the bias, which must not be sent back through
        with torch.no_grad():
            network.keys.bias *= 1 + change
        found.append(torch.autograd.grad((named(inputs) * torch.arange(6.0)).sum(), network.a.weight)[0])
    torch.testing.assert_close(*found)


class Within(nn.Module):
    """`made` is what the network makes of a matrix, a vector and a third argument, and multiplies activities with."""

    def __init__(self, made, recorded=False):
        super().__init__()
        self.i, self.made, self.recorded = nn.Linear(4, 5), made, recorded
        self.W, self.v = nn.Parameter(torch.randn(2, 5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x, number=1):
        if self.recorded and x.sum() > 1e9:
            x = x + 1
        return torch.tanh(self.i(x)) @ self.made(self.W, self.v, number)


def _row(W, v, _):
    W = W[0].clone()
    W[0] = v
    return W


def _diagonal(W, v, _):
    W = W[0].clone()
    W.diagonal().copy_(v)
    return W


EYE = torch.eye(5, dtype=torch.bool)
TERMS = [
    _row, _diagonal, lambda W, v, _: torch.where(EYE, v, W[0]), lambda W, v, _: W[0].masked_scatter(EYE, v),
    lambda W, v, _: torch.addcmul(W[0], v, v[:, None]), lambda W, v, _: torch.addr(W[0], v, v),
    lambda W, v, _: torch.addmm(W[0], v[:, None], v[None]), lambda W, v, _: torch.lerp(W[0], v, 0.5),
    lambda W, v, _: W[0].index_add(0, torch.tensor([0]), v[None]), lambda W, v, _: torch.maximum(W[0], v),
    lambda W, v, _: torch.addmm(W[0], v[:, None], torch.ones(1, 5)), lambda W, v, _: W[0, :, :1] * v,
]  # fmt: skip
GAINS = [
    lambda W, v, _: W[0] * v, lambda W, v, _: W[0] / v.exp(), lambda W, v, _: W[0] @ torch.diag(v),
    lambda W, v, _: F.layer_norm(W[0], (5,), v), lambda W, v, _: F.rms_norm(W[0], (5,), v),
    lambda W, v, _: F.batch_norm(W[0], None, None, v, training=True), lambda W, v, _: torch.where(v > 0, W[0], 0),
    lambda W, v, _: F.batch_norm(W[0], torch.zeros(5), torch.ones(5), v), lambda W, v, _: torch.addcmul(W[0], W[0], v),
    lambda W, v, _: F.conv1d(W[:1], v.view(1, 1, 5).expand(5, -1, -1), padding=2, groups=5)[0],
]  # fmt: skip


@pytest.mark.parametrize("made", TERMS)
def test_a_vector_that_is_put_into_a_weight_is_named(made):
    with pytest.raises(ValueError, match=r"the weight \('v',\) has no feedback"):
        align_rules.FeedbackAlignment(Within(made))(torch.randn(6, 4))


@pytest.mark.parametrize("made", GAINS)
def test_a_vector_that_scales_a_weight_is_a_gain(made):
    align_rules.verify(align_rules.AlignProp(Within(made)), lambda output: output.sin().sum(), torch.randn(6, 4))


NUMBERS = {  # a weight that a number chooses or scales; the number, and what it is in Python
    "entry": (lambda W, v, k: W[k], torch.tensor(1), 1),
    "item": (lambda W, v, k: W[int(k)], torch.tensor(1), 1),
    "scale": (lambda W, v, s: W[0] * float(s), torch.tensor(0.5), 0.5),
    "slice": (lambda W, v, n: W[0, :, : int(n)], torch.tensor(3), 3),
}


@pytest.mark.parametrize("name", ["fa", "align_ada"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_that_leaves_torch_is_a_constant(kind, name):
    (made, number, as_it_is), found = NUMBERS[kind], []
    for recorded, given in ((False, as_it_is), (False, number), (True, number)):
        torch.manual_seed(0)
        network = Within(made, recorded)
        rule = align_rules.RULES[name](network)
        with torch.no_grad():
            network.W.mul_(2)
        rule(torch.randn(6, 4), given).square().sum().backward()
        found.append([network.W.grad, network.i.weight.grad])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


class Dale(nn.Module):
    """Whose recurrent weight is made of a learned one and signs, once or in every step; with a learned start."""

    def __init__(self, once):
        super().__init__()
        self.i, self.o, self.once = nn.Linear(4, 5), nn.Linear(5, 3), once
        self.W, self.h0 = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(1, 5))
        self.register_buffer("signs", torch.tensor([1.0, 1, 1, -1, -1]).diag())

    def forward(self, x):
        h, made = self.h0.expand(len(x), 5), self.W.abs() @ self.signs
        for _ in range(3):
            h = torch.tanh(self.i(x) + h @ (made if self.once else self.W.abs() @ self.signs))
        return self.o(h)


@pytest.mark.parametrize("name", ["align_prop", "align_ada"])
def test_a_weight_may_be_made_anew_in_every_step(name):
    found = []
    for once in (True, False):
        torch.manual_seed(0)
        network = Dale(once)
        rule = align_rules.RULES[name](network)
        with torch.no_grad():
            network.W.mul_(1.5)
        rule(torch.randn(6, 4)).square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*found)


class SharesEncoder(nn.Module):
    """Of inputs and of constants, each with a readout of its own."""

    def __init__(self):
        super().__init__()
        self.code, self.a, self.b = (nn.Linear(n, m, bias=False) for n, m in ((4, 5), (5, 3), (5, 3)))

    def forward(self, x, product=F.linear):
        a, b = (torch.relu(product(read, self.code.weight)) for read in (x, torch.eye(4)))
        return product(a, self.a.weight) + product(b, self.b.weight).mean(0)


def test_what_shared_layers_make_of_constants_is_an_activity():
    network = SharesEncoder()
    rule, x = align_rules.FeedbackAlignment(network), torch.randn(6, 4)
    B = {id(network.get_parameter(name)): B for name, B in rule.feedback_weights().items()}

    def product(a, weight):  # whose error goes back through B
        sent = a @ B[id(weight)].T
        return F.linear(a.detach(), weight) + sent - sent.detach()

    found = [torch.autograd.grad(f.square().sum(), list(network.parameters()))
             for f in (rule(x), network(x, product))]  # fmt: skip
    torch.testing.assert_close(*found)


class SlowNoise(Net):
    def __init__(self, recorded):
        super().__init__(recorded)
        self.register_buffer("noise", torch.ones(2, 5))

    def called(self, x, product):
        before, after = self.noise
        h = torch.tanh(torch.tanh(self.i(x) + before) + after)
        self.noise.mul_(0.9).add_(torch.randn(2, 5))
        return h


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_a_view_is_read_before_its_buffer_is_written(name, recorded):
    network = SlowNoise(recorded)
    align_rules.verify(align_rules.RULES[name](network), lambda output: output.square().sum(), torch.randn(6, 4))


class Data(Net):
    """Reads .data, and a size from there."""

    def called(self, x, product):
        h = torch.tanh(self.i(x))
        return (
            h * h.data + h.data.new(h.size()).normal_() + torch.distributions.Laplace(torch.zeros_like(h), 0.1).sample()
        )


@pytest.mark.parametrize("recorded", [False, True])
def test_data_is_read(recorded):
    align_rules.verify(align_rules.AlignProp(Data(recorded)), lambda output: output.square().sum(), torch.randn(6, 4))


def test_arrays_are_handed_to_recorded_calls_as_tensors():
    network, array = Within(lambda W, v, array: W[0] * torch.as_tensor(array), True), torch.ones(5).numpy()
    with pytest.raises(TypeError, match=r"hand over a tensor: torch.as_tensor"):
        align_rules.FeedbackAlignment(network)(torch.randn(6, 4), array)


class Fixates(nn.Module):
    """Steps before the stimulus, from zeros or from the state that the network keeps."""

    def __init__(self):
        super().__init__()
        self.i, self.r, self.o, self.h = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), None

    def forward(self, x):
        h = torch.zeros(len(x), 5) if self.h is None else self.h
        for step in range(4):
            h = torch.tanh(self.r(h) + (self.i(x) if step > 1 else 0))
        self.h = h.detach()
        return self.o(h)


def test_direct_feedback_reaches_the_steps_before_the_stimulus():
    rule = align_rules.DirectFeedbackAlignment(Fixates())
    for _ in range(3):
        rule(torch.randn(6, 4)).sum().backward()
    assert [B.shape for B in rule.feedback] == [(3, 5)] * 4


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


@pytest.mark.parametrize("name", [*LAYERWISE, "align_zero", "last_layer"])
@pytest.mark.parametrize("kind", [InAList, MadeBefore])
def test_learned_tensors_that_are_no_parameters(name, kind):
    with pytest.raises(TypeError, match="none of its parameters"):
        align_rules.RULES[name](kind())(torch.randn(6, 4))


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_learned_prompt_is_named(name):
    with pytest.raises(TypeError, match="added="):
        align_rules.RULES[name](Prompted())(torch.randn(6, 4))


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


@pytest.mark.parametrize("ones", [torch.ones_like, lambda h: h.clone().fill_(1.0), lambda h: h.clone().zero_() + 1])
def test_what_has_the_shape_of_an_activity_alone_is_a_constant(ones):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.W = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return h @ (self.W * ones(h)[0]).T

    assert "\nW " in align_rules.FeedbackAlignment(Shaped()).explain(torch.randn(6, 4))


def test_what_weights_are_made_of_is_no_activity():
    text = align_rules.FeedbackAlignment(Hyper(), vectors=["code", "of_weight"]).explain(torch.randn(6, 4))
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
