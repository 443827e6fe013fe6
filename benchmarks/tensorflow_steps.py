"""Steps of training as TensorFlow graphs, written the way the published code wrote them; a process beside steps.py.

Both the current and the initial network are computed in full, and what a rule does not send is stopped
(tests/rules/tensorflow_reference.py). One graph holds output, loss, gradients and the update of every variable.

How the two talk: benchmarks/neighbours.py.
"""

import math
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

from benchmarks.neighbours import Request, answer
from tests.rules import tensorflow_reference as reference


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


def make(request: Request):
    step = Step(request)
    return lambda: step.update().numpy(), lambda: step.evaluate().numpy()


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
    answer(make)
