"""How many images per second can be loaded, and how many trained on."""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch

from wide.runs.run import Run
from wide.training.devices import device_name
from wide.training.folder_task import FolderTask
from wide.training.loop import Training
from wide.training.processes import Processes

SECONDS = 20  # of each measurement
WARM_UP = 3  # batches that do not count


def profile(task: FolderTask, run: Run, processes: Processes) -> None:
    """Print images per second of the loader alone, of training alone, on the same images, and of training from files.

    Those of all processes together. On a GPU, the peak of its memory too.
    """
    task.check(run)
    training = Training(task, run, processes)
    if task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(task.device)
    rates = {
        "loading alone": _rate(_load(training), training),
        "training alone": _rate(_train_alone(training), training),
        "training from files": _rate(_train(training), training),
    }
    waiting = max(1 - rates["training from files"] / rates["training alone"], 0)
    if not processes.first:
        return
    print(f"{run.name}; {processes.count} processes, {task.workers} workers each; {device_name(task.device)}")
    for name, rate in rates.items():
        print(f"{name:20} {rate:8.0f} images/s")
    print(f"{'waiting for data':20} {100 * waiting:8.0f} % of the time of training from files")
    if task.device.type == "cuda":
        print(f"{'peak GPU memory':20} {torch.cuda.max_memory_allocated(task.device) / 1e9:8.2f} GB")


def _rate(counts: Iterator[int], training: Training) -> float:
    """Images per second of all processes, from the numbers of images that the steps of one deal with."""
    processes = training.processes
    for _ in range(WARM_UP):
        next(counts)
    start, images = training.clock(), 0
    # All processes take the same number of steps.
    while not any(processes.gather(time.perf_counter() - start > SECONDS)):
        images += next(counts)
    return sum(processes.gather(images / (training.clock() - start)))


def _load(training: Training) -> Iterator[int]:
    task, run = training.task, training.run
    for epoch in itertools.count():
        steps = training.shares(np.random.RandomState(epoch).permutation(task.size(run, "train")))
        for _, labels, _ in task.loader(run, "train", [part for step in steps for part in step], epoch):
            yield len(labels)


def _train_alone(training: Training) -> Iterator[int]:
    first = training.shares(np.arange(training.task.size(training.run, "train")))[0]
    batches = list(training.task.batches(training.run, "train", first, 0))
    while True:
        yield len(training.step(batches)[1])


def _train(training: Training) -> Iterator[int]:
    while True:
        for _, targets, _ in training.steps():
            yield len(targets)
