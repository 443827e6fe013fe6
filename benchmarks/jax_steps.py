"""Steps of training in JAX, the way one writes them there: jitted, the time steps a scan; a process beside steps.py.

Needs JAX alone (benchmarks/requirements-jax.txt), in an environment of its own: `steps.py --jax .../bin/python3`.
Backprop and Align-ada, on both networks.
"""

import functools
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import relu
from neighbours import Request, answer

sg = lax.stop_gradient


def couple(value: Array, path: Array) -> Array:
    """The value of the first; its gradient goes to both."""
    return value + path - sg(path)


def drive(sequences: Array, theta: list[Array]) -> Array:
    return sequences.T[:, :, None] * theta[1] + theta[3]  # (time, batch, width)


def scaled(weight: Array) -> Array:
    return weight / math.sqrt(math.prod(weight.shape[:-1]))


def read(states: Array, theta: list[Array]) -> Array:
    return (states @ scaled(theta[4]) + theta[5])[..., 0].T  # (batch, time)


def recurrent_backprop(sequences: Array, theta: list[Array], theta0: list[Array]) -> Array:
    weight = scaled(theta[2])

    def step(state, row):
        state = relu(row + state @ weight)
        return state, state

    return read(lax.scan(step, theta[0], drive(sequences, theta))[1], theta)


def recurrent_align_ada(sequences: Array, theta: list[Array], theta0: list[Array]) -> Array:
    """As published: the initial network's readout is not coupled."""
    W, W0 = scaled(theta[2]), scaled(theta0[2])

    def step(states, rows):
        (s, s0), (row, row0) = states, rows
        s0 = relu(row0 + couple(s0, s) @ W0)
        s = relu(row + sg(s) @ W)
        return (s, s0), (s, s0)

    start = theta[0], sg(theta[0])
    states, states0 = lax.scan(step, start, (drive(sequences, theta), drive(sequences, theta0)))[1]
    return couple(read(sg(states), theta), read(states0, theta0))


def normalised(x: Array) -> Array:
    return (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-6)


def convolved(a: Array, weight: Array, stride: int) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(a, scaled(weight), (stride, stride), "SAME", dimension_numbers=layout)


def layered_backprop(images: Array, theta: list[Array], theta0: list[Array], strides: list[int]) -> Array:
    a = images
    for weight, bias, stride in zip(theta[:-2:2], theta[1:-2:2], strides, strict=True):
        a = relu(normalised(convolved(a, weight, stride) + bias))
    return a.mean((1, 2)) @ scaled(theta[-2]) + theta[-1]


def layered_align_ada(images: Array, theta: list[Array], theta0: list[Array], strides: list[int]) -> Array:
    a = a0 = images
    for k, stride in enumerate(strides):
        (W, b), (W0, b0) = theta[2 * k : 2 * k + 2], theta0[2 * k : 2 * k + 2]
        x = normalised(convolved(sg(a), W, stride) + b)
        x0 = normalised(convolved(a0, W0, stride) + b0)
        a, a0 = relu(x), relu(couple(x0, x))
    p, p0 = relu(x).mean((1, 2)), relu(x0).mean((1, 2))
    return couple(sg(p) @ scaled(theta[-2]) + theta[-1], couple(p0, p) @ scaled(theta0[-2]) + theta0[-1])


def make(request: Request):
    stream = np.random.RandomState(0)
    theta = [jnp.asarray(stream.normal(size=s) if len(s) > 1 else np.zeros(s), jnp.float32) for s in request.shapes]
    theta0 = [jnp.array(parameter) for parameter in theta]
    inputs, targets = (jnp.asarray(stream.rand(*s), jnp.float32) for s in (request.inputs, request.outputs))
    kind = "recurrent" if request.network == "rnn" else "layered"
    more = {} if kind == "recurrent" else {"strides": request.strides}
    backprop = functools.partial(globals()[f"{kind}_backprop"], **more)
    rule = functools.partial(globals()[f"{kind}_{request.rule}"], **more)

    def loss(network, theta: list[Array], theta0: list[Array], inputs: Array, targets: Array) -> Array:
        squares = (network(inputs, theta, theta0) - targets) ** 2
        return squares.mean(0).sum() if kind == "recurrent" else squares.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def updated(theta: list[Array], *given):
        value, gradients = jax.value_and_grad(functools.partial(loss, rule))(theta, *given)
        return [parameter - 1e-3 * g for parameter, g in zip(theta, gradients, strict=True)], value

    evaluated = jax.jit(functools.partial(loss, backprop))

    def update() -> float:
        nonlocal theta
        theta, value = updated(theta, theta0, inputs, targets)
        return float(value)

    return update, lambda: float(evaluated(theta, theta0, inputs, targets))


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # by which XLA counts its threads, when it starts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
    jax.config.update("jax_platforms", "cpu")
    answer(make)
