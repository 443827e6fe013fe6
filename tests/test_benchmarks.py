"""The benchmark of steps: what it counts, extrapolates and writes."""

import csv
import importlib.util
import math

import pytest
import torch
from running import script

from benchmarks import steps
from wide.models.rules import RULES


def test_products_by_hand():
    """A first block of 3 to w channels at 32 x 32 and six of w to w channels, then the readout."""
    width, positions = 4, [32**2, 32**2, 16**2, 16**2, 8**2, 8**2]
    first, between = 9 * 3 * width * 32**2, 9 * width**2 * sum(positions)
    readout = 10 * width
    forward, errors, weights = steps.operations("cifar", width, torch.device("cpu"))
    assert forward == weights == 2 * 100 * (first + between + readout)
    assert errors == 2 * 100 * (between + readout)  # the images get none


def test_every_rule_of_the_experiments_has_its_products():
    assert {rule for dataset in steps.SCRIPTS for rule in steps.rules(dataset)} <= steps.PRODUCTS.keys()
    assert steps.PRODUCTS.keys() - {steps.EVALUATION} <= RULES.keys()


@pytest.mark.parametrize(("width", "expected"), [(8, 2.0), (16, 4.0), (32, 8.0), (128, 128.0), (4, 1.0)])
def test_times_between_and_beyond_measured_widths(width, expected):
    assert steps.at_width({8: 2.0, 32: 8.0, 64: 32.0}, width) == pytest.approx(expected)


def test_hours_of_an_experiment():
    """Ten widths, 40 runs of 200 epochs of 6 steps and 8 evaluated batches, all of a second."""
    rows = [
        {"dataset": "add", "precision": "fp32", "rule": rule, "width": width, "ms": 1000.0}
        for rule in [*steps.rules("add"), steps.EVALUATION]
        for width in (8, 64)
    ]
    assert f"| 40 | {40 * 200 * (6 + 8) / 3600:.3g} |" in steps.hours(rows, "fp32")


def test_the_benchmark_runs(tmp_path):
    output = tmp_path / "new" / "steps"
    arguments = ["--datasets", "add", "kmnist", "--widths", 4, 8, "--recurrent-widths", 4, "--rounds", 2]
    done = script("benchmarks/steps.py", *arguments, "--rules", "backprop", "dfa", "--output", output)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    places = [(row["dataset"], row["width"], row["rule"]) for row in rows]
    kmnist = [("kmnist", width, rule) for width in ("4", "8") for rule in ("backprop", "dfa", "evaluation")]
    assert places == [("add", "4", "backprop"), ("add", "4", "evaluation"), *kmnist]
    assert all(float(row["ms"]) > 0 and math.isfinite(float(row["floor_ms"])) for row in rows)
    assert [float(row["x_backprop"]) for row in rows if row["rule"] == "backprop"] == [1, 1, 1]
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_the_same_steps_in_tensorflow():
    tensorflow = steps.Neighbour("tensorflow_steps.py", threads=1)
    for rule in ("align_ada", "dfa"):  # the Add task: below
        step = steps.Step(steps.Setting("kmnist", rule, 4, "fp32"), torch.device("cpu"))
        assert tensorflow.seconds(steps.request(step)) > 0
    tensorflow.close()


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_a_whole_training_runs():
    arguments = ["--rules", "align_ada", "--widths", 4, "--epochs", 2, "--rounds", 1]
    done = script("benchmarks/whole_training.py", *arguments)
    assert done.returncode == 0, done.stderr
    _, _, mine, other, ratio = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("| ").split("|")]
    assert float(ratio) == pytest.approx(float(mine) / float(other), abs=0.1)
