"""The rules on networks that were not written for them: how far from backprop where they are it, and what they cost.

    python3 benchmarks/other_networks.py [--costs] [--networks resnet18 ...] [--output docs/own_networks.csv]

Without `--costs`: `align_rules.verify` in float64, of every rule that is backprop somewhere, on every network. A number
is the largest difference of a parameter's gradient, as a share of the largest entry of backprop's; those of the inputs
are compared too, to 1e-8.

With it: seconds of the first call of a network in a new process (written down and proved), of the first call of another
rule on a second network of that kind, and of a step of SGD as a multiple of backprop's, on one thread, each round one
step of every rule: the median of the rounds.
"""

import argparse
import csv
import functools
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import align_rules
from wide.models.networks import ConvolutionalNetwork, RecurrentNetwork

CLASSES, BATCH = 10, 4


class Tagger(nn.Module):
    """Words (batch, time) -> (batch, time, classes), by a fused recurrent module."""

    def __init__(self, kind: type[nn.RNNBase], both_ways: bool):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.recurrent = kind(8, 12, 2, batch_first=True, bidirectional=both_ways)
        self.readout = nn.Linear(24 if both_ways else 12, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.readout(self.recurrent(self.words(words))[0])


class Dale(nn.Module):
    """A continuous-time recurrent network whose units are excitatory or inhibitory (Dale's law), from a learned state.

    (batch, time, 6) -> (batch, classes).
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.input, self.readout = nn.Linear(6, width), nn.Linear(width, CLASSES)
        self.recurrent = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.register_buffer("sign", torch.ones(width).index_fill(0, torch.arange(0, width, 4), -1.0))
        self.start = nn.Parameter(torch.zeros(1, width))

    def forward(self, sequences: Tensor) -> Tensor:
        state = self.start.expand(len(sequences), -1)
        for step in sequences.unbind(1):
            weight = self.recurrent.abs() * self.sign
            state = state + 0.2 * (self.input(step) + F.relu(state) @ weight.T - state)
        return self.readout(F.relu(state))


class GraphNetwork(nn.Module):
    """Nodes (n, 6) and edges (2, any) -> (n, classes): means over neighbours, by index_add."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12)])
        self.readout = nn.Linear(12, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, sink = edges
        degrees = torch.zeros_like(nodes[:, 0]).index_add(0, sink, torch.ones_like(sink, dtype=nodes.dtype))
        for layer in self.layers:
            messages = layer(nodes)
            nodes = torch.zeros_like(messages).index_add(0, sink, messages[source])
            nodes = torch.tanh(messages + nodes / degrees.clamp(min=1)[:, None])
        return self.readout(nodes)


class Spike(torch.autograd.Function):
    """1 where positive; with the derivative of a fast sigmoid."""

    @staticmethod
    def forward(ctx, potential):
        ctx.save_for_backward(potential)
        return (potential > 0).to(potential)

    @staticmethod
    def backward(ctx, gradient):
        (potential,) = ctx.saved_tensors
        return gradient / (1 + 10 * potential.abs()) ** 2


class Spiking(nn.Module):
    """Leaky neurons whose potentials stay from one call to the next. (batch, 6) -> (batch, classes)."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.input, self.readout = nn.Linear(6, width), nn.Linear(width, CLASSES)
        self.recurrent = nn.Linear(width, width, bias=False)
        self.register_buffer("potential", torch.zeros(BATCH, width))

    def forward(self, inputs: Tensor) -> Tensor:
        potential, spikes, total = self.potential, torch.zeros_like(self.potential), 0.0
        for _ in range(5):
            potential = 0.9 * potential * (1 - spikes.detach()) + self.input(inputs) + self.recurrent(spikes)
            spikes = Spike.apply(potential - 0.3)
            total = total + self.readout(spikes)
        self.potential = potential.detach()
        return total


class Adapted(nn.Module):
    """A frozen layer's weight W + A C, of which A and C learn (LoRA). (batch, ..., inputs) -> (batch, ..., outputs)."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        outputs, inputs = layer.weight.shape
        self.a, self.c = nn.Parameter(torch.randn(outputs, rank) / rank), nn.Parameter(torch.randn(rank, inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.layer.weight + self.a @ self.c, self.layer.bias)


class Einsums(nn.Module):
    """Attention from matrices of its own alone. (batch, time, 6) -> (batch, classes)."""

    def __init__(self, heads: int = 2, width: int = 8):
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(heads, 6, width) / 6**0.5) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, width, CLASSES) / width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (torch.einsum("bti,hiw->bhtw", tokens, m) for m in (self.query, self.key, self.value))
        weights = torch.einsum("bhtw,bhsw->bhts", query, key).softmax(-1)
        return torch.einsum("bhtw,hwo->bo", torch.tanh(weights @ value), self.out)


class Case(NamedTuple):
    """How a network is built, and batches for it, one after the other."""

    build: Callable[[], nn.Module]
    draw: Callable[[], Iterable[tuple[Tensor, ...]]]


def _once(*shape: int) -> Callable[[], Iterable[tuple[Tensor, ...]]]:
    return lambda: [(torch.randn(BATCH, *shape),)]


def _words() -> Iterable[tuple[Tensor, ...]]:
    return [(torch.randint(30, (BATCH, 7)),)]


def _graphs() -> Iterable[tuple[Tensor, ...]]:
    return [(torch.randn(n, 6), torch.randint(n, (2, edges))) for n, edges in ((7, 12), (5, 9), (9, 9))]


def _adapted() -> nn.Module:
    layers = Adapted(nn.Linear(6, 12)), nn.GELU(), Adapted(nn.Linear(12, 12)), nn.GELU(), nn.Linear(12, CLASSES)
    return nn.Sequential(*layers)


def _torchvision(name: str, size: int = 32, **options) -> Case:
    return Case(lambda: torchvision.models.get_model(name, num_classes=CLASSES, **options), _once(3, size, size))


SMALL = {
    "LSTM tagger": Case(lambda: Tagger(nn.LSTM, False), _words),
    "GRU tagger": Case(lambda: Tagger(nn.GRU, True), _words),
    "CTRNN, Dale's law": Case(Dale, _once(10, 6)),
    "graph network": Case(GraphNetwork, _graphs),
    "spiking network": Case(Spiking, _once(6)),
    "LoRA": Case(_adapted, _once(6)),
    "own matrices, einsum": Case(Einsums, _once(5, 6)),
}
CASES = {
    **{name: _torchvision(name) for name in ("resnet18", "vgg11_bn", "mobilenet_v2", "shufflenet_v2_x0_5")},
    **{name: _torchvision(name) for name in ("densenet121", "efficientnet_b0")},
    "vit_b_16": _torchvision("vit_b_16", image_size=32),
    "swin_t": _torchvision("swin_t"),
    **SMALL,
}
RULES: dict[str, Callable[[nn.Module], align_rules.Rule]] = {
    **{name: align_rules.RULES[name] for name in ("align_prop", "align_ada", "align_zero", "fa")},
    "uSF": lambda network: align_rules.SignSymmetry(network, "uSF"),
    "frSF": lambda network: align_rules.SignSymmetry(network, "frSF"),
    **{name: align_rules.RULES[name] for name in ("kolen_pollack", "weight_mirror")},
}


def difference(rule: align_rules.Rule, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """The largest from backprop, where the rule is backprop; verify raises where it is not."""
    shares = [align_rules.verify(rule, lambda output: output.square().mean(), *batch, double=True) for batch in batches]
    return max(max(of_batch.values()) for of_batch in shares)


def differences(title: str) -> dict[str, str]:
    """Of every rule on a network; what was refused, in words."""
    torch.manual_seed(0)
    network, batches, found = CASES[title].build(), list(CASES[title].draw()), {}
    for name, rule in RULES.items():
        try:
            found[name] = f"{difference(rule(network), batches):.0e}".replace("0e+00", "0")
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = str(error).splitlines()[0]
    return found


# ------------------------------------------------------------------------------------------------------------- costs

TIMED = ("backprop", "fa", "align_prop", "align_ada", "align_zero", "dfa", "sign_symmetry", "kolen_pollack")
STRIDES = (1, 1, 2, 1, 2, 1)
COSTS = {  # with a batch for it
    "resnet18, 32 images of 64 x 64": (CASES["resnet18"].build, (32, 3, 64, 64)),
    "CIFAR-10, width 8": (lambda: ConvolutionalNetwork(3, 8, STRIDES, CLASSES), (100, 3, 32, 32)),
    "CIFAR-10, width 32": (lambda: ConvolutionalNetwork(3, 32, STRIDES, CLASSES), (100, 3, 32, 32)),
    "recurrent, width 16, 100 steps": (lambda: RecurrentNetwork(16, 50), (50, 100)),
}
OPTIONS = {
    name: {"added": ("initial_state",)} for name in ("fa", "dfa", "align_prop", "sign_symmetry", "kolen_pollack")
}
OPTIONS |= {"align_zero": {"live": ("initial_state",)}, "align_ada": {"live": ("initial_state",)}}


def make(name: str, title: str) -> align_rules.Rule:
    options = OPTIONS.get(name, {}) if "recurrent" in title else {}
    return align_rules.RULES[name](COSTS[title][0](), **options)


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(rule: align_rules.Rule, inputs: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.SGD([p for p in rule.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

    def made() -> None:
        optimiser.zero_grad()
        rule(inputs).square().mean().backward()
        optimiser.step()

    return made


def cost(title: str, rounds: int) -> dict[str, str]:
    """In a process of its own, in which nothing has been written down yet."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(COSTS[title][1])
    timed = [name for name in TIMED if (name, "recurrent" in title) != ("dfa", True)]
    first, second = (make(name, title) for name in ("align_prop", "align_ada"))
    found = {
        "first call": f"{seconds(lambda: first(inputs)):.1f} s",
        "second rule": f"{seconds(lambda: second(inputs)):.2f} s",
    }
    steps = {name: step(make(name, title), inputs) for name in timed}
    for _ in range(2):  # what happens only once, or in the first steps
        for made in steps.values():
            made()
    times = [{name: seconds(made) for name, made in steps.items()} for _ in range(rounds)]
    for name in timed:
        found[name] = f"{statistics.median(time[name] / time['backprop'] for time in times):.2f}"
    found["backprop"] = f"{1000 * statistics.median(time['backprop'] for time in times):.0f} ms"
    return found


def in_a_new_process(function: Callable):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["network", *columns], ["---"] * (len(columns) + 1)]
    lines += [[title, *(row.get(column, "-") for column in columns)] for title, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", action="store_true", help="what the rules cost, in place of how far they are off")
    parser.add_argument("--networks", nargs="+", help="words in the names of the networks (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a .csv as well")
    arguments = parser.parse_args()
    titles = [t for t in (COSTS if arguments.costs else CASES) if any(w in t for w in arguments.networks or [""])]
    rows = {}
    for title in titles:
        call = (
            functools.partial(cost, title, arguments.rounds)
            if arguments.costs
            else functools.partial(differences, title)
        )
        rows[title] = call() if len(titles) == 1 else in_a_new_process(call)
        print(f"{title}: {rows[title]}", file=sys.stderr, flush=True)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}\n")
    print(table(rows))
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("network", "rule", "value"))
            writer.writerows((title, column, value) for title, row in rows.items() for column, value in row.items())


if __name__ == "__main__":
    main()
