"""What feedback stands in for, in every kind of layer, by hand.

A layer reads a = tanh(x U). By the definition, with e the gradient at its output y = product(a, parameters): the
parameters get the gradient of <e, product(sg(a), parameters)>, and a gets that of <e, product(a, feedback)>, which goes
on to U. Feedback is in the parameters' places, and goes through all that is made of them.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import align_rules

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.quick]


class Net(nn.Module):
    def __init__(self, layer: nn.Module, use, shape: tuple[int, ...]):
        super().__init__()
        self.first, self.layer, self.use, self.shape = nn.Linear(5, 12, bias=False), layer, use, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, torch.tanh(self.first(x)).view(-1, *self.shape))


class Own(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def call(layer, a):
    return layer(a)


def first(layer, a):
    return layer(a)[0]


MASK = (torch.arange(12) % 3 > 0)[:, None].double() / 3


def masked(layer, a):
    return a @ (layer.w * (torch.arange(12) % 3 > 0)[:, None] / 3)


def masked_from_outside(layer, a):
    """By tensors that are neither buffers nor inputs of the call."""
    return a @ torch.where(layer.held[0], layer.w * MASK, 0)[layer.order]


def holding(layer: nn.Module, **held) -> nn.Module:
    vars(layer).update(held)
    return layer


KINDS = {
    "linear": (lambda: nn.Linear(12, 4), call, (12,)),
    "convolution": (lambda: nn.Conv2d(3, 4, 2, stride=2, padding=1, bias=False), call, (3, 2, 2)),
    "grouped, dilated": (lambda: nn.Conv1d(2, 4, 3, groups=2, dilation=2), call, (2, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), call, (3, 2, 2)),
    "from the left": (lambda: Own(w=(4, 3)), lambda layer, a: layer.w @ a, (3, 4)),
    "einsum": (lambda: Own(w=(2, 3, 4)), lambda layer, a: torch.einsum("bij,jik->bk", a, layer.w), (3, 2)),
    "a vector": (lambda: Own(w=(12,)), lambda layer, a: a @ layer.w, (12,)),
    "scaled by addmm": (lambda: Own(w=(12, 4)), lambda layer, a: torch.addmm(a[:, :4], a, layer.w, alpha=0.3), (12,)),
    "masked": (lambda: Own(w=(12, 4)), masked, (12,)),
    "masked from outside": (
        lambda: holding(Own(w=(12, 4)), held=[torch.arange(4) % 2 > 0], order=torch.arange(12).flip(0)),
        masked_from_outside,
        (12,),
    ),
    "merged": (lambda: Own(w=(12, 4), a=(12, 2), c=(2, 4)), lambda layer, a: a @ (layer.w + layer.a @ layer.c), (12,)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(12, 4)), call, (12,)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(12, 4)).eval(), call, (12,)),
    "standardised": (
        lambda: parametrize.register_parametrization(nn.Linear(12, 4), "weight", Standardised()),
        call,
        (12,),
    ),
    "bilinear": (lambda: nn.Bilinear(6, 6, 4), lambda layer, a: layer(a[:, :6], a[:, 6:]), (12,)),
    "packed attention": (
        lambda: nn.MultiheadAttention(4, 1, batch_first=True),
        lambda layer, a: layer(a, a, a)[0],
        (3, 4),
    ),
    "LSTM cell": (lambda: nn.LSTMCell(4, 3), lambda layer, a: layer(a[:, 1], layer(a[:, 0]))[0], (3, 4)),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), first, (3, 4)),
    "tied": (lambda: Own(w=(12, 4)), lambda layer, a: torch.sin(a @ layer.w) @ layer.w.T, (12,)),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), first, (3, 4)),
    "complex": (
        lambda: nn.Linear(6, 4, dtype=torch.complex128),
        lambda layer, a: torch.view_as_real(layer(torch.view_as_complex(a))),
        (6, 2),
    ),
}


class Standardised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


class Transported(torch.autograd.Function):
    """a W, whose error goes back through B."""

    @staticmethod
    def forward(ctx, a, w, b):
        ctx.save_for_backward(a, b)
        return a @ w

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.T, a.flatten(0, -2).T @ g.flatten(0, -2), None


def by_substitution(kind: str, net: Net, B: dict[str, Tensor], x: Tensor, e: Tensor) -> dict[str, Tensor]:
    """Of one product, or of several in a formula of their own (tied weights, a recurrent network)."""
    W = dict(net.layer.named_parameters())
    a = torch.tanh(net.first(x))

    def linear(x: Tensor, part: str) -> Tensor:
        """x W + b, by parameters whose names have this part."""
        weight = next(name for name in W if part in name and "weight" in name)
        bias = next(name for name in W if part in name and "bias" in name)
        return Transported.apply(x, W[weight].T, B[f"layer.{weight}"].T) + W[bias]

    if kind == "tied":
        h = torch.sin(Transported.apply(a, W["w"], B["layer.w"]))
        y = Transported.apply(h, W["w"].T, B["layer.w"].T)
    elif kind == "RNN":
        state, states = torch.zeros(len(x), 3), []
        for step in a.view(-1, 3, 4).unbind(1):
            state = torch.tanh(linear(step, "ih") + linear(state, "hh"))
            states.append(state)
        y = torch.stack(states, 1)
    elif kind == "packed attention":
        query, key, value = linear(a.view(-1, 3, 4), "in_proj").chunk(3, -1)
        y = linear((query @ key.mT / 2).softmax(-1) @ value, "out_proj.")
    elif kind == "LSTM cell":
        h, c = torch.zeros(2, len(x), 3)
        for step in a.view(-1, 3, 4).unbind(1)[:2]:
            i, f, g, o = (linear(step, "ih") + linear(h, "hh")).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        y = h
    elif kind == "GRU":
        h, states = torch.zeros(len(x), 3), []
        for step in a.view(-1, 3, 4).unbind(1):
            (r, z, n), (r_h, z_h, n_h) = linear(step, "ih").chunk(3, 1), linear(h, "hh").chunk(3, 1)
            z = (z + z_h).sigmoid()
            h = (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h
            states.append(h)
        y = torch.stack(states, 1)
    else:
        at, twin = a.view(-1, *net.shape), copy.deepcopy(net.layer)
        for name, p in twin.named_parameters():
            p.data = B.get(f"layer.{name}", p.data)
        part = at.detach().requires_grad_()
        own = torch.autograd.grad(net.use(net.layer, at.detach()), list(W.values()), e)
        (sent,) = torch.autograd.grad(net.use(twin, part), part, e)
        (below,) = torch.autograd.grad(at, [net.first.weight], sent)
        return {"first.weight": below, **{f"layer.{name}": g for name, g in zip(W, own, strict=True)}}
    parameters = dict(net.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(y, list(parameters.values()), e), strict=True))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_goes_where_the_weights_go(kind):
    build, use, shape = KINDS[kind]
    net, x = Net(build(), use, shape), torch.randn(3, 5)
    given = {}
    if kind == "a vector":
        given = {"first.weight": torch.randn(12, 5), "layer.w": torch.randn(12)}
    rule = align_rules.FeedbackAlignment(net, given or None)
    B = rule.feedback_weights()
    for p in net.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    output = rule(x)
    e = torch.randn_like(output)
    got = dict(zip(dict(net.named_parameters()), torch.autograd.grad(output, list(net.parameters()), e), strict=True))
    want = by_substitution(kind, net, B, x, e)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
