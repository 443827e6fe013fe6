"""--centred: the outputs are f - f0, with every rule; all else is the rule's own."""

import copy
import csv
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_kmnist
from align_rules import RULES
from wide.command_line import main
from wide.grids.evaluation import restored
from wide.models.rules import RULES as SPECS
from wide.options import DataOptions
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.loop import Training
from wide.training.recorders import Angles
from wide.training.session import train

RUN = Run("kmnist", "mlp", "backprop", width=8, learning_rate=2.0, seed=99, batch_size=20, data_limit=20, centred=True)


def of(rule):
    return dataclasses.replace(RUN, rule=rule, **SPECS[rule].settings)


@pytest.fixture
def task(kmnist):
    return train_kmnist.SUBJECT.task(DataOptions(kmnist), torch.device("cpu"))


def one_batch(task):
    return next(task.batches(RUN, "train", [np.arange(20)], epoch=0))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_rules_own_with_the_initial_outputs_added_to_what_is_wanted(rule, task, seeded):
    """(f - f0) - y is f - (y + f0), far from the initial parameters too."""
    training, plain = (Training(task, run) for run in (of(rule), of(rule)))
    start = copy.deepcopy(plain.rule.network)
    for parameter in training.rule.network.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    plain.rule.load_state_dict(training.rule.state_dict())
    inputs, targets = one_batch(task)
    outputs, _, loss = training.update([(inputs, targets)])
    given, before = plain.rule(inputs), start(inputs).detach()
    wanted = F.one_hot(targets, 10) - 0.1 + before
    F.mse_loss(given, wanted).backward()
    torch.testing.assert_close(outputs, given.detach() - before)
    torch.testing.assert_close(loss, F.mse_loss(given, wanted).detach())
    for name, mine in training.rule.named_parameters():
        other = plain.rule.get_parameter(name).grad
        assert (mine.grad is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine.grad, other, rtol=1e-4, atol=1e-6)


def test_the_last_layer_in_closed_form(task, tmp_path):
    """Where features stay, f - f0 = features D^T, and D goes from zero down the gradient of the mean squared error.

    Stopped in between: f0 is the initial function still.
    """
    run = of("last_layer")
    for epochs in (1, 4):
        train(task, folder := RunFolder(tmp_path, run), epochs)
    inputs, targets = one_batch(task)
    with torch.no_grad():
        activities = task.rule(run).network.blocks(inputs.flatten(1)).double() / np.sqrt(run.width)
    features = torch.cat([activities, torch.ones(20, 1)], 1)  # the last: of the bias
    wanted = F.one_hot(targets, 10) - 0.1
    changes, losses = torch.zeros(10, run.width + 1, dtype=torch.double), []
    for _ in range(5):
        error = features @ changes.T - wanted
        losses.append(error.square().mean().item())
        changes -= run.learning_rate * 2 / error.numel() * error.T @ features
    assert losses[0] == pytest.approx(0.09)
    assert losses[4] < 0.95 * losses[0]
    measured = restored(task, folder).evaluate("train", np.arange(20))["loss"]
    assert [*(row["train_loss"] for row in folder.rows()), measured] == pytest.approx(losses, rel=1e-4)


def test_backprops_angle_to_itself_is_zero(task, tmp_path):
    train(task, folder := RunFolder(tmp_path, RUN), 3, [Angles()])
    rows = csv.DictReader((folder.path / Angles.file).read_text().splitlines())
    assert [float(row["degrees_to_backprop"]) for row in rows] == pytest.approx([0] * 12, abs=0.01)


def test_runs_of_both_kinds_stand_beside_each_other(kmnist, tmp_path, capsys):
    line = ["1", "--network", "mlp", "--rules", "align_zero", "--widths", "8", "--learning-rates", "2"]
    line += ["--batch-size", "20", "--epochs", "2"]

    def printed(*more):
        places = ["--data-dir", str(kmnist), "--outputs", str(tmp_path)]
        assert main("", train_kmnist.SUBJECT, train_kmnist.EXPERIMENTS, [*line, *places, *more]) == 0
        return capsys.readouterr().out

    printed()
    assert "# KMNIST: accuracy against width (fully connected, centred outputs)" in printed("--centred")
    plain, centred = sorted(tmp_path.glob("kmnist/mlp*"))
    assert centred.name == f"{plain.name}-centred"
    assert "centred" not in (plain / "config.json").read_text()
    assert (plain / "metrics.csv").read_text() != (centred / "metrics.csv").read_text()
    assert printed("--centred", "--evaluate").count("| agrees exactly |") == 2
