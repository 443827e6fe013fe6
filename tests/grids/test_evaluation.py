"""--evaluate: metrics.csv is measured anew from what runs kept, with the batches of their own stream."""

import math
import shutil

import pytest
import torch
from running import script
from small_data import made_up, write_kmnist

import train_kmnist
from wide.grids.evaluation import Comparison, replay, restored
from wide.options import DataOptions
from wide.runs.checkpoints import DIGEST, sealed
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.session import Schedule, train
from wide.training.tasks import AddTask

RULES = ["backprop", "align_ada", "weight_mirror"]
ADD = Run("add", "rnn", "backprop", 8, 0.001, 99, 50, variant="published")
NAME = "cnn-{}-width4-lr1-seed99-batch20"


def options(kmnist, outputs, *more):
    return ["--widths", 4, "--learning-rates", 1, "--batch-size", 20, "--data-dir", kmnist, "--outputs", outputs, *more]


@pytest.fixture(scope="module")
def finished(kmnist, tmp_path_factory):
    """Outputs with three runs of three epochs."""
    outputs = tmp_path_factory.mktemp("outputs")
    done = script("train_kmnist.py", 1, *options(kmnist, outputs, "--rules", *RULES, "--epochs", 3))
    assert done.returncode == 0, done.stderr
    return outputs


@pytest.fixture
def outputs(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "outputs")


def evaluated(kmnist, outputs, *more):
    return script("train_kmnist.py", 1, *options(kmnist, outputs, "--rules", *RULES, "--evaluate", *more))


def test_finished_runs_are_met_exactly(kmnist, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = evaluated(kmnist, finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| agrees exactly |") == 2 * len(RULES)
    assert "3 of 3 runs measured, 0 of them not as recorded" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_evaluated_now_and_then_it_trains_the_same(kmnist, finished, tmp_path):
    """Also when it is stopped and goes on; what is not evaluated stays empty, and is never shown as a result."""
    rule = ["--rules", "align_ada", "--evaluate-every", 2]
    for epochs in (1, 4, 5):
        done = script("train_kmnist.py", 1, *options(kmnist, tmp_path, *rule, "--epochs", epochs))
        assert done.returncode == 0, done.stderr
    run = Run("kmnist", "cnn", "align_ada", 4, 1.0, 99, 20)
    sparse, full = RunFolder(tmp_path, run), RunFolder(tmp_path / "full", run)
    shutil.copytree(RunFolder(finished, run).path, full.path)
    every = script("train_kmnist.py", 1, *options(kmnist, tmp_path / "full", "--rules", "align_ada", "--epochs", 5))
    assert every.returncode == 0, every.stderr
    measured = ("validation_accuracy", "test_accuracy")
    for mine, other in zip(sparse.rows(), full.rows(), strict=True):
        for name in mine.keys() - {"seconds"}:
            empty = name in measured and mine["epoch"] == 3
            assert mine[name] == (None if empty else other[name])
    assert_same_parameters(sparse, full)
    assert table(done) == table(every)
    early = script("train_kmnist.py", 1, *options(kmnist, tmp_path, *rule, "--epochs", 3))
    assert early.returncode == 2
    assert early.stderr.count("\n") == 1
    assert "after epoch 3, as --evaluate-every leaves it; ask for --epochs 2 or 4 or 5" in early.stderr
    again = script("train_kmnist.py", 1, *options(kmnist, tmp_path, "--rules", "align_ada", "--evaluate"))
    assert again.stdout.count("| agrees exactly |") == 2


def assert_same_parameters(mine, other):
    mine, other = (folder.load(torch.device("cpu"))["rule"] for folder in (mine, other))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def table(done):
    return [line for line in done.stdout.splitlines() if line.startswith("| ")]


def test_a_run_that_diverges_is_evaluated(kmnist, tmp_path):
    given = ["--rules", "backprop", "--learning-rates", 1e9, "--epochs", 5, "--evaluate-every", 5]
    done = script("train_kmnist.py", 1, *options(kmnist, tmp_path, *given))
    assert done.returncode == 0, done.stderr
    rows = RunFolder(tmp_path, Run("kmnist", "cnn", "backprop", 4, 1e9, 99, 20)).rows()
    assert len(rows) < 5
    assert not math.isfinite(rows[-1]["train_loss"])
    assert rows[-1]["test_accuracy"] is not None
    assert "diverged" in done.stdout


def test_where_each_epoch_counts_each_is_evaluated(tmp_path):
    assert script("train_add.py", 1, "--evaluate-every", 2, "--outputs", tmp_path).returncode == 2
    train(AddTask("published", torch.device("cpu")), folder := RunFolder(tmp_path, ADD), Schedule(2, 2))
    assert all(row["test_loss"] is not None for row in folder.rows())


def change(path):
    """Another test accuracy in the last row of a metrics.csv; returns its text."""
    *first, last = path.read_text().splitlines()
    fields = last.split(",")
    fields[4] = str(float(fields[4]) + 0.01)
    path.write_text("\n".join([*first, ",".join(fields), ""]))
    return path.read_text()


def test_a_changed_number_is_told(kmnist, outputs):
    change(outputs / "kmnist" / NAME.format("align_ada") / "metrics.csv")
    done = evaluated(kmnist, outputs)
    assert done.returncode == 1
    assert "its rows are not those that checkpoint.pt was saved with" in done.stderr
    assert done.stderr.count("failed") == 1
    assert done.stdout.count("| agrees exactly |") == 2 * (len(RULES) - 1)


def test_a_number_changed_in_the_checkpoint_too_is_told(kmnist, outputs):
    folder = outputs / "kmnist" / NAME.format("align_ada")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint[DIGEST]
    checkpoint["metrics"] = change(folder / "metrics.csv")
    torch.save(sealed(checkpoint), folder / "checkpoint.pt")
    done = evaluated(kmnist, outputs)
    assert done.returncode == 1
    assert done.stdout.count("DIFFERS") == 1
    assert "it differs from metrics.csv in test_accuracy" in done.stderr
    assert done.stderr.count("failed") == 1


def test_what_is_not_kept_and_other_data(kmnist, outputs, tmp_path):
    (outputs / "kmnist" / NAME.format("backprop") / "checkpoint.pt").unlink()
    shutil.rmtree(outputs / "kmnist" / NAME.format("align_ada"))
    write_kmnist(tmp_path, *made_up(300, (28, 28), seed=3), *made_up(60, (28, 28), seed=4))
    done = evaluated(tmp_path, outputs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("backprop" in line and "not kept" in line for line in lines)
    assert any("align_ada" in line and "missing" in line for line in lines)
    assert sum("weight_mirror" in line and "other data" in line for line in lines) == 2
    assert "agrees" not in done.stdout


def test_nothing_to_measure_is_an_error(kmnist, tmp_path):
    done = evaluated(kmnist, tmp_path)
    assert done.returncode == 2
    assert "none of 3 runs has a checkpoint" in done.stderr


def test_the_replayed_stream_is_the_runs(kmnist, finished):
    """At the evaluations' end it stands where the run's own stood; another seed's does not."""
    folder = RunFolder(finished, Run("kmnist", "cnn", "backprop", 4, 1.0, 99, 20))
    training = restored(train_kmnist.SUBJECT.task(DataOptions(kmnist), torch.device("cpu")), folder)
    after = training.stream.get_state()
    replay(training)
    assert training.epoch == 3
    assert training.evaluations().keys() >= {"validation_accuracy", "test_accuracy"}
    assert (training.stream.get_state()[1] == after[1]).all()
    assert training.stream.get_state()[2] == after[2]


def test_add_and_kept_parameters_of_a_pair(tmp_path):
    small = ["--widths", 4, "--outputs", tmp_path]
    for name in ("train_add.py", "alignment_add.py"):
        assert script(name, 1, *small, "--epochs", 2, *(["--keep-parameters", 0, 2] * (name[0] == "a"))).returncode == 0
    done = script("train_add.py", 1, *small, "--evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees exactly") == 8  # four rules, two losses
    for path in tmp_path.rglob("checkpoint.pt"):
        path.unlink()
    done = script("alignment_add.py", 1, *small, "--evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees exactly") == 4  # two losses, score and control
    assert script("train_add.py", 1, *small, "--evaluate").returncode == 2


@pytest.mark.parametrize(
    ("metric", "recorded", "measured", "agrees"),
    [
        ("test_accuracy", 0.5, 0.5009, True),
        ("test_accuracy", 0.5, 0.5011, False),
        ("test_loss", 1000.0, 1000.9, True),
        ("test_loss", 0.1, 0.1009, False),
        ("test_loss", float("nan"), float("nan"), True),
        ("test_loss", 1.0, float("nan"), False),
    ],
)
def test_tolerance(metric, recorded, measured, agrees):
    assert Comparison(metric, recorded, measured, 0.001).agrees == agrees
