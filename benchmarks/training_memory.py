"""Peak memory of a training step, per rule: python3 benchmarks/training_memory.py imagenet [--width 512]

Counted from the sizes of the tensors that are alive during a step, parameters and feedback weights included, on torch's
"meta" device, where tensors have sizes but no content. On a GPU the same step is also measured. What the convolution
library takes for itself comes on top of the count. `--check` compares the count with the growth of this process' memory
in a real step on the CPU, at a width that is small enough.
"""

import argparse
import multiprocessing
import resource
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_cifar
import train_imagenet
from align_rules import RULES, Rule
from wide.models.networks import ConvolutionalNetwork
from wide.models.rules import make_rule
from wide.runs.run import Run


class Geometry(NamedTuple):
    """Of the paper's network for a dataset. `pooled`: what DFA's feedback reaches."""

    size: int
    strides: tuple[int, ...]
    classes: int
    pooled: bool


GEOMETRIES = {
    "cifar": Geometry(32, train_cifar.STRIDES, 10, pooled=False),
    "imagenet": Geometry(224, train_imagenet.STRIDES, 1000, pooled=True),
}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def make(rule: str, geometry: Geometry, width: int) -> Rule:
    network = ConvolutionalNetwork(3, width, geometry.strides, geometry.classes)
    run = Run("", "cnn", rule, width, learning_rate=1e-3, seed=99, batch_size=0)
    return make_rule(run, network, (3, geometry.size, geometry.size), geometry.pooled)


def step(rule: Rule, geometry: Geometry, batch: int, device: str) -> None:
    images = torch.empty(batch, 3, geometry.size, geometry.size, device=device).fill_(0.5)
    targets = torch.zeros(batch, dtype=torch.int64, device=device)
    F.mse_loss(rule(images), F.one_hot(targets, geometry.classes).float()).backward()
    torch.optim.SGD([p for p in rule.parameters() if p.requires_grad], lr=1e-3).step()


def counted(rule_name: str, geometry: Geometry, width: int, batch: int) -> float:
    """Bytes at the peak of a step, from sizes."""
    rule = make(rule_name, geometry, width).to("meta")
    kept = sum(tensor.untyped_storage().nbytes() for tensor in [*rule.parameters(), *rule.buffers()])
    with Live() as live:
        step(rule, geometry, batch, "meta")
    return kept + live.peak


def measured(rule_name: str, geometry: Geometry, width: int, batch: int) -> float:
    """Bytes at the peak of a step: of the GPU's memory, or by how much this process grew. For a process of its own."""
    if torch.cuda.is_available():
        rule = make(rule_name, geometry, width).to("cuda")
        step(rule, geometry, batch, "cuda")
        return torch.cuda.max_memory_allocated()
    step(make("backprop", geometry, 4), geometry, 2, "cpu")  # what libraries take for themselves once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(make(rule_name, geometry, width), geometry, batch, "cpu")
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=GEOMETRIES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="measure on the CPU as well, where there is no GPU")
    arguments = parser.parse_args()
    also = arguments.check or torch.cuda.is_available()
    print(f"{arguments.dataset}, width {arguments.width}, batch {arguments.batch}, FP32; GB at a step's peak\n")
    print("| rule | counted |" + (" measured |" if also else "") + "\n|---|---|" + ("---|" if also else ""))
    for rule in RULES:
        setting = rule, GEOMETRIES[arguments.dataset], arguments.width, arguments.batch
        cells = [counted(*setting)]
        if also:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                cells.append(fresh.apply(measured, setting))
        print(f"| {rule} | " + " | ".join(f"{size / 1e9:.2f}" for size in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
