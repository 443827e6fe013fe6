"""The alignment score: against explicit matrices, against the published estimate, and against the published figures."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from running import ROOT
from torch import Tensor
from torch.func import functional_call

from benchmarks.alignment_score import sampled_score
from wide.alignment import scores
from wide.models import networks

pytestmark = pytest.mark.quick

GOLDEN = ROOT / "tests" / "golden"
DOUBLE = {"dtype": torch.float64}


def convolution(kernel: int, inputs: int, outputs: int, stride: int) -> networks.Convolution:
    kind = type("Convolution", (networks.Convolution,), {"kernel": kernel})
    return kind(inputs, outputs, stride)


def changes(layer: torch.nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Two that are partly alike, so that scores spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    normal, other = (torch.randn(layer.weight.shape, generator=generator, **DOUBLE) for _ in range(2))
    return normal, normal + torch.rand(1, generator=generator, **DOUBLE) * 2 * other


def matrix(layer: torch.nn.Module, delta: Tensor, size: tuple[int, ...]) -> Tensor:
    """The layer with weight `delta`, as (entries of the output, entries of the input)."""
    inputs = torch.eye(layer.weight.shape[1] * math.prod(size), **DOUBLE)
    parameters = {"weight": delta, "bias": delta.new_zeros(len(delta))}
    outputs = functional_call(layer, parameters, inputs.unflatten(1, (layer.weight.shape[1], *size)))
    return outputs.flatten(1).T


def cosine(P: Tensor, Q: Tensor) -> float:
    return ((P * Q).sum() / (P.norm() * Q.norm())).item()


def by_matrices(layer: torch.nn.Module, deltas: tuple[Tensor, Tensor], size: tuple[int, ...]) -> float:
    V, A = (matrix(layer, delta, size) for delta in deltas)
    return cosine(V.T @ V, A.T @ A)


# ------------------------------------------------------------------------------------------------------- in closed form


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_a_convolution_scores_as_its_matrix_does(kernel, stride):
    sizes = [(1, 1), (2, 3), (5, 4), (6, 6), (7, 8)]
    channels = [(1, 4), (2, 2), (3, 1)]
    for seed, (size, (inputs, outputs)) in enumerate(itertools.product(sizes, channels)):
        layer = convolution(kernel, inputs, outputs, stride)
        deltas = changes(layer, seed)
        expected = by_matrices(layer, deltas, size)
        assert scores.exact_score(layer, *deltas, size) == pytest.approx(expected, abs=1e-12), (size, inputs)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_both_sides_of_a_convolution_give_the_same_traces(stride, size):
    layer = convolution(3, 3, 2, stride)
    normal, align = (delta.permute(2, 3, 0, 1) for delta in changes(layer, 0))
    rows, columns = (scores._coincidences(n, 3, stride) for n in size)
    by_inputs = scores._traces_by_inputs(normal, align, scores._shifts(rows, columns))
    shifts = scores._shifts(rows.transpose(1, 2), columns.transpose(1, 2))
    torch.testing.assert_close(scores._traces_by_outputs(normal, align, shifts), by_inputs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (3, 7), (5, 5), (1, 4)])
def test_a_dense_layer_scores_as_the_cosine_of_its_gram_matrices(inputs, outputs):
    layer = networks.Dense(inputs, outputs)
    V, A = deltas = changes(layer, 0)
    assert scores.exact_score(layer, *deltas) == pytest.approx(cosine(V.T @ V, A.T @ A), abs=1e-12)


def test_recurrent_weights_score_on_the_state():
    layer = networks.Recurrence(6)
    deltas = changes(layer, 0)
    dW_normal, dW_align = (delta.T for delta in deltas)  # of W_hh in s_t = s_{t-1} W_hh
    expected = cosine(dW_normal @ dW_normal.T, dW_align @ dW_align.T)
    other_side = cosine(dW_normal.T @ dW_normal, dW_align.T @ dW_align)
    assert abs(expected - other_side) > 1e-3
    assert scores.exact_score(layer, *deltas) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "dearer"), [(50, 2, "inputs"), (2, 50, "outputs")])
def test_the_products_are_formed_on_the_smaller_side(inputs, outputs, dearer, monkeypatch):
    monkeypatch.delattr(scores, f"_traces_by_{dearer}")
    layer = networks.Dense(inputs, outputs)
    assert scores.exact_score(layer, *changes(layer, 0)) is not None


@pytest.mark.parametrize("stride", [1, 2])
def test_single_precision_changes_lose_nothing(stride):
    layer = convolution(3, 16, 16, stride)
    deltas = tuple((1e-4 * delta).float() for delta in changes(layer, 0))
    found = scores.exact_score(layer, *deltas, (9, 9))
    assert found == pytest.approx(by_matrices(layer, tuple(d.double() for d in deltas), (9, 9)), abs=1e-12)


@pytest.mark.parametrize(
    ("layer", "size"),
    [(convolution(3, 2, 3, 1), (5, 5)), (convolution(3, 4, 3, 2), (6, 6)), (networks.Dense(4, 3), ())],
)
def test_the_score_ignores_factors_and_is_one_for_equal_changes(layer, size):
    normal, align = changes(layer, 1)
    score = scores.exact_score(layer, normal, align, size)
    assert 0.1 < score < 0.99
    assert scores.exact_score(layer, -1e-200 * normal, 1e200 * align, size) == pytest.approx(score, abs=1e-12)
    assert scores.exact_score(layer, normal, -3 * normal, size) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_published_estimate_agrees_within_three_standard_errors(stride, size, seeded):
    layer = convolution(3, 2, 4, stride)
    for seed in range(4):
        deltas = changes(layer, seed)
        found, error = sampled_score(layer, deltas, size, draws=100, batch=20)
        assert abs(found - scores.exact_score(layer, *deltas, size)) < 3 * error


# --------------------------------------------------------------------------------------------------- undefined or wrong


def test_a_change_that_does_nothing_or_is_not_finite_has_no_score():
    layer = convolution(3, 2, 2, 1)
    normal, _ = changes(layer, 0)
    border = normal.clone()
    border[:, :, 1, 1] = 0  # of a single pixel only the middle tap reads anything
    for align in (torch.zeros_like(normal), border, normal * math.nan, normal * math.inf, border * 1e300):
        assert scores.exact_score(layer, normal, align, (1, 1)) is None
        assert scores.exact_score(layer, align, normal, (1, 1)) is None
    assert scores.exact_score(layer, normal, normal, (1, 1)) is not None


def test_what_does_not_fit_is_refused():
    layer = convolution(3, 2, 2, 1)
    normal, align = changes(layer, 0)
    for size in ((), (4,), (4, 0)):
        with pytest.raises(ValueError, match="input size"):
            scores.exact_score(layer, normal, align, size)
    with pytest.raises(ValueError, match="input size"):
        scores.exact_score(networks.Dense(2, 2), torch.ones(2, 2), torch.ones(2, 2), (4, 4))
    with pytest.raises(ValueError, match="shape"):
        scores.exact_score(layer, normal, align[:1], (4, 4))
    with pytest.raises(TypeError, match="Conv2d"):
        scores.exact_score(torch.nn.Conv2d(2, 2, 3), normal, align, (4, 4))


# -------------------------------------------------------------------------------------- networks, and published figures


def test_input_sizes_are_what_the_layers_take_in():
    network = networks.ConvolutionalNetwork(1, 4, (1, 2, 4), 3)
    taken = {}
    for name, module in network.named_modules():
        if isinstance(module, (networks.Convolution, networks.Dense)):
            module.register_forward_hook(lambda _, inputs, __, name=name: taken.update({name: inputs[0].shape[2:]}))
    network(torch.rand(2, 1, 9, 6))
    assert scores.input_sizes(network, (9, 6)) == taken
    assert list(taken) == ["blocks.0.layer", "blocks.1.layer", "blocks.2.layer", "readout"]


@pytest.fixture(scope="module")
def published() -> dict[str, list[Tensor]]:
    """Weights of the three convolutions in our layout, by "network_epoch"."""
    with np.load(GOLDEN / "alignment_kmnist_params.npz") as stored:
        return {
            f"{network}_{epoch}": [
                torch.from_numpy(stored[f"{network}_{epoch}_{layer}_W"]).permute(3, 2, 0, 1) for layer in range(3)
            ]
            for network in ("normal", "align")
            for epoch in (0, 4)
        }


def published_scores(name: str) -> list[float]:
    """One per layer, averaged over the repeats."""
    figures = json.loads((GOLDEN / "alignment_kmnist.json").read_text())[name]
    return np.mean(figures, axis=0).tolist()


def score_kmnist(normal: list[Tensor], align: list[Tensor], initial: list[Tensor]) -> list[float]:
    network = networks.ConvolutionalNetwork(1, 8, (1, 2, 2), 10)
    sizes = scores.input_sizes(network, (28, 28))
    return [
        scores.exact_score(network.get_submodule(name), W - W0, A - W0, sizes[name])
        for name, W, A, W0 in zip(sizes, normal, align, initial, strict=False)
    ]


def test_published_scores(published):
    found = score_kmnist(published["normal_4"], published["align_4"], published["normal_0"])
    assert found == pytest.approx(published_scores("scores_3_repeats"), abs=1e-4)


def test_published_control(published):
    trained = published["normal_4"]
    found = score_kmnist(scores.shuffled(trained), published["align_4"], published["normal_0"])
    assert found == pytest.approx(published_scores("scores_randomized_3_repeats"), abs=1e-3)


def test_shuffling_keeps_entries_and_follows_the_seed():
    weights = [torch.randn(4, 3, 2, 2), torch.randn(5, 4)]
    kept = [weight.clone() for weight in weights]
    found, again, other = scores.shuffled(weights), scores.shuffled(weights), scores.shuffled(weights, seed=100)
    for k, weight in enumerate(weights):
        assert found[k].shape == weight.shape
        assert torch.equal(found[k].flatten().sort()[0], weight.flatten().sort()[0])
        assert torch.equal(found[k], again[k])
        assert not torch.equal(found[k], other[k])
        assert torch.equal(weight, kept[k])
