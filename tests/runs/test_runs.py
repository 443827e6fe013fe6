"""One run's folder: resume, divergence, damage, and two processes at once."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparing import assert_same

from align_rules import gradient_angles
from wide import UserError
from wide.runs.checkpoints import pack_stream, unpack_stream
from wide.runs.files import append_rows
from wide.runs.folder import RunFolder
from wide.runs.locks import Busy
from wide.runs.run import Run, effective_batch
from wide.training.loop import Training
from wide.training.optimizers import OPTIMIZERS
from wide.training.recorders import Angles, Recorder
from wide.training.session import Thrift, train
from wide.training.tasks import AddTask

RUN = Run("add", "rnn", "align_ada", width=8, learning_rate=0.001, seed=99, batch_size=50, variant="published")


@pytest.fixture
def task():
    return AddTask("published", torch.device("cpu"))


def test_a_run_leaves_its_files(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    assert folder.status(3) == "missing"
    assert not folder.path.exists()
    train(task, folder, 3)
    assert folder.status(3) == "done"
    assert folder.metrics_path.read_text().splitlines()[0] == "epoch,train_loss,test_loss,seconds"
    config = folder.config()
    assert config["run"]["rule"] == "align_ada"
    assert config["run"]["data"] == "add-published"
    assert {"started", "device", "torch", "numpy", "commit"} <= config["sessions"][0].keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_longer_experiment_goes_on_where_a_shorter_one_stopped(task, tmp_path, optimizer):
    run = dataclasses.replace(RUN, optimizer=optimizer)
    whole, parts = RunFolder(tmp_path / "whole", run), RunFolder(tmp_path / "parts", run)
    train(task, whole, 4)
    train(task, parts, 1)
    assert parts.status(4) == "at epoch 1"
    train(task, parts, 4)
    assert_same(whole, parts)
    assert [session["from_epoch"] for session in parts.config()["sessions"]] == [0, 1]


def test_rows_without_a_checkpoint_are_trained_again(task, tmp_path):
    """As after a kill between a row and its checkpoint, with a last row that was cut off in writing."""
    whole, cut = RunFolder(tmp_path / "whole", RUN), RunFolder(tmp_path / "cut", RUN)
    train(task, whole, 4)
    train(task, cut, 2)
    with open(cut.metrics_path, "a") as file:
        file.write("3,1.25,1.5,0.1\n4,1.2")
    assert len(cut.rows()) == 3
    train(task, cut, 4)
    assert_same(whole, cut)


def angles(folder):
    return list(csv.DictReader((folder.path / Angles.file).read_text().splitlines()))


def test_angles_are_logged_and_change_nothing(task, tmp_path):
    plain, logged, cut = (RunFolder(tmp_path / name, RUN) for name in ("plain", "logged", "cut"))
    train(task, plain, 4)
    train(task, logged, 4, [Angles()])
    assert_same(plain, logged)
    assert not (plain.path / Angles.file).exists()
    assert plain.config()["run"] == logged.config()["run"]
    rows = angles(logged)
    assert [(row["epoch"], row["layer"]) for row in rows] == [
        (str(epoch), layer) for epoch in range(1, 5) for layer in ("input", "hidden", "readout")
    ]
    assert all(1 < float(row["degrees_to_backprop"]) < 180 for row in rows if row["layer"] == "hidden")
    assert all(float(row["degrees_to_backprop"]) < 0.1 for row in rows if row["layer"] == "readout")  # its own gradient
    feedback = [float(row["degrees_feedback_to_weight"]) for row in rows if row["layer"] == "hidden"]
    assert 0 < feedback[0] < feedback[1] < feedback[2] < feedback[3] < 10  # away from the start

    # As after a kill: rows of an epoch that no checkpoint covers, the last of them cut off.
    train(task, cut, 2, [Angles()])
    with open((cut.path / Angles.file), "a") as file:
        file.write("3,input,1.0,\n3,hid")
    train(task, cut, 4, [Angles()])
    assert (cut.path / Angles.file).read_text() == (logged.path / Angles.file).read_text()


def test_angles_from_the_middle_of_a_run(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    train(task, folder, 2, [Angles()])
    assert {row["epoch"] for row in angles(folder)} == {"2"}
    (folder.path / Angles.file).write_text("epoch,layer\nx,hidden\n")
    with pytest.raises(UserError, match=r"angles.csv is damaged"):
        train(task, folder, 3)


def test_angles_are_those_of_the_last_batch_before_its_update(task):
    recorder = Angles()
    training = Training(task, RUN, recorders=[recorder])
    training.train_epoch()
    again = Training(task, RUN)
    (order,) = again.shares(again.stream.permutation(len(task.splits["train"])))[-1]
    again.stream = np.random.RandomState(RUN.seed)
    last = len(task.splits["train"]) // RUN.batch_size
    for _ in zip(range(last - 1), again.steps(), strict=False):
        pass
    ((inputs, targets),) = task.batches(RUN, "train", [order], 0)
    again.rule.zero_grad()
    task.loss(again.rule(inputs), targets).backward()
    expected = gradient_angles(again.rule, lambda outputs: task.loss(outputs, targets), inputs)
    assert [row["degrees_to_backprop"] for row in recorder.rows] == list(expected.values())


class Slow(Recorder):
    """Takes its time, and columns and a file of its own."""

    told = ()  # in order
    now = 0.0  # seconds, on a clock that nothing else moves

    def start(self, training, folder):
        self.told += ("start",)

    def gradients(self, training, inputs, targets):
        assert any(parameter.grad is not None for parameter in training.rule.parameters())
        self.told += ("gradients",)
        self.now += 1

    def columns(self, training):
        self.told += ("columns",)
        self.now += 1
        return {"double": 2 * training.epoch}

    def epoch(self, training, folder):
        self.told += (f"epoch {training.epoch}",)
        append_rows(folder.path / "slow.csv", [{"epoch": training.epoch, "what": "ever"}])


def test_recorders_are_told_in_order_and_cost_no_seconds(task, tmp_path, monkeypatch):
    folder, slow = RunFolder(tmp_path, RUN), Slow()
    monkeypatch.setattr("wide.training.loop.time", SimpleNamespace(perf_counter=lambda: slow.now))
    train(task, folder, 2, [slow])
    assert slow.told == ("start", *("gradients", "columns", "epoch 1"), *("gradients", "columns", "epoch 2"))
    assert [row["double"] for row in folder.rows()] == [2, 4]
    assert [row["seconds"] for row in folder.rows()] == [0, 0]
    folder.keep(1)  # rows of a recorder go with those of the metrics
    assert (folder.path / "slow.csv").read_text() == "epoch,what\n1,ever\n"


def test_diverged_runs_stop_and_stay(task, tmp_path):
    folder = RunFolder(tmp_path, Run("add", "rnn", "backprop", 64, 10.0, 99, 50, variant="published"))
    train(task, folder, 50)
    rows = folder.rows()
    assert folder.status(50) == "diverged"
    assert len(rows) < 50
    assert not math.isfinite(rows[-1]["train_loss"])
    assert all(math.isfinite(row["train_loss"]) for row in rows[:-1])


def test_metrics_are_read_again_only_when_they_have_changed(tmp_path, monkeypatch):
    mine, theirs = RunFolder(tmp_path, RUN), RunFolder(tmp_path, RUN)
    reads, rows = [], RunFolder.rows
    monkeypatch.setattr(RunFolder, "rows", lambda folder: reads.append(folder) or rows(folder))
    assert mine.status(2) == "missing"
    theirs.path.mkdir(parents=True)
    theirs.append({"epoch": 1, "train_loss": 1.0})
    assert [mine.status(2) for _ in range(3)] == ["at epoch 1"] * 3
    assert len(reads) == 1
    theirs.append({"epoch": 2, "train_loss": math.nan})
    assert mine.status(2) == "diverged"
    theirs.keep(1)
    assert mine.progress() == (1, True)


def test_other_settings_or_data_in_the_folder(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    task.fingerprint = "other data"
    with pytest.raises(UserError, match="trained with data 'add-published' instead of 'other data'"):
        train(task, folder, 2)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_checkpoints_are_no_fresh_start(task, tmp_path, damage):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    if damage == "truncate":
        folder.checkpoint_path.write_bytes(folder.checkpoint_path.read_bytes()[:1000])
    else:
        folder.checkpoint_path.unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt .*delete"):
        train(task, folder, 2)
    assert len(folder.rows()) == 1


@pytest.mark.parametrize(
    "text",
    ["abc,def\n", "epoch,train_loss,test_loss,seconds\n1,1.5,x,0.1\n", "epoch,train_loss,test_loss,seconds\n2,1,1,1\n"],
)
def test_damaged_metrics(task, tmp_path, text):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    folder.metrics_path.write_text(text + "1,2,3,4\n" * text.startswith("abc"))
    with pytest.raises(UserError, match=r"metrics.csv is damaged .*delete"):
        folder.status(1)


def test_metrics_that_a_spreadsheet_has_saved(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    folder.metrics_path.write_text(folder.metrics_path.read_text(), encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"metrics.csv is damaged \(it begins with a byte order mark"):
        folder.status(1)


@pytest.mark.parametrize("kept", [2, 0])
def test_rows_that_a_checkpoint_covers_are_needed(task, tmp_path, kept):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 3)
    lines = folder.metrics_path.read_text().splitlines(keepends=True)
    folder.metrics_path.write_text("".join(lines[:kept]))
    with pytest.raises(UserError, match=r"rows up to epoch 3 are missing.*delete it, and training goes on"):
        train(task, folder, 5)


def test_a_run_without_its_config_is_not_continued(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    folder.config_path.unlink()
    with pytest.raises(UserError, match=r"config.json is damaged \(it is missing\)"):
        train(task, folder, 2)


def test_one_process_at_a_time(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    with folder.locked(), pytest.raises(Busy):
        train(task, folder, 1)
    train(task, folder, 1)
    assert folder.status(1) == "done"


def test_checkpoints_load_without_unpickling_code(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    state = torch.load(folder.checkpoint_path, weights_only=True)
    assert {"epoch", "rule", "optimizer", "stream", "run", "metrics", "digest"} == state.keys()
    assert any(name.startswith("initial.") for name in state["rule"])


def test_streams_survive_packing():
    stream = np.random.RandomState(5)
    stream.normal(size=3)  # leaves a second normal value cached
    copy = unpack_stream(pack_stream(stream))
    assert copy.normal() == stream.normal()
    assert (copy.permutation(100) == stream.permutation(100)).all()


@pytest.mark.parametrize(
    ("batch", "limit", "expected"), [(100, None, 100), (100, 45, 45), (100, 150, 50), (100, 450, 50), (100, 1500, 100)]
)
def test_batch_size_of_limited_data(batch, limit, expected):
    assert effective_batch(batch, limit) == expected


def test_names_tell_runs_apart():
    unusual = Run(
        "cifar", "mlp", "fa", 8, 0.5, 1, 50, data_limit=450, optimizer="adam", parameterisation="standard",
        precision="bf16",
    )  # fmt: skip
    assert unusual.name == "mlp-fa-width8-lr0.5-seed1-batch50-images450-standard-adam-bf16"
    assert RUN.name == "rnn-align_ada-width8-lr0.001-seed99-batch50-published"


def test_saving_takes_a_small_share_of_the_time():
    thrift = Thrift()
    assert thrift.due()
    thrift.cost, thrift.last = 1e6, 0.0
    assert not thrift.due()


@pytest.mark.parametrize(("learning_rate", "last"), [(0.001, 3), (10.0, 1)])
def test_the_last_epoch_has_its_checkpoint(task, tmp_path, monkeypatch, learning_rate, last):
    """However dear saving is: the last that is asked for, and the one in which a run diverges."""
    monkeypatch.setattr(Thrift, "due", lambda thrift: False)
    folder = RunFolder(tmp_path, dataclasses.replace(RUN, rule="backprop", width=64, learning_rate=learning_rate))
    train(task, folder, 3)
    assert len(folder.rows()) == last
    assert folder.load(torch.device("cpu"))["epoch"] == last


def test_metrics_are_written_at_full_precision(task, tmp_path):
    folder = RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    with open(folder.metrics_path) as file:
        row = next(csv.DictReader(file))
    assert float(row["test_loss"]) == folder.rows()[0]["test_loss"]
    assert len(row["test_loss"]) > 10
