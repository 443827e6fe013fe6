"""Time and memory of the exact alignment score beside the published estimate, on the layers of the CIFAR-10 network.

    python benchmarks/alignment_score.py --width 128

Each layer and method has a process of its own. Its first call (of one draw) gives the memory, the growth of the peak
resident set; its second call is timed.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1]))
from wide.alignment import scores
from wide.models import networks

STRIDES = (1, 1, 1, 2, 1, 2, 1)
IMAGE_SIZE = (32, 32)
PUBLISHED_DRAWS, BATCH = 100, 100


class Setting(NamedTuple):
    """What is measured: `draws` draws of a batch, or the exact score where draws is 0."""

    width: int
    layer: int
    draws: int
    threads: int


class Cost(NamedTuple):
    seconds: float
    megabytes: float
    score: float
    standard_error: float = 0.0


def sampled_score(
    layer: torch.nn.Module, deltas: tuple[Tensor, Tensor], size: tuple[int, ...], draws: int, batch: int = BATCH
) -> tuple[float, float]:
    """The score estimated as published, with draws of inputs z put through the layer and its transpose.

    Args:
        layer, size: as for `exact_score`; deltas: the two changes of its weight.

    Returns:
        It and its standard error, the jackknife's over the single z.
    """
    products = []
    for _ in range(draws):
        inputs = torch.randn(batch, layer.weight.shape[1], *size, dtype=deltas[0].dtype)
        P, Q = (there_and_back(layer, delta, inputs) for delta in deltas)
        pairs = ((P, Q), (P, P), (Q, Q))
        products.append(torch.stack([(left * right).flatten(1).sum(1, dtype=torch.float64) for left, right in pairs]))
    products = torch.cat(products, 1)  # (3, inputs): <Pz, Qz>, <Pz, Pz> and <Qz, Qz>
    total = products.sum(1, keepdim=True)
    found, without = (PQ / (PP * QQ).sqrt() for PQ, PP, QQ in (total, total - products))
    error = (len(without) - 1) * (without - without.mean()).square().mean()
    return found.item(), error.sqrt().item()


def there_and_back(layer: torch.nn.Module, delta: Tensor, inputs: Tensor) -> Tensor:
    """C'(C(z)), as the gradient of |C(z)|^2/2, C being the layer with weight `delta` (up to a constant factor)."""
    inputs = inputs.requires_grad_()
    parameters = {name: delta.new_zeros(p.shape) for name, p in layer.named_parameters()}
    outputs = functional_call(layer, parameters | {"weight": delta}, (inputs,))
    return torch.autograd.grad(outputs, inputs, outputs.detach())[0]


def measure(setting: Setting) -> Cost:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.layer)
    network = networks.ConvolutionalNetwork(3, setting.width, STRIDES, 10)
    size = list(scores.input_sizes(network, IMAGE_SIZE).values())[setting.layer]
    layer = network.blocks[setting.layer].layer
    normal = torch.randn(layer.weight.shape)
    align = normal + torch.randn(layer.weight.shape)

    def score(draws: int) -> tuple[float, ...]:
        if draws:
            return sampled_score(layer, (normal, align), size, draws)
        return (scores.exact_score(layer, normal, align, size),)

    before = peak_megabytes()
    score(min(setting.draws, 1))
    megabytes, start = peak_megabytes() - before, time.perf_counter()
    found = score(setting.draws)
    return Cost(time.perf_counter() - start, megabytes, *found)


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_apart(settings: list[Setting]) -> list[Cost]:
    """One after the other, each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(measure, settings))


def report(exact: list[Cost], sampled: list[Cost], draws: int) -> None:
    scaled = [cost.seconds * PUBLISHED_DRAWS / draws for cost in sampled]
    print("layer  stride | exact: seconds      MB   score | sampled: seconds      MB   score +- error | times faster")
    for k, (ours, theirs, seconds) in enumerate(zip(exact, sampled, scaled, strict=True)):
        print(
            f"{k + 1:5}  {STRIDES[k]:6} | {ours.seconds:14.4f} {ours.megabytes:7.1f} {ours.score:7.4f}"
            f" | {seconds:16.2f} {theirs.megabytes:7.1f} {theirs.score:7.4f} +- {theirs.standard_error:.4f}"
            f" | {seconds / ours.seconds:12.0f}"
        )
    totals = sum(cost.seconds for cost in exact), sum(scaled)
    peaks = max(cost.megabytes for cost in exact), max(cost.megabytes for cost in sampled)
    print(f"total seconds: exact {totals[0]:.3f}, sampled {totals[1]:.1f}, ratio {totals[1] / totals[0]:.0f}")
    print(f"peak MB of a layer: exact {peaks[0]:.1f}, sampled {peaks[1]:.1f}, ratio {peaks[1] / peaks[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--draws", type=int, default=PUBLISHED_DRAWS, help="draws timed; seconds are scaled to 100")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.draws < 1:
        parser.error("--draws must be at least 1")
    print(f"width {arguments.width}, {arguments.threads} threads, torch {torch.__version__}, float32 changes")
    print(f"sampled: {PUBLISHED_DRAWS} draws of a batch of {BATCH}", end="")
    print("" if arguments.draws == PUBLISHED_DRAWS else f", {arguments.draws} draws timed and scaled to that many")
    exact, sampled = (
        measure_apart([Setting(arguments.width, k, draws, arguments.threads) for k in range(len(STRIDES))])
        for draws in (0, arguments.draws)
    )
    report(exact, sampled, arguments.draws)


if __name__ == "__main__":
    main()
