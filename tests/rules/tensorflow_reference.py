"""The learning rules written out in TensorFlow, float64, as their equations define them with stop-gradients.

An independent statement of what align_rules.py computes: explicit copies of the network at theta (current) and theta0
(initial), and automatic differentiation. Slow and plain on purpose. A rule is a method of a network,

    output = network.rule(inputs, theta, theta0, feedback)

and `gradients` differentiates the loss of that output. theta and theta0 are flat lists of parameters in TensorFlow's
layout: convolutions (row, column, input, output), dense weights (input, output); feedback weights likewise.
"""

import dataclasses
import math

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.threading.set_intra_op_parallelism_threads(2)
tf.config.threading.set_inter_op_parallelism_threads(1)

sg = tf.stop_gradient
relu = tf.nn.relu


def gradients(network, rule: str, inputs, targets, theta, theta0, feedback):
    """The rule's output, and the gradient of its loss for every parameter: None where the loss does not reach it.

    What reaches a parameter of theta0 is applied to its namesake in theta; a rule that keeps theta0 fixed stops it.
    """
    theta, theta0, feedback = ([tf.constant(t) for t in tensors] for tensors in (theta, theta0, feedback))
    with tf.GradientTape() as tape:
        tape.watch([theta, theta0])
        output = getattr(network, rule)(tf.constant(inputs), theta, theta0, feedback)
        loss = network.loss(output, targets)
    namesakes = zip(*tape.gradient(loss, [theta, theta0]), strict=True)
    reached = ([gradient for gradient in pair if gradient is not None] for pair in namesakes)
    return output.numpy(), [tf.add_n(found).numpy() if found else None for found in reached]


def align_gradients(network, inputs, targets, theta, theta0):
    """Gradients for the pair of networks behind the alignment score.

    N, at theta, gets that of its loss; A gets J(theta0)^T e, with J the Jacobian of the initial network's output and e
    the gradient of the loss at N's output.
    """
    theta, theta0 = ([tf.constant(t) for t in tensors] for tensors in (theta, theta0))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([theta, theta0])
        output = network.backprop(tf.constant(inputs), theta, None, None)
        initial = network.backprop(tf.constant(inputs), theta0, None, None)
        loss = network.loss(output, targets)
    error = tape.gradient(loss, output)
    of_normal, of_align = tape.gradient(loss, theta), tape.gradient(initial, theta0, output_gradients=error)
    return output.numpy(), [g.numpy() for g in of_normal], [g.numpy() for g in of_align]


def along(path, value):
    """`value`, and the gradient of `path` beside its own: value + path - sg(path)."""
    return value + path - sg(path)


def normalise(z):
    """Mean 0 and variance 1 over the batch axis, every other entry by itself; epsilon 1e-6."""
    centred = z - tf.reduce_mean(z, axis=0)
    return centred / tf.sqrt(tf.reduce_mean(centred**2, axis=0) + 1e-6)


def pool(activity):
    """Mean over the positions of a (batch, row, column, channel) activity; a dense one as it is."""
    return tf.reduce_mean(activity, axis=(1, 2)) if activity.shape.rank == 4 else activity


def layers(parameters):
    """(weight, bias) of every layer."""
    return list(zip(parameters[::2], parameters[1::2], strict=True))


class FeedbackKin:
    """Rules that are feedback alignment with other feedback, from `weights(theta)`, those that B stands beside."""

    def kolen_pollack(self, inputs, theta, theta0, feedback):
        return self.fa(inputs, theta, theta0, feedback)

    def weight_mirror(self, inputs, theta, theta0, feedback):
        return self.fa(inputs, theta, theta0, feedback)

    def sign_symmetry(self, inputs, theta, theta0, feedback):
        """The feedback given is M."""
        signed = [M * tf.sign(sg(W)) for M, W in zip(feedback, self.weights(theta), strict=True)]
        return self.fa(inputs, theta, theta0, signed)


@dataclasses.dataclass
class Layered(FeedbackKin):
    """Convolutional and fully connected networks: x_l = normalise(op(relu(x_{l-1}), W_l) + b_l), pooling, readout.

    `strides`: one per block, 1 for dense ones. `ntk`: op divides by sqrt(fan_in).
    """

    strides: tuple[int, ...]
    ntk: bool

    def loss(self, output, targets):
        """Squared error, mean over batch and classes."""
        return tf.reduce_mean((output - targets) ** 2)

    def op(self, activity, weight, stride=1):
        dense = weight.shape.rank == 2
        result = activity @ weight if dense else tf.nn.conv2d(activity, weight, stride, "SAME")
        return result / math.sqrt(math.prod(weight.shape[:-1])) if self.ntk else result

    def weights(self, theta):
        return [weight for weight, _ in layers(theta)]

    def blocks(self, theta):
        """(weight, bias, stride) of every block."""
        return [(*layer, stride) for layer, stride in zip(layers(theta)[:-1], self.strides, strict=True)]

    def readout(self, pooled, theta):
        weight, bias = layers(theta)[-1]
        return self.op(pooled, weight) + bias

    def features(self, images, theta):
        activity = images
        for weight, bias, stride in self.blocks(theta):
            activity = relu(normalise(self.op(activity, weight, stride) + bias))
        return pool(activity)

    def backprop(self, images, theta, theta0, feedback):
        return self.readout(self.features(images, theta), theta)

    def last_layer(self, images, theta, theta0, feedback):
        return self.readout(sg(self.features(images, theta)), theta)

    def fa(self, images, theta, theta0, feedback):
        activity = images
        for (weight, bias, stride), B in zip(self.blocks(theta), feedback[:-1], strict=True):
            sent = self.op(activity, B, stride)
            activity = relu(normalise(along(sent, self.op(sg(activity), weight, stride) + bias)))
        pooled = pool(activity)
        return along(self.op(pooled, feedback[-1]), self.readout(sg(pooled), theta))

    def align_prop(self, images, theta, theta0, feedback):
        return self.fa(images, theta, theta0, [sg(weight) for weight, _ in layers(theta0)])

    def dfa(self, images, theta, theta0, feedback):
        activity, projections = images, []
        for (weight, bias, stride), B in zip(self.blocks(theta), feedback, strict=True):
            activity = relu(normalise(self.op(sg(activity), weight, stride) + bias))
            # B has an axis for every axis it projects, and the classes last; without positions it takes their mean.
            projected = activity if B.shape.rank == activity.shape.rank else pool(activity)
            projections.append(tf.tensordot(projected, B, B.shape.rank - 1))
        return along(tf.add_n(projections), self.readout(sg(pool(activity)), theta))

    def align_zero(self, images, theta, theta0, feedback):
        return along(self.backprop(images, theta0, None, None), sg(self.backprop(images, theta, None, None)))

    def align_ada(self, images, theta, theta0, feedback):
        theta0 = [sg(parameter) for parameter in theta0]
        a = a0 = images
        for (W, b, stride), (W0, b0, _) in zip(self.blocks(theta), self.blocks(theta0), strict=True):
            x = normalise(self.op(sg(a), W, stride) + b)
            x0 = normalise(self.op(a0, W0, stride) + b0)
            a, a0 = relu(x), relu(along(x, x0))
        p, p0 = pool(relu(x)), pool(relu(x0))
        return along(self.readout(along(p, p0), theta0), self.readout(sg(p), theta))


@dataclasses.dataclass
class Recurrent(FeedbackKin):
    """s_t = relu(x_t W_ih + s_{t-1} W_hh/sqrt(n) + b_h), y_t = s_t W_ho/sqrt(n) + b_o.

    Parameters: initial state (batch, n), W_ih (1, n), W_hh (n, n), b_h (n), W_ho (n, 1), b_o (1). Feedback: one for
    W_ih, which has nothing to send an error to, one for W_hh, one for W_ho. `corrected`: in align_ada the copy's
    readout is coupled too.
    """

    corrected: bool = True

    def loss(self, output, targets):
        """Squared error of (batch, time), mean over the batch, summed over time."""
        return tf.reduce_sum(tf.reduce_mean((output - targets) ** 2, axis=0))

    def weights(self, theta):
        return [theta[k] for k in (1, 2, 4)]

    def op(self, state, weight):
        return state @ weight / math.sqrt(weight.shape[0])

    def update(self, inputs, sent, theta):
        """relu of the input's drive, of what the old state sends through W_hh, and of the bias."""
        return relu(inputs @ theta[1] + sent + theta[3])

    def readout(self, states, theta):
        """(batch, time)."""
        return tf.concat([self.op(state, theta[4]) + theta[5] for state in states], axis=1)

    def states(self, sequences, theta, start):
        state, states = start, []
        for inputs in steps(sequences):
            state = self.update(inputs, self.op(state, theta[2]), theta)
            states.append(state)
        return states

    def backprop(self, sequences, theta, theta0, feedback):
        return self.readout(self.states(sequences, theta, theta[0]), theta)

    def last_layer(self, sequences, theta, theta0, feedback):
        state, W_ih, W_hh, b_h, W_ho, b_o = theta
        return self.backprop(sequences, [state, sg(W_ih), sg(W_hh), sg(b_h), W_ho, b_o], None, None)

    def fa(self, sequences, theta, theta0, feedback):
        _, B_hh, B_ho = feedback
        state, outputs = theta[0], []
        for inputs in steps(sequences):
            sent = along(self.op(state, B_hh), self.op(sg(state), theta[2]))
            state = self.update(inputs, sent, theta)
            outputs.append(along(self.op(state, B_ho), self.readout([sg(state)], theta)))
        return tf.concat(outputs, axis=1)

    def align_prop(self, sequences, theta, theta0, feedback):
        return self.fa(sequences, theta, theta0, [sg(theta0[k]) for k in (1, 2, 4)])

    def align_zero(self, sequences, theta, theta0, feedback):
        initial = self.readout(self.states(sequences, theta0, theta[0]), theta0)
        return along(initial, sg(self.backprop(sequences, theta, None, None)))

    def align_ada(self, sequences, theta, theta0, feedback):
        theta0 = [sg(parameter) for parameter in theta0]
        # The copy starts from the same state; its gradient comes through the coupling in the first step, once.
        s, s0 = theta[0], sg(theta[0])
        states, copied = [], []
        for inputs in steps(sequences):
            s0 = self.update(inputs, self.op(along(s, s0), theta0[2]), theta0)
            s = self.update(inputs, self.op(sg(s), theta[2]), theta)
            states.append(s)
            copied.append(along(s, s0) if self.corrected else s0)
        return along(self.readout(copied, theta0), self.readout([sg(s) for s in states], theta))


def steps(sequences):
    """(batch, 1) inputs of every time step."""
    return tf.split(sequences, sequences.shape[1], axis=1)
