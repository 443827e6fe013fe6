"""changes.csv, and the experiment that shows distance from theory against width."""

import csv
import dataclasses
import math

import pytest
import torch
from running import script
from torch import nn

import train_kmnist
from wide.options import DataOptions
from wide.reports.distance_report import ANGLE, WEIGHT, Distance, make_lines, predicted_slope, read_distances
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.gaps import Gaps
from wide.training.loop import Training
from wide.training.recorders import layer_inputs, relative_change
from wide.training.session import train


def test_relative_change():
    before = torch.tensor([3.0, 4.0])
    assert relative_change(torch.tensor([3.0, 5.0]), before) == pytest.approx(0.2)
    assert relative_change(before, before) == 0
    assert relative_change(None, before) is None
    assert relative_change(before, torch.zeros(2)) is None


def test_layer_inputs():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3)
    found = layer_inputs(network, inputs)
    assert list(found) == ["2"]  # the first layer reads the inputs themselves
    assert torch.equal(found["2"], network[:2](inputs))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_slopes_are_of_logarithms():
    distances = [Distance("align_ada", w, s, WEIGHT, "blocks.1", (1 + s) * 3 / w) for w in (8, 16, 64) for s in (0, 1)]
    line = make_lines(distances)[WEIGHT, "blocks.1", "align_ada"]
    assert line.slope == pytest.approx(-1)
    assert line.means == pytest.approx([18**0.5 / width for width in (8, 16, 64)])
    assert line.deviations == pytest.approx([math.exp(math.log(2) / math.sqrt(2))] * 3)
    assert line.counts == (2, 2, 2)
    assert predicted_slope(WEIGHT, "blocks.1", ("blocks.0", "blocks.1", "readout")) == -1
    assert predicted_slope(WEIGHT, "blocks.0", ("blocks.0", "blocks.1", "readout")) == -0.5
    assert predicted_slope(ANGLE, "blocks.1", ("blocks.0", "blocks.1", "readout")) == -0.5


def test_the_experiment(kmnist, tmp_path, monkeypatch):
    options = ["--widths", 4, 8, 16, "--data-limits", 100, "--epochs", 2, "--data-dir", kmnist, "--outputs", tmp_path]
    done = script("train_kmnist.py", 3, *options, "--rules", "backprop", "align_ada", "fa")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "after 3 updates" in done.stdout
    rows = list(csv.DictReader((tmp_path / "kmnist" / "experiment_3.csv").read_text().splitlines()))
    assert {row["rule"] for row in rows if row["quantity"] == ANGLE} == {"align_ada", "fa"}  # backprop's are zero
    assert all(float(row["value"]) > 0 for row in rows)
    assert (tmp_path / "kmnist" / "experiment_3.png").stat().st_size > 20_000
    folder = RunFolder(tmp_path, Run("kmnist", "cnn", "backprop", 4, 5.0, 99, 50, data_limit=100))
    recorded = csv.DictReader((folder.path / "changes.csv").read_text().splitlines())
    recorded = [row for row in recorded if row["epoch"] == "2"]  # which is shown, and not the first
    layers = [row["layer"] for row in recorded]
    assert layers == ["blocks.0.layer", "blocks.1.layer", "blocks.2.layer", "readout"]
    assert [row["relative_activity_change"] == "" for row in recorded] == [True, False, False, False]
    shown = [float(r["value"]) for r in rows if (r["rule"], r["width"], r["quantity"]) == ("backprop", "4", WEIGHT)]
    assert shown == [float(row["relative_weight_change"]) for row in recorded]
    assert all(value > 0 for value in shown)


def test_distances_of_outputs_are_from_backprops_network_of_the_same_seed(kmnist, tmp_path):
    """By an ordinary run of backprop beside; also where the run was interrupted before."""
    run = Run("kmnist", "mlp", "fa", 8, 2.0, 99, 50, data_limit=100)
    task = train_kmnist.SUBJECT.task(DataOptions(kmnist), torch.device("cpu"))
    for epochs in (1, 3):
        train(task, folder := RunFolder(tmp_path, run), epochs, [Gaps([2, 3])])
    mine, other = Training(task, run), Training(task, dataclasses.replace(run, rule="backprop"))
    expected = []
    for _ in range(3):
        for training in (mine, other):
            training.train_epoch()
        images = task.splits["test"].inputs[:50] / 255  # of 60 what makes a whole batch
        expected.append((mine.rule(images) - other.rule(images)).square().mean().item())
    rows = list(csv.DictReader((folder.path / "gaps.csv").read_text().splitlines()))
    assert [(row["epoch"], row["updates"]) for row in rows] == [("2", "4"), ("3", "6")]
    assert [float(row["mean_squared_gap"]) for row in rows] == pytest.approx(expected[1:], rel=1e-4)
    assert expected[1] > 1e-4
    found = {d.layer: d.value for d in read_distances(folder, 2)}
    assert found == {"after 4 updates": pytest.approx(expected[1], rel=1e-4)}


def test_the_experiment_on_outputs(kmnist, tmp_path):
    options = ["--network", "mlp", "--widths", 4, 8, 16, "--rules", "align_ada", "--epochs", 10]
    done = script("train_kmnist.py", 4, *options, "--data-dir", kmnist, "--outputs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| after 10 updates | Align-ada |" in done.stdout
    assert "| after 100 updates" not in done.stdout
    assert (tmp_path / "kmnist" / "experiment_4.png").stat().st_size > 20_000
