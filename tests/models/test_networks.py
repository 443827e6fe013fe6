"""Sequences in several batches at once; half precision."""

import numpy as np
import pytest
import torch

from wide.models import networks
from wide.runs.run import Run
from wide.training.loop import Training
from wide.training.tasks import AddTask

pytestmark = pytest.mark.quick

TIME, BATCH, WIDTH = 7, 5, 6


def recurrent_network(dtype=torch.float32):
    torch.manual_seed(0)
    network = networks.RecurrentNetwork(WIDTH, BATCH).to(dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


def test_batches_of_sequences_at_once():
    network, sequences = recurrent_network(torch.float64), torch.rand(3 * BATCH, TIME, dtype=torch.float64)
    alone = torch.cat([network(batch) for batch in sequences.split(BATCH)])
    torch.testing.assert_close(network(sequences), alone)


def test_evaluation_of_batches_at_once(monkeypatch):
    training = Training(
        AddTask("published", torch.device("cpu")), Run("add", "rnn", "backprop", 8, 0.001, 99, 50, variant="published")
    )
    order = np.random.RandomState(0).permutation(300)[:275]  # the last half of a batch is left out
    together = training.evaluate("train", order)
    monkeypatch.setattr(AddTask, "evaluated_together", 1)
    assert together == pytest.approx(training.evaluate("train", order), rel=1e-6)


def test_statistics_of_half_precision_are_in_single():
    """Far from zero a mean in bf16 would be off by more than the result's own rounding."""
    torch.manual_seed(0)
    activity = (torch.randn(100, 50) + 3).bfloat16()
    exact = activity.double()
    exact = (exact - exact.mean(0)) / (exact.var(0, correction=0) + networks.BatchNormalisation.epsilon).sqrt()
    error = (networks.BatchNormalisation()(activity) - exact).abs()
    assert error.max() <= (exact.bfloat16() - exact).abs().max() * 1.01


def test_activities_stay_in_bf16_and_weights_in_single_precision():
    network, seen = networks.ConvolutionalNetwork(3, 8, (1, 2), 4), []
    for block in network.blocks:
        for part in block:
            part.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(torch.rand(6, 3, 8, 8))
    output.float().square().mean().backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 6
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
