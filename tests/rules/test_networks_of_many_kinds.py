"""Backprop at initialisation, over networks of many kinds: the oracle is the network itself, differentiated by torch.

Where B = W (feedback alignment and its kin) or at the initial parameters (the Align rules) a rule is backprop, on any
network, for every parameter, for the inputs, and at every later call with another state.
"""

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rules_helpers import mean_square
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import align_rules
from benchmarks import other_networks

pytestmark = pytest.mark.usefixtures("seeded")
BATCH, SIZE, CLASSES = 4, 6, 3


def head(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(CLASSES))


class Function(nn.Module):
    """Modules by name, and what is computed with them."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class Spike(torch.autograd.Function):
    """With a surrogate derivative, and a size that it keeps."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        ctx.examples = len(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx, gradient):
        (v,) = ctx.saved_tensors
        return gradient / (1 + v.abs().expand(ctx.examples, -1)) ** 2


class TiedModules(nn.Module):
    """A language model's embedding is its readout."""

    def __init__(self):
        super().__init__()
        self.e, self.h, self.o = nn.Embedding(CLASSES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES, bias=False)
        self.o.weight = self.e.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.o(torch.tanh(self.h(self.e(words % CLASSES).mean(1))))


class Settles(nn.Module):
    """Recurrent until its values settle, which nobody knows before."""

    def __init__(self):
        super().__init__()
        self.i, self.r, self.o = nn.Linear(SIZE, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        nn.init.normal_(self.r.weight, std=0.05)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        while True:
            new = torch.tanh(self.i(x) + self.r(h))
            self.steps += 1
            if (new - h).abs().max() < 1e-4:
                return self.o(new)
            h = new


class Membrane(nn.Module):
    """A state that is kept from one call to the next, in a buffer of this name."""

    def __init__(self, name: str):
        super().__init__()
        self.i, self.o, self.name = nn.Linear(SIZE, 7), nn.Linear(7, CLASSES), name
        self.register_buffer(name, torch.zeros(BATCH, 7))

    def forward(self, x: Tensor) -> Tensor:
        v = 0.9 * getattr(self, self.name) + self.i(x)
        setattr(self, self.name, v.detach())
        return self.o(torch.sigmoid(v))


class OwnDraws(nn.Module):
    """Draws of NumPy's, and of a generator of Python's of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drawn = nn.Linear(SIZE, 7), nn.Linear(7, CLASSES), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor(np.random.rand(7)).to(x)
        return self.b(torch.tanh(self.a(x)) * mask) * self.drawn.random()


class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.o = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(4)), nn.Linear(SIZE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if random.random() < 0.7:
                x = x + torch.tanh(block(x))
        return self.o(x)


class Keeps(nn.Module):
    """What it keeps is in a tuple, and in a list in a dict; what it computes depends on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.state, self.kept = nn.Linear(SIZE, 7), nn.Linear(7, CLASSES), (torch.ones(7), 0), {"h": []}

    def forward(self, x: Tensor) -> Tensor:
        last, count = self.state
        h = torch.tanh(self.a(x)) * last
        if h.sum() > 0:
            h = 2 * h
        self.state = (h.detach().mean(0), count + 1)
        self.kept["h"].append(h.detach())
        return self.b(h)


def averages(s, x: Tensor) -> Tensor:
    """Of activities, written in place in several ways."""
    h = torch.tanh(s.a(x))
    with torch.no_grad():
        s.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        s.mean[:2].add_(1)
        s.last.copy_(h)
    s.peak.data.copy_(torch.maximum(s.peak, h.amax(0)).detach())
    s.peak.detach().add_(1)
    return s.b(h - s.mean)


def tied(s, words: Tensor) -> Tensor:
    """The readout is the embedding, transposed."""
    return torch.tanh(s.hidden(s.words(words))).mean(1) @ s.words.weight.T


def in_place(s, x: Tensor) -> Tensor:
    h = s.a(x)
    h[:, :2].mul_(2).add_(1)
    h[:, 2:] = s.c(x)[:, 2:]
    return s.b(h.add_(s.c(x)))


def straight_through(s, x: Tensor) -> Tensor:
    """A codebook: the nearest entry goes on, and the gradient goes past it."""
    z = s.a(x)
    with torch.no_grad():
        nearest = torch.cdist(z, s.codes).argmin(1)
    q = s.codes[nearest]
    return s.b(z + (q - z).detach()) + (q - z.detach()).square().mean()


def packed(s, x: Tensor) -> Tensor:
    ends = torch.tensor([2, 5, 3, 1])
    states, _ = s.r(rnn.pack_padded_sequence(x, ends, batch_first=True, enforce_sorted=False))
    padded, _ = rnn.pad_packed_sequence(states, batch_first=True, padding_value=0.5, total_length=6)
    return s.o(padded.mean(1))


def last(module, x: Tensor) -> Tensor:
    return module(x)[0][:, -1]


def images(*shape: int):
    return lambda: (torch.randn(BATCH, *shape),)


def vectors():
    return (torch.randn(BATCH, SIZE),)


def words():
    return (torch.randint(9, (BATCH, 5)),)


def sequences():
    return (torch.randn(BATCH, 5, SIZE),)


class Standardised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def parametrised(how, *sizes: int) -> nn.Module:
    return how(nn.Linear(*sizes))


NETWORKS = {
    **other_networks.SMALL,
    "packed": (lambda: Function(packed, r=nn.LSTM(SIZE, 8, 2, batch_first=True, bidirectional=True),
                                o=nn.Linear(16, CLASSES)), sequences),
    "cells": (lambda: Function(lambda s, x: s.o(s.l(s.g(x[:, 0]))[0] + s.r(x[:, 1])), g=nn.GRUCell(SIZE, 8),
                               l=nn.LSTMCell(8, 8), r=nn.RNNCell(SIZE, 8), o=nn.Linear(8, CLASSES)), sequences),
    "fused": (lambda: Function(lambda s, x: s.o(s.l(s.g(x)[0])[0]), g=nn.GRU(SIZE, 5, batch_first=True),
                               l=nn.LSTM(5, 4, batch_first=True), o=nn.Linear(4, CLASSES)), sequences),
    "transformer": (lambda: Function(
        lambda s, x: s.o(s.d(s.t(s.e(x)), s.e(x)).mean(1)), e=nn.Linear(SIZE, 8), o=nn.Linear(8, CLASSES),
        t=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
        d=nn.TransformerDecoderLayer(8, 2, 16, dropout=0.2, batch_first=True)), sequences),
    "translation": (lambda: Function(
        lambda s, x: s.o(s.t(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5)).mean(1)),
        t=nn.Transformer(SIZE, 2, 1, 1, 8, dropout=0.2, batch_first=True), o=nn.Linear(SIZE, CLASSES)), sequences),
    "convolutions": (lambda: head(
        nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4), nn.ELU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GELU(), nn.ConvTranspose2d(4, 3, 3, 2, 1),
        nn.LeakyReLU(), nn.MaxPool2d(2)), images(2, 8, 8)),
    "channels last, dropout": (lambda: head(nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last), nn.Dropout(0.5),
                                            nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5)),
                               lambda: (torch.randn(BATCH, 2, 6, 6).contiguous(memory_format=torch.channels_last),)),
    "one and three dimensions": (lambda: Function(
        lambda s, x: s.o(torch.relu(s.c(torch.tanh(s.a(x))[:, None, :, :, None])).flatten(1)), a=nn.Conv1d(5, 4, 3),
        c=nn.Conv3d(1, 2, (2, 2, 1)), o=nn.Linear(18, CLASSES)), sequences),
    "bilinear": (lambda: Function(lambda s, x: s.o(torch.tanh(s.b(s.a(x), x))), a=nn.Linear(SIZE, 5),
                                  b=nn.Bilinear(5, SIZE, 7), o=nn.Linear(7, CLASSES)), vectors),
    "weight norm": (lambda: nn.Sequential(parametrised(parametrizations.weight_norm, SIZE, 7), nn.Tanh(),
                                          parametrised(parametrizations.weight_norm, 7, CLASSES)), vectors),
    "spectral norm": (lambda: nn.Sequential(parametrised(parametrizations.spectral_norm, SIZE, 7), nn.Tanh(),
                                            nn.Linear(7, CLASSES)), vectors),
    "standardised": (lambda: nn.Sequential(
        parametrised(lambda m: parametrize.register_parametrization(m, "weight", Standardised()), SIZE, 7), nn.Tanh(),
        nn.Linear(7, CLASSES)), vectors),
    "tied": (lambda: Function(tied, words=nn.Embedding(9, 8), hidden=nn.Linear(8, 8)),
             words),
    "tied modules": (TiedModules, words),
    "vectors, complex": (lambda: Function(
        lambda s, x: torch.vdot(torch.complex(*s.v), torch.complex(*s.o(torch.tanh(s.i(x))).mean(0).split(3))).abs(),
        i=nn.Linear(SIZE, 7), o=nn.Linear(7, 6), v=nn.Parameter(torch.randn(2, 3))), vectors),
    "embedding bag": (lambda: Function(lambda s, w: s.o(torch.tanh(s.h(s.e(w)))), e=nn.EmbeddingBag(9, 8),
                                       h=nn.Linear(8, 8), o=nn.Linear(8, CLASSES)), words),
    "in place": (lambda: Function(in_place, a=nn.Linear(SIZE, 7), b=nn.Linear(7, CLASSES),
                                  c=nn.Linear(SIZE, 7)), vectors),
    "checkpointed": (lambda: Function(lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False)),
                                      b=nn.Linear(7, CLASSES),
                                      a=nn.Sequential(nn.Linear(SIZE, 7), nn.Tanh())), vectors),
    "straight through": (lambda: Function(straight_through, a=nn.Linear(SIZE, 7), codes=matrix(5, 7),
                                          b=nn.Linear(7, CLASSES)), vectors),
    "scripted part": (lambda: nn.Sequential(nn.Linear(SIZE, 7), nn.Softsign(), nn.Linear(7, CLASSES), nn.LogSoftmax(1)),
                      vectors),
    "spikes": (lambda: Function(lambda s, x: s.b(Spike.apply(s.a(x))), a=nn.Linear(SIZE, 7), b=nn.Linear(7, CLASSES)),
               vectors),
    "settles": (Settles, vectors),
    "layer drop": (LayerDrop, vectors),
    "keeps": (Keeps, vectors),
    "averages": (lambda: Function(averages, a=nn.Linear(SIZE, 7), b=nn.Linear(7, CLASSES),
                                  mean=nn.Buffer(torch.ones(7)), last=nn.Buffer(torch.ones(BATCH, 7)),
                                  peak=nn.Buffer(torch.ones(7))), vectors),
    "own draws": (OwnDraws, vectors),
    "frozen and fused": (lambda: Function(
        lambda s, x: s.o(s.t(x).mean(1)), o=nn.Linear(SIZE, CLASSES),
        t=nn.TransformerEncoderLayer(SIZE, 2, 16, batch_first=True).eval().requires_grad_(False)), sequences),
    "orthogonal": (lambda: nn.Sequential(
        parametrised(lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"), SIZE, SIZE), nn.Tanh(),
        nn.Linear(SIZE, CLASSES)), vectors),
}  # fmt: skip
KEEPING = (  # or drawing
    "spiking network", "transformer", "translation", "convolutions", "channels last, dropout", "spectral norm",
    "settles", "layer drop", "keeps", "averages", "own draws",
)  # fmt: skip
RECORDED = ("settles", "layer drop", "keeps", "own draws", "packed", "translation")
KIN = ("fa", "align_prop", "kolen_pollack", "align_ada", "align_zero")


def made(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, draw = NETWORKS[kind]
    inputs = draw()
    inputs = inputs[-1] if isinstance(inputs, list) else inputs  # the last of several batches
    network = build()
    if any(isinstance(p, nn.UninitializedParameter) for p in network.parameters()):
        network(*inputs)
    return network, inputs


@pytest.mark.parametrize("kind", NETWORKS)
def test_backprop_at_initialisation(kind):
    network, inputs = made(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if kind in RECORDED else "error", message=".*recorded anew.*")
        for name in KIN:
            rule = align_rules.RULES[name](network)
            align_rules.verify(rule, mean_square, *inputs, double=True)


@pytest.mark.parametrize("kind", KEEPING)
def test_the_state_of_the_network_is_that_of_plain_steps(kind):
    """After two steps by plain backprop and by a rule's code: tensors, numbers, and random numbers after them."""
    found = []
    for name in ("backprop", "align_zero", "last_layer"):
        torch.manual_seed(1)
        network, inputs = made(kind)
        rule = align_rules.RULES[name](network, **({"learns": [""]} if name == "last_layer" else {}))
        torch.manual_seed(2), random.seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                mean_square(rule(*inputs)).backward()
        numbers = [v for m in network.modules() for v in vars(m).values() if type(v) in (int, float, bool)]
        kept = [t for t in pytree.tree_leaves([vars(m) for m in network.modules()]) if isinstance(t, Tensor)]
        found.append(([*kept, torch.rand(3)], [*numbers, random.random()]))
    for tensors, numbers in found[1:]:
        assert numbers == found[0][1]
        for tensor, other in zip(tensors, found[0][0], strict=True):
            torch.testing.assert_close(tensor, other)


class Remembers(nn.Module):
    """Reads the newest entry of a list to which every call appends, and an input that an object holds."""

    def __init__(self, recorded: bool):
        super().__init__()
        self.a, self.b, self.c, self.o = (nn.Linear(n, m) for n, m in ((SIZE, 7), (7, 7), (SIZE, 7), (7, CLASSES)))
        self.past, self.own, self.recorded = [torch.zeros(BATCH, SIZE)], SimpleNamespace(h=torch.zeros(7)), recorded

    def forward(self, x: Tensor, more: SimpleNamespace) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(self.past[-1]))) + self.c(more.x))
        self.past.append(x)
        if self.recorded and x.sum() > -1e9:
            self.own.h = h.detach().mean(0)
        return self.o(h)


@pytest.mark.filterwarnings("ignore:.*recorded anew")
@pytest.mark.parametrize("recorded", [False, True])
def test_layers_on_what_is_remembered_and_on_what_objects_hold(recorded):
    network = Remembers(recorded)
    rule = align_rules.FeedbackAlignment(network)
    for _ in range(2):
        text = rule.explain(*vectors(), SimpleNamespace(x=vectors()[0]))
        assert all(f"{name}.weight" in text for name in "abco")
        rule(*vectors(), SimpleNamespace(x=vectors()[0]))
    assert type(network.own.h) is Tensor
    assert len(network.past) == 3


def test_state_is_known_by_whatever_name():
    """A membrane called as the vectors of spectral norm are is shared with the initial network like any other."""
    found = []
    for name in ("membrane", "_v"):
        torch.manual_seed(1)
        network, inputs = Membrane(name), torch.randn(BATCH, SIZE)
        rule = align_rules.AlignAda(network)
        optimizer = torch.optim.SGD(network.parameters(), 0.3)
        for _ in range(3):
            optimizer.zero_grad()
            mean_square(rule(inputs)).backward()
            optimizer.step()
        found.append(network.i.weight)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "kind", ["own matrices, einsum", "convolutions", "fused", "transformer", "weight norm", "tied", "spikes"]
)
def test_other_batch_sizes(kind, monkeypatch):
    """The first is written down, so is the second; the third is not (but torch's fused modules may fix their sizes)."""
    align_rules._entry.cache_clear()  # of captures by other tests
    written, right = [], align_rules._functional
    monkeypatch.setattr(align_rules, "_functional", lambda module: written.append(module) or right(module))
    network, inputs = made(kind)
    rule = align_rules.AlignAda(network)
    for size in (BATCH, 5, 7):
        align_rules.verify(rule, mean_square, *(t[torch.arange(size) % BATCH] for t in inputs))
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)  # its einsum of three dimensions fixes sizes
    assert len(written) == 2 or kind in ("fused", "transformer", *["own matrices, einsum"][: int(old)])


def test_other_sizes_of_images():
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh()
    rule = align_rules.AlignAda(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES)))
    for size in ((8, 9), (11, 9), (12, 7)):
        align_rules.verify(rule, mean_square, torch.randn(BATCH, 2, *size), double=True)
