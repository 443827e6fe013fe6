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
    score: scores.Score


def measure(setting: Setting) -> Cost:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.layer)
    network = networks.ConvolutionalNetwork(3, setting.width, STRIDES, 10)
    size = list(scores.input_sizes(network, IMAGE_SIZE).values())[setting.layer]
    layer = network.blocks[setting.layer].layer
    normal = torch.randn(layer.weight.shape)
    align = normal + torch.randn(layer.weight.shape)

    def score(draws: int) -> scores.Score:
        if draws:
            return scores.sampled_score(layer, normal, align, size, scores.Draws(draws, BATCH))
        return scores.exact_score(layer, normal, align, size)

    before = peak_megabytes()
    score(min(setting.draws, 1))
    megabytes, start = peak_megabytes() - before, time.perf_counter()
    found = score(setting.draws)
    return Cost(time.perf_counter() - start, megabytes, found)


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
            f"{k + 1:5}  {STRIDES[k]:6} | {ours.seconds:14.4f} {ours.megabytes:7.1f} {ours.score.value:7.4f}"
            f" | {seconds:16.2f} {theirs.megabytes:7.1f} {theirs.score.value:7.4f} +- {theirs.score.standard_error:.4f}"
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
