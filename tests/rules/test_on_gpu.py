"""Rules on a GPU: the same gradients as on the CPU, with what only a GPU has: its kernels, casts and captured steps."""

import copy

import pytest
import torch
from rules_helpers import RECURRENT_OPTIONS, assert_close, gradients, loss, mlp, move, residual
from test_verify import SOMEWHERE
from torch import Tensor, nn
from torchvision.models import resnet18

import align_rules
from wide.models import networks
from wide.training.capture import Captured

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("seeded"),
]


class Tagger(nn.Module):
    """(batch, time, 6) -> (batch, time, 3)."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1):
        super().__init__()
        self.recurrent, self.readout = kind(6, 5, layers, batch_first=True), nn.Linear(5, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.readout(self.recurrent(sequences)[0])


class Cells(nn.Module):
    """(batch, 2, 6) -> (batch, 3), by cells, which have fused kernels there."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.readout = nn.LSTMCell(6, 5), nn.GRUCell(6, 5), nn.Linear(5, 3)

    def forward(self, steps: Tensor) -> Tensor:
        return self.readout(self.two(steps[:, 1], self.one(steps[:, 0])[0]))


class Attention(nn.Module):
    """(batch, time, 6) -> (batch, 3)."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed, self.readout = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.block(self.embed(tokens)).mean(1))


NETWORKS = {
    "convolutional": (lambda: networks.ConvolutionalNetwork(2, 6, (1, 2), 3), (5, 2, 6, 6)),
    "dense": (lambda: networks.FullyConnectedNetwork(6, 7, 3), (5, 6)),
    "recurrent": (lambda: networks.RecurrentNetwork(6, 5), (5, 4)),
    "residual": (residual, (4, 2, 8, 8)),
    "channels last": (lambda: residual().to(memory_format=torch.channels_last), (4, 2, 8, 8)),
    "LSTM": (lambda: Tagger(nn.LSTM, 2), (4, 5, 6)),
    "GRU": (lambda: Tagger(nn.GRU), (4, 5, 6)),
    "cells": (Cells, (4, 2, 6)),
    "attention": (Attention, (4, 5, 6)),
    "ResNet-18": (lambda: resnet18(num_classes=3), (4, 3, 32, 32)),
}
NO_BLOCKS = ("LSTM", "GRU", "cells", "recurrent")  # in which direct feedback's blocks end inside of one kernel there
each_rule = pytest.mark.parametrize("name", align_rules.RULES)


def made(name: str, kind: str) -> tuple[align_rules.Rule, align_rules.Rule, Tensor]:
    """A rule in float64 on the CPU, away from its initial parameters, its copy on the GPU, and a batch."""
    build, shape = NETWORKS[kind]
    options = RECURRENT_OPTIONS.get(name, {}) if kind == "recurrent" else {}
    rule, inputs = align_rules.RULES[name](build().double(), **options), torch.randn(shape, dtype=torch.float64)
    if kind == "channels last":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if name == "dfa" and kind not in NO_BLOCKS:
        rule(inputs)  # draws what it sends
    move(rule.network, 0.01 if kind == "ResNet-18" else 0.1)
    return rule, copy.deepcopy(rule).to(GPU), inputs


def on_cpu(found: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.cpu() for t in found]


@pytest.mark.parametrize("kind", NETWORKS)
@each_rule
def test_the_gpu_computes_what_the_cpu_does(name, kind):
    rule, twin, inputs = made(name, kind)
    if name == "dfa" and kind in NO_BLOCKS:
        with pytest.raises(TypeError, match=r"write (its|their) steps"):
            twin(inputs.to(GPU))
        return
    optimisers = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (rule, twin)]
    for _ in range(3):
        expected = gradients(rule, rule.network, inputs)
        assert_close(on_cpu(gradients(twin, twin.network, inputs.to(GPU))), expected, 1e-8)
        for optimiser in optimisers:
            optimiser.step()
    assert_close(in_order(twin), in_order(rule), 1e-8)
    torch.testing.assert_close(twin(inputs.to(GPU)), twin.network(inputs.to(GPU)), rtol=1e-10, atol=1e-10)


def in_order(rule: align_rules.Rule) -> list[Tensor]:
    return [tensor.cpu().double() for tensor in rule.state_dict().values()]


@pytest.mark.parametrize("kind", NETWORKS)
def test_verify(kind):
    for name in SOMEWHERE:
        _, rule, inputs = made(name, kind)
        align_rules.verify(rule, loss, inputs.to(GPU))
        align_rules.verify(rule.float(), loss, inputs.float().to(GPU), tolerance=0.02)  # TF32 in convolutions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["convolutional", "LSTM", "attention", "residual"])
@each_rule
def test_autocast(name, kind, dtype):
    """With a scaler, as training in half precision has it."""
    if name == "dfa" and kind in NO_BLOCKS:
        pytest.skip("refused")
    _, rule, inputs = made(name, kind)
    rule, inputs, scaler = rule.float(), inputs.float().to(GPU), torch.amp.GradScaler("cuda", 256.0)
    expected = gradients(rule, rule.network, inputs)
    learning = [p for p in rule.parameters() if p.grad is not None]
    optimiser = torch.optim.SGD(learning, lr=0.01)
    with torch.autocast("cuda", dtype):
        output = rule(inputs)
        assert output.dtype == rule.network(inputs).dtype == dtype
    rule.network.zero_grad()
    scaler.scale(loss(output.float())).backward()
    scaler.unscale_(optimiser)
    for parameter, full in zip(rule.network.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (full is None)
        if full is not None and full.norm() > 1e-2 * max(g.norm() for g in expected if g is not None):
            assert (parameter.grad - full).norm() < 0.25 * full.norm()
    before = learning[-1].clone()
    scaler.step(optimiser)
    assert not torch.equal(learning[-1], before)


@pytest.mark.parametrize("kind", ["convolutional", "recurrent", "LSTM", "residual", "attention"])
@each_rule
def test_captured_steps(name, kind, capsys):
    """Replays of a CUDA graph are the steps that come without it."""
    _, rule, inputs = made(name, kind)
    twin, batches = copy.deepcopy(rule), torch.randn(8, *inputs.shape, dtype=torch.float64, device=GPU)

    def update_of(rule):
        optimiser = torch.optim.SGD(rule.parameters(), lr=0.01, momentum=0.9)

        def update(inputs, _):
            optimiser.zero_grad(set_to_none=True)
            value = loss(rule(inputs))
            value.backward()
            optimiser.step()
            return (value.detach(),)

        return update

    plain, captured = update_of(rule), Captured(update_of(twin), torch.device("cuda", 0))
    for batch in batches:
        (one,), (other,) = plain(batch, batch), captured(batch, batch)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert captured.replay is not None, capsys.readouterr().err
    assert_close(in_order(twin), in_order(rule), 1e-8)


@pytest.mark.parametrize("name", SOMEWHERE)
def test_dropout_is_drawn_once(name):
    """What the network draws, for both runs of a rule that has two."""
    network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    rule, inputs = align_rules.RULES[name](network).to(GPU), torch.randn(5, 6).double().to(GPU)
    rule.become_backprop()
    torch.manual_seed(1)
    expected, state = gradients(network, network, inputs), torch.cuda.get_rng_state()
    torch.manual_seed(1)
    assert_close(gradients(rule, network, inputs), expected)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("name", ["fa", "align_prop", "kolen_pollack"])
def test_dropout_inside_of_attention(name):
    align_rules.verify(align_rules.RULES[name](Attention(0.2)).to(GPU), loss, torch.randn(4, 5, 6, device=GPU))


@pytest.mark.parametrize("name", ["align_zero", "align_ada"])
def test_dropout_inside_of_a_fused_kernel_is_drawn_once(name):
    class Fused(Attention):
        def forward(self, tokens: Tensor) -> Tensor:
            heads = self.embed(tokens)[:, None]
            return self.readout(nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)[:, 0, 0])

    rule = align_rules.RULES[name](Fused()).to(GPU).half()
    align_rules.verify(rule, loss, torch.randn(4, 5, 6, device=GPU).half())


@each_rule
def test_the_default_device_decides_nothing(name):
    """B is drawn where its seed says the same, wherever tensors are by default."""
    drawn = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        network = mlp()
        torch.set_default_device(device)
        try:
            rule = align_rules.RULES[name](network.to(device))
            gradients(rule, network, torch.ones(5, 6))
            if name == "weight_mirror":
                rule.mirror(torch.ones(5, 6))
            fresh = align_rules.RULES[name](copy.deepcopy(network))
            fresh.load_state_dict(rule.state_dict())
            assert_close(gradients(fresh, fresh.network, torch.ones(5, 6)), gradients(rule, network, torch.ones(5, 6)))
            drawn.append(in_order(rule))
            assert {p.device.type for p in (*rule.parameters(), *network.parameters())} == {device}
        finally:
            torch.set_default_device(None)
    assert_close(*drawn, 1e-5)


def test_looking_at_a_rule():
    _, rule, inputs = made("align_ada", "residual")
    gradients(rule, rule.network, inputs.to(GPU))
    angles = align_rules.gradient_angles(rule, loss, inputs.to(GPU))
    assert all(degrees is not None for degrees in angles.values())
    assert align_rules.feedback_angles(rule).keys() == angles.keys()
    assert "the argument of" in rule.explain(inputs.to(GPU), code=True)
