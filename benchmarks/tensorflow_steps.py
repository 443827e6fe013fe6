"""Steps of training as TensorFlow graphs, written the way the published code wrote them; a process beside steps.py.

Both the current and the initial network are computed in full, and what a rule does not send is stopped
(tests/rules/tensorflow_reference.py). One graph holds output, loss, gradients and the update of every variable.

Reads lines of JSON from stdin, each a Request, and answers with the seconds that such a step took; the first builds the
graph.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

from tests.rules import tensorflow_reference as reference


class Request(NamedTuple):
    """A training step.

    `network` is "cnn" or "rnn"; `shapes` are those of the parameters in TensorFlow's layout, in the order of the
    reference; `feedback`, those of the feedback weights; `inputs`, `outputs`, of the batch (channels last). `updates`,
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


class Step:
    """A rule's step on made-up data, in float32."""

    def __init__(self, request: Request):
        stream = np.random.RandomState(0)

        def drawn(shape: list[int]):
            return tf.constant(stream.normal(size=shape) if len(shape) > 1 else np.zeros(shape), tf.float32)

        corrected = {"corrected": False} if request.network == "rnn" else {}
        layered = {"strides": tuple(request.strides), "ntk": True} if request.network == "cnn" else {}
        kind = reference.Layered if request.network == "cnn" else reference.Recurrent
        self.network, self.rule = kind(**layered, **corrected), request.rule
        self.theta = [tf.Variable(drawn(shape)) for shape in request.shapes]
        self.theta0 = [tf.Variable(parameter) for parameter in self.theta]
        self.feedback = [drawn(shape) / math.sqrt(math.prod(shape)) for shape in request.feedback]
        self.inputs = tf.constant(stream.rand(*request.inputs), tf.float32)
        self.targets = tf.constant(stream.rand(*request.outputs), tf.float32)
        self.update, self.evaluate = tf.function(self.updated), tf.function(self.evaluated)
        self.updates, self.evaluations = request.updates, request.evaluations

    def updated(self):
        """One update by SGD; the loss."""
        with tf.GradientTape() as tape:
            output = getattr(self.network, self.rule)(self.inputs, self.theta, self.theta0, self.feedback)
            loss = self.network.loss(output, self.targets)
        own, initial = tape.gradient(loss, [self.theta, self.theta0])
        for parameter, *gradients in zip(self.theta, own, initial, strict=True):
            for gradient in gradients:
                if gradient is not None:
                    parameter.assign_sub(1e-3 * gradient)
        return loss

    def evaluated(self):
        """The loss, from the current network alone."""
        output = self.network.backprop(self.inputs, self.theta, self.theta0, self.feedback)
        return self.network.loss(output, self.targets)

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.updates):
            self.update().numpy()
        for _ in range(self.evaluations):
            self.evaluate().numpy()
        return time.perf_counter() - start


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        if line not in steps:
            steps[line] = Step(Request(**json.loads(line)))
        print(steps[line].seconds(), flush=True)


if __name__ == "__main__":
    main()
