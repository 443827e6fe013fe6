"""What steps.py and the processes beside it, which make the same steps in other frameworks, say to each other.

A process reads lines of JSON from stdin, each a Request, and answers with the seconds that such a step took; the first
builds what it needs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """A training step.

    `network` is "cnn" or "rnn"; `shapes` are those of the parameters in TensorFlow's layout, in the order of the
    network; `feedback`, those of the feedback weights; `inputs`, `outputs`, of the batch (channels last). `updates`,
    `evaluations`: how many are made, one after the other.
    """

    network: str
    rule: str
    strides: list[int]
    shapes: list[list[int]]
    feedback: list[list[int]]
    inputs: list[int]
    outputs: list[int]
    updates: int = 1
    evaluations: int = 0


def answer(make: Callable[[Request], tuple[Callable[[], object], Callable[[], object]]]) -> None:
    """Answer requests, in the process of another framework.

    Args:
        make: from a request, a function that makes an update and one that evaluates a batch; both wait for the result.
    """
    made = {}
    for line in sys.stdin:
        request = Request(**json.loads(line))
        if line not in made:
            made[line] = make(request)
        update, evaluate = made[line]
        start = time.perf_counter()
        for _ in range(request.updates):
            update()
        for _ in range(request.evaluations):
            evaluate()
        print(time.perf_counter() - start, flush=True)


class Neighbour:
    """A process that makes the same steps in another framework.

    Args:
        script: of this folder, given the number of threads.
        python: the interpreter, where it is not this one.
    """

    def __init__(self, script: str, threads: int, python: str = sys.executable):
        self.command = [python, str(Path(__file__).with_name(script)), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def seconds(self, request: Request) -> float:
        """What it answers.

        Raises:
            RuntimeError: the process has ended, for want of its framework for one.
        """
        self.process.stdin.write(json.dumps(request._asdict()) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"a process has ended; does this start: {' '.join(self.command)}")
        return float(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
