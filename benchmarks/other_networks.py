"""The rules on networks that were not written for them: whether one step changes what it should, and what it costs.

    python benchmarks/other_networks.py

The first table has a row per network and a column per rule. "yes": the output was the network's own to the last bit;
the parameters that backprop moves moved (with last_layer: the readout's alone), and with kolen_pollack the feedback
weights beside them; running statistics were updated once, from the current network; and nothing else that the rule
keeps changed. The second gives the processor time of a step on ResNet-18 as a multiple of backprop's in the same round,
each round one step of every rule: median, lowest and highest.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import align_rules
from wide.models.networks import RecurrentNetwork
from wide.models.rules import make_rule
from wide.runs.run import Run

CLASSES = 10


class Perceptron(nn.Module):
    """(batch, 3, 32, 32) -> (batch, classes), with one hidden layer used twice."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.first, self.hidden = nn.Linear(3 * 32 * 32, width), nn.Linear(width, width)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        activity = torch.tanh(self.first(images.flatten(1)))
        for _ in range(2):
            activity = F.relu(self.hidden(activity))
        return self.readout(activity)


class UnrolledCell(nn.Module):
    """(batch, time, inputs) -> (batch, classes): a recurrent cell unrolled by hand, from a learned state."""

    def __init__(self, inputs: int = 32, width: int = 64):
        super().__init__()
        self.input, self.state = nn.Linear(inputs, width), nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(width, CLASSES)
        self.initial = nn.Parameter(torch.zeros(1, width))

    def forward(self, sequences: Tensor) -> Tensor:
        state = self.initial.expand(len(sequences), -1)
        for step in sequences.unbind(1):
            state = torch.tanh(self.input(step) + self.state(state))
        return self.readout(state)


class Attention(nn.Module):
    """(batch, tokens, width) -> the same, by plain linear layers and products of activities."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.joint(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(
            -1
        )  # (batch, heads, tokens, tokens)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norms[0](tokens))
        return tokens + self.perceptron(self.norms[1](tokens))


class VisionTransformer(nn.Module):
    """(batch, 3, 32, 32) -> (batch, classes), on patches of 8 x 8 pixels."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (batch, tokens, width)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        return self.readout(self.norm(self.blocks(tokens))[:, 0])


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    batch_shape: tuple[int, ...]


CASES = {
    "torchvision `resnet18`": Case(lambda: torchvision.models.resnet18(num_classes=CLASSES), (8, 3, 32, 32)),
    "torchvision `vgg11_bn`": Case(lambda: torchvision.models.vgg11_bn(num_classes=CLASSES), (8, 3, 32, 32)),
    "torchvision `mobilenet_v2`": Case(lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES), (8, 3, 32, 32)),
    "multilayer perceptron, a layer used twice": Case(Perceptron, (8, 3, 32, 32)),
    "recurrent cell unrolled over 10 steps": Case(UnrolledCell, (8, 10, 32)),
    "small vision transformer": Case(VisionTransformer, (8, 3, 32, 32)),
}


def problems(name: str, case: Case, seed: int = 0) -> list[str]:
    """What is wrong with one step of SGD by the rule of this name; empty where nothing is."""
    torch.manual_seed(seed)
    network, inputs = case.build(), torch.randn(case.batch_shape)
    labels = torch.arange(len(inputs)) % CLASSES
    reference, rule = copy.deepcopy(network), align_rules.RULES[name](network)
    own, output = (_drawing_the_same(seed, function, inputs) for function in (reference, rule))
    before = _copied(rule.state_dict())
    F.cross_entropy(own, labels).backward()
    F.cross_entropy(output, labels).backward()
    torch.optim.SGD(rule.parameters(), lr=0.1).step()
    moved = {key for key, value in rule.state_dict().items() if not torch.equal(value, before[key])}

    gradients = {key: parameter.grad.norm().item() for key, parameter in reference.named_parameters()}
    # Backprop's gradient for a bias in front of a normalisation is rounding; whether that moves it means nothing.
    certain = {key for key, norm in gradients.items() if norm > 1e-6 * max(gradients.values())}
    learning = set(rule.learns) if name == "last_layer" else set(gradients)
    # Kolen-Pollack's feedback weights learn as the layers' weights do.
    learned = dict(zip(_learned_feedback(rule), align_rules.layer_weights(network), strict=False))
    statistics = dict(reference.named_buffers())
    found = {
        "another output": not torch.equal(own, output),
        "did not move": {f"network.{key}" for key in certain & learning} - moved,
        "feedback that did not move": {B for B, key in learned.items() if key in certain} - moved,
        "moved": moved - {f"network.{key}" for key in learning} - learned.keys(),
        "other running statistics": {k for k, b in network.named_buffers() if not torch.equal(b, statistics[k])},
    }
    return [f"{problem}: {what}" for problem, what in found.items() if what]


def _learned_feedback(rule: align_rules.Rule) -> list[str]:
    return [key for key, p in rule.named_parameters() if p.requires_grad and not key.startswith("network.")]


def _drawing_the_same(seed: int, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    torch.manual_seed(seed + 1)  # for dropout
    return function(inputs)


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def checked() -> str:
    """The table of networks and rules."""
    lines = [f"| network | {' | '.join(f'`{name}`' for name in align_rules.RULES)} |"]
    lines.append("|---" * (len(align_rules.RULES) + 1) + "|")
    for title, case in CASES.items():
        answers = [_answer(name, case) for name in align_rules.RULES]
        lines.append(f"| {title} | {' | '.join(answers)} |")
    return "\n".join(lines)


def _answer(name: str, case: Case) -> str:
    try:
        return "; ".join(problems(name, case)) or "yes"
    except (TypeError, ValueError, RuntimeError) as error:
        return f"no ({error})"


class Step:
    """Makes steps of SGD with momentum by one rule.

    Args:
        measured: the network in its rule, a batch of inputs, and the loss of an output.
    """

    def __init__(self, measured: tuple[align_rules.Rule, Tensor, Callable[[Tensor], Tensor]]):
        self.rule, self.inputs, self.loss = measured
        learning = [parameter for parameter in self.rule.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.SGD(learning, lr=1e-4, momentum=0.9)

    def seconds(self) -> float:
        """Processor time of one step: with one thread, its duration on a machine that does nothing else."""
        start = time.process_time()
        self.optimiser.zero_grad()
        self.loss(self.rule(self.inputs)).backward()
        self.optimiser.step()
        return time.process_time() - start


def on_resnet18(name: str, batch: int, size: int):
    """A rule on ResNet-18, images, and the cross-entropy, as `Step` takes them."""
    torch.manual_seed(0)
    rule = align_rules.RULES[name](torchvision.models.resnet18(num_classes=CLASSES))
    labels = torch.arange(batch) % CLASSES
    return rule, torch.randn(batch, 3, size, size), lambda output: F.cross_entropy(output, labels)


def on_small_recurrent(name: str):
    """A rule on the paper's recurrent network of width 16, over 100 time steps: nothing but overhead."""
    torch.manual_seed(0)
    run = Run("add", "rnn", name, 16, 0.001, 99, 50, variant="published")
    targets = torch.randn(50, 100)
    return make_rule(run, RecurrentNetwork(16, 50)), torch.randn(50, 100), lambda output: F.mse_loss(output, targets)


def costs(measured: Mapping[str, tuple], rounds: int) -> str:
    """The table of the time of a step by every rule, as a multiple of backprop's in the same round."""
    steps = {name: Step(parts) for name, parts in measured.items()}
    for step in steps.values():
        for _ in range(2):
            step.seconds()  # what happens only once, or in the first calls
    times = [{name: step.seconds() for name, step in steps.items()} for _ in range(rounds)]
    ratios = {name: sorted(time[name] / time["backprop"] for time in times) for name in steps}
    cells = {name: f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for name, r in ratios.items()}
    cells["backprop"] = f"1 ({statistics.median(time['backprop'] for time in times):.4f} s)"
    head = f"| {' | '.join(f'`{name}`' for name in cells)} |"
    return "\n".join([head, "|---" * len(cells) + "|", f"| {' | '.join(cells.values())} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images in a timed batch (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels of their side (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {arguments.threads} threads\n")
    print(checked(), flush=True)
    print(f"\nResNet-18, {arguments.batch} images of {arguments.size} x {arguments.size}, {arguments.rounds} rounds\n")
    rules = align_rules.RULES
    print(
        costs({name: on_resnet18(name, arguments.batch, arguments.size) for name in rules}, arguments.rounds),
        flush=True,
    )
    print(f"\nRecurrent network of width 16, 100 time steps, batch 50, {5 * arguments.rounds} rounds\n")
    print(costs({name: on_small_recurrent(name) for name in rules if name != "dfa"}, 5 * arguments.rounds))


if __name__ == "__main__":
    main()
