"""Every rule's output and gradients against the TensorFlow reference, far from the initial parameters."""

import concurrent.futures
import importlib.util
import multiprocessing

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import align_rules
from wide.models import networks
from wide.models.pair import Pair

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("TensorFlow is not installed", allow_module_level=True)

BATCH, CHANNELS, WIDTH, CLASSES, TIME = 6, 3, 5, 4, 7

# Strides of the blocks, for images of one size: even rows and odd columns, so that stride 2 pads one axis on both sides
# and the other at its end only. Stride 4 passes over pixels.
IMAGE, CONVOLUTIONAL = (12, 9), {"strides 1 2 2": (1, 2, 2), "strides 4 1 2": (4, 1, 2)}

# The published rule leaves the readout of the initial network uncoupled.
FEEDBACK_KIN = ("fa", "sign_symmetry", "kolen_pollack", "weight_mirror")
RECURRENT_OPTIONS = {
    **{name: {"added": ("initial_state",)} for name in (*FEEDBACK_KIN, "align_prop")},
    "last_layer": {"learns": ("readout", "initial_state")},
    "align_zero": {"live": ("initial_state",)},
    "align_ada corrected": {"coupling": "activity", "live": ("initial_state",)},
    "align_ada published": {"coupling": "activity", "live": ("initial_state",), "uncoupled": ("readout",)},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def worker():
    """A process for TensorFlow. In one process with Triton, which torch loads, it aborts: each brings its own LLVM."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def reference_gradients(network: str, options: dict, *arguments):
    """tensorflow_reference.gradients for the network of this name; run by the worker."""
    from tests.rules import tensorflow_reference

    return tensorflow_reference.gradients(getattr(tensorflow_reference, network)(**options), *arguments)


def reference_pair(network: str, options: dict, *arguments):
    """tensorflow_reference.align_gradients, likewise."""
    from tests.rules import tensorflow_reference

    return tensorflow_reference.align_gradients(getattr(tensorflow_reference, network)(**options), *arguments)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def randomise(network: nn.Module) -> nn.Module:
    """Random parameters in float64, none of them zero, with the spread that the parameterisation asks for."""
    for module in network.double().modules():
        for name, parameter in module.named_parameters(recurse=False):
            drawn = randn(*parameter.shape)
            parameter.data.copy_(module.stored(drawn) if name == "weight" else drawn)
    return network


def move(network: nn.Module) -> None:
    """Take the parameters clearly away from where a rule saw them."""
    for parameter in network.parameters():
        parameter.data.add_(0.7 * parameter.square().mean().sqrt() * torch.randn_like(parameter))


def arranged(tensor: Tensor) -> np.ndarray:
    """A copy of a weight, bias or feedback weight in TensorFlow's layout: (out, in, rows, columns), out and in last."""
    axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[tensor.dim()]
    return tensor.detach().permute(axes).numpy().copy()


def in_order(tensors: dict[str, Tensor | None]) -> list[np.ndarray | None]:
    """Parameters or gradients by name, as the reference lists them."""
    return [
        None if tensor is None else arranged(tensor.T if name == "initial_state" else tensor)  # (batch, width) stays so
        for name, tensor in tensors.items()
    ]


def parameters(network: nn.Module) -> list[np.ndarray]:
    return in_order(dict(network.named_parameters()))


def layer_feedback(network: nn.Module) -> dict[str, Tensor]:
    return {name: randn(*weight.shape) * weight.std() for name, weight in align_rules.layer_weights(network).items()}


def assert_close(computed: np.ndarray, expected: np.ndarray) -> None:
    """Relative to the largest entry; absolute where that is rounding, as for biases in front of a normalisation."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-9 * (largest if largest > 1e-12 else 1))


def assert_follows(network: nn.Module, output: Tensor, expected) -> None:
    """The network holds the reference's gradients, and none where the reference has none."""
    assert_close(output.detach().numpy(), expected[0])
    computed = in_order({name: parameter.grad for name, parameter in network.named_parameters()})
    assert [g is None for g in computed] == [g is None for g in expected[1]]
    for gradient, expected_gradient in zip(computed, expected[1], strict=True):
        if gradient is not None:
            assert_close(gradient, expected_gradient)


def image_network(kind: str, parameterisation: str) -> tuple[nn.Module, Tensor, list[tuple[int, ...]]]:
    """A network, a batch for it, and the shape of every block's activity."""
    if kind == "dense":
        network = networks.FullyConnectedNetwork(CHANNELS, WIDTH, CLASSES, 3, parameterisation)
        return randomise(network), randn(BATCH, CHANNELS), [(WIDTH,)] * 3
    strides, (rows, columns) = CONVOLUTIONAL[kind], IMAGE
    network = networks.ConvolutionalNetwork(CHANNELS, WIDTH, strides, CLASSES, parameterisation)
    shapes = [(WIDTH, -(-rows // step), -(-columns // step)) for step in np.cumprod(strides)]
    return randomise(network), randn(BATCH, CHANNELS, rows, columns), shapes


@pytest.mark.parametrize("parameterisation", networks.PARAMETERISATIONS)
@pytest.mark.parametrize("kind", [*CONVOLUTIONAL, "dense"])
@pytest.mark.parametrize("rule_name", [*align_rules.RULES, "dfa pooled"])
def test_images(rule_name, kind, parameterisation, worker):
    network, images, shapes = image_network(kind, parameterisation)
    feedback = {
        **dict.fromkeys(("fa", "kolen_pollack", "weight_mirror"), layer_feedback(network)),
        "sign_symmetry": {name: B.abs() for name, B in layer_feedback(network).items()},
        "dfa": [randn(CLASSES, *shape) for shape in shapes],
        "dfa pooled": [randn(CLASSES, WIDTH) for _ in shapes],
    }.get(rule_name)
    name, theta0, targets = rule_name.split()[0], parameters(network), randn(BATCH, CLASSES)
    given = "magnitudes" if name == "sign_symmetry" else "feedback"
    rule = align_rules.RULES[name](network, **({given: feedback} if feedback else {}))
    move(network)

    output = rule(images)
    ((output - targets) ** 2).mean().backward()

    options = {"strides": CONVOLUTIONAL.get(kind, (1, 1, 1)), "ntk": parameterisation == "ntk"}
    weights = list(feedback.values()) if isinstance(feedback, dict) else feedback or []
    arrays = (
        images.movedim(1, -1).numpy(),
        targets.numpy(),
        parameters(network),
        theta0,
        [arranged(B) for B in weights],
    )
    assert_follows(network, output, worker.submit(reference_gradients, "Layered", options, name, *arrays).result())


@pytest.mark.parametrize("rule_name", ["backprop", *RECURRENT_OPTIONS])
def test_recurrent(rule_name, worker):
    network = randomise(networks.RecurrentNetwork(WIDTH, BATCH))
    sequences, targets = randn(BATCH, TIME), randn(BATCH, TIME)
    feedback = {name: B.abs() for name, B in layer_feedback(network).items()}
    name, theta0 = rule_name.split()[0], parameters(network)
    settings = dict(RECURRENT_OPTIONS.get(rule_name, {}))
    if name in ("fa", "kolen_pollack", "weight_mirror"):
        settings["feedback"] = feedback
    elif name == "sign_symmetry":
        settings["magnitudes"] = feedback
    rule = align_rules.RULES[name](network, **settings)
    move(network)

    output = rule(sequences)
    ((output - targets) ** 2).mean(0).sum().backward()

    options = {"corrected": not rule_name.endswith("published")}
    arrays = (sequences.numpy(), targets.numpy(), parameters(network), theta0, [arranged(B) for B in feedback.values()])
    assert_follows(network, output, worker.submit(reference_gradients, "Recurrent", options, name, *arrays).result())


@pytest.mark.parametrize("kind", [*CONVOLUTIONAL, "dense", "recurrent"])
def test_pairs_of_networks(kind, worker):
    """The normal network's gradient is backprop's, the align network's the initial one's at the normal one's error."""
    if kind == "recurrent":
        network = randomise(networks.RecurrentNetwork(WIDTH, BATCH))
        inputs, targets = randn(BATCH, TIME), randn(BATCH, TIME)
        pair, arranged_inputs = Pair(network, live=("initial_state",)), inputs.numpy()
    else:
        network, inputs, _ = image_network(kind, "ntk")
        pair, targets, arranged_inputs = Pair(network), randn(BATCH, CLASSES), inputs.movedim(1, -1).numpy()
    theta0 = parameters(network)
    move(pair.network)
    move(pair.align)
    if kind == "recurrent":
        theta0[0] = parameters(pair.align)[0]  # the state is an activity: the initial network starts from A's

    output = pair(inputs)
    squared = (output - targets) ** 2
    (squared.mean(0).sum() if kind == "recurrent" else squared.mean()).backward()

    options = {"strides": CONVOLUTIONAL.get(kind, (1, 1, 1)), "ntk": True}
    name, options = ("Recurrent", {}) if kind == "recurrent" else ("Layered", options)
    arrays = arranged_inputs, targets.numpy(), parameters(pair.network), theta0
    value, of_normal, of_align = worker.submit(reference_pair, name, options, *arrays).result()
    assert_follows(pair.network, output, (value, of_normal))
    assert_follows(pair.align, output, (value, of_align))
