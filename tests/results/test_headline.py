"""The README's figure and table, and what networks are compared with in it."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wide.data.datasets import Split
from wide.results import baselines, headline, intervals, studies
from wide.results.settings import PLAIN
from wide.runs.run import Run


@pytest.fixture
def data():
    """Two kinds of images of four pixels, darker and lighter ones, that overlap."""
    stream = np.random.RandomState(0)

    def split(count):
        labels = stream.randint(0, 2, count)
        images = np.clip(stream.normal(90 + 70 * labels[:, None], 50, (count, 4)), 0, 255).astype(np.uint8)
        return Split(torch.from_numpy(images).view(count, 1, 2, 2), torch.from_numpy(labels))

    return SimpleNamespace(train=split(200), validation=split(100), test=split(100), classes=2, fingerprint="made-up")


def test_ridge_regression_by_hand(data):
    """Its normal equations, intercept and all, at the penalty that was chosen; better than guessing."""
    accuracy, penalty = baselines.best_ridge(data)
    inputs, test = (split.inputs.flatten(1).double().numpy() / 255 for split in (data.train, data.test))
    wanted = np.eye(2)[data.train.targets]
    rows = np.column_stack([inputs, np.ones(len(inputs))])
    penalties = np.diag([penalty * len(rows)] * 4 + [0])
    weights = np.linalg.solve(rows.T @ rows + penalties, rows.T @ wanted)
    outputs = np.column_stack([test, np.ones(len(test))]) @ weights
    assert accuracy == pytest.approx(100 * np.mean(outputs.argmax(1) == data.test.targets.numpy()))
    assert accuracy > 80


def test_the_nearest_neighbour_by_hand(data):
    inputs, test = (split.inputs.flatten(1).double().numpy() for split in (data.train, data.test))
    nearest = [np.argmin(((inputs - image) ** 2).sum(1)) for image in test]
    right = data.train.targets.numpy()[nearest] == data.test.targets.numpy()
    assert baselines.nearest(data) == pytest.approx(100 * right.mean())
    assert 50 < baselines.nearest(data) < 100


def test_baselines_are_read_as_they_were_written(data, tmp_path):
    rows = baselines.baselines(data)
    baselines.write(tmp_path / "some.csv", rows)
    assert baselines.read(tmp_path / "some.csv") == {row["baseline"]: row["test_accuracy"] for row in rows}
    assert rows[0] == {"baseline": "guessing", "test_accuracy": 50, "note": "", "data": "made-up"}


def runs(accuracy):
    """Finished runs of the headline's setting whose accuracy is that of (rule, width, seed)."""
    settings = {"dataset": "kmnist", "network": "mlp", "batch_size": 100}
    places = [
        (rule, width, seed) for rule in ("backprop", "align_ada", "fa") for width in (16, 64) for seed in (1, 2, 3)
    ]
    return [
        SimpleNamespace(
            run=(run := Run(rule=rule, width=width, seed=seed, learning_rate=studies.RATES[rule], **settings)),
            is_of=lambda fields, epochs, run=run: PLAIN.fields == fields,
            diverged=lambda epochs: False,
            rows=[{"test_accuracy": accuracy(rule, width, seed) / 100}] * PLAIN.epochs,
            data="some",
        )
        for rule, width, seed in places
    ]


def made_up(rule, width, seed):
    behind = {"backprop": 0, "align_ada": 160 / width, "fa": -2 if width == 16 else 5}[rule]
    return 60 + seed - behind - 0.1 * seed * (rule != "backprop")


def test_findings_say_which_side_of_backprop_a_rule_is_on():
    text = headline.findings(PLAIN, runs(made_up))
    assert text.startswith("**Fully connected, from width 16 to width 64: Align-ada goes from 10.2 [")
    _, low, high = intervals.of_mean([10.1, 10.2, 10.3])
    assert f"from 10.2 [{low:.1f}, {high:.1f}] behind to 2.7 [" in text
    assert "FA goes from 1.8 [1.6, 2.0] ahead to 5.2 [5.0, 5.4] behind**" in text
    assert "backprop's 62.0 % and 62.0 %; mean [95% interval] of 3 seeds" in text


def test_the_table():
    lines = headline.table(runs(made_up), {"guessing": 10.0}).splitlines()
    assert lines[2] == "| | width 16 | width 64 |"
    assert lines[4] == "| Backprop | 62.0 ± 1.0 (3) | 62.0 ± 1.0 (3) |"
    assert lines[-1].startswith("On the same images: guessing 10.0. ")


@pytest.mark.parametrize("plot", [headline.WIDTHS, headline.IMAGES])
@pytest.mark.parametrize("kept", [[], runs(made_up)], ids=["no runs", "runs"])
def test_the_figure_is_drawn(kept, plot):
    file = io.BytesIO()
    headline.draw(file, plot, kept, {"guessing": 10.0})
    assert file.getvalue().startswith(b"\x89PNG")
