"""A whole training on the Add task, from the start of a process to its end, beside the same as a TensorFlow graph.

    python3 benchmarks/whole_training.py [--rules backprop align_ada] [--widths 64 256] [--epochs 200]

Ours is the command `train_add.py 1`, with imports, files, table and figure. TensorFlow's is a process that imports it,
builds its graphs and makes as many updates and evaluations (benchmarks/tensorflow_steps.py), and writes nothing. They
take turns; a figure is the median over rounds. Prints a table.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.neighbours import Neighbour
from benchmarks.steps import Setting, Step, request
from wide.training.devices import device_name
from wide.training.tasks import AddTask

ROOT = Path(__file__).parents[1]


def ours(rule: str, width: int, epochs: int) -> float:
    """Seconds of `train_add.py 1` for one run."""
    grid = ["--rules", rule, "--widths", str(width), "--learning-rates", "0.0001", "--epochs", str(epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, str(ROOT / "train_add.py"), "1", *grid, "--device", "cpu", "--outputs", outputs]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return time.perf_counter() - start


def tensorflows(rule: str, width: int, epochs: int) -> float:
    """Seconds of a process that makes the same updates and evaluations as TensorFlow graphs."""
    step = Step(Setting("add", rule, width, "fp32"), torch.device("cpu"))
    task, run = AddTask("published", torch.device("cpu")), step.training.run
    updates, evaluated = (
        sum(task.size(run, split) for split in splits) // run.batch_size
        for splits in (["train"], [evaluation.split for evaluation in task.evaluations])
    )
    start = time.perf_counter()
    process = Neighbour("tensorflow_steps.py", torch.get_num_threads())
    process.seconds(request(step, updates * epochs, evaluated * epochs))
    process.close()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rules", nargs="+", default=["backprop", "align_ada"])
    add("--widths", nargs="+", type=int, default=[64, 256])
    add("--epochs", type=int, default=200)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = device_name(torch.device("cpu"))
    print(f"{machine}; {arguments.epochs} epochs; seconds, medians of {arguments.rounds} rounds")
    print("| width | rule | ours | TensorFlow | ours/TensorFlow |", "|---|---|---|---|---|", sep="\n")
    for width in arguments.widths:
        for rule in arguments.rules:
            turns = [
                (ours(rule, width, arguments.epochs), tensorflows(rule, width, arguments.epochs))
                for _ in range(arguments.rounds)
            ]
            mine, other = (statistics.median(times) for times in zip(*turns, strict=True))
            print(f"| {width} | {rule} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
