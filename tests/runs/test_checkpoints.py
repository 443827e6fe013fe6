"""What a run owes and has: done means all of it; a checkpoint is the run's own, of its epoch, and unchanged."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from comparing import assert_same, parameters, without_seconds

from wide import UserError
from wide.alignment.parameters import kept_pair
from wide.runs.checkpoints import digest, sealed
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.recorders import Angles, KeptParameters
from wide.training.session import Thrift, train
from wide.training.tasks import AddTask

CPU = torch.device("cpu")
RUN = Run("add", "rnn", "align_ada", width=8, learning_rate=0.001, seed=99, batch_size=50, variant="published")
PAIR = Run("add", "rnn", "pair", width=8, learning_rate=0.001, seed=99, batch_size=50, variant="published")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def task():
    return AddTask("published", CPU)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """Three epochs of a run, with angles and parameters after each."""
    outputs = tmp_path_factory.mktemp("trained")
    train(task, RunFolder(outputs, RUN), 3, recorders())
    return outputs


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it."""
    return RunFolder(shutil.copytree(trained, tmp_path / "copy"), RUN)


def recorders():
    return [Angles(), KeptParameters(range(10))]


def files(folder):
    """What it holds by name, without times."""
    found = {path.name: path.read_text() for path in folder.path.glob("*.csv") if path != folder.metrics_path}
    kept = {path.name: digest(torch.load(path)["parameters"]) for path in sorted(folder.path.glob("parameters/*"))}
    assert {path.name for path in folder.path.iterdir() if path.name.startswith(".")} <= {".lock"}
    return found, kept, without_seconds(folder)


# The writes of an epoch, in the order in which a run makes them.
WRITES = ["wide.training.recorders.append_rows", "save_parameters", "save", "append"]
MOMENTS = [*((write, after, True) for write in WRITES for after in (False, True)), ("save", True, False)]


@pytest.mark.parametrize(("write", "after", "last"), MOMENTS)
def test_killed_at_any_write_a_run_ends_with_all_that_it_owes(task, tmp_path, monkeypatch, write, after, last):
    whole, killed = RunFolder(tmp_path / "whole", RUN), RunFolder(tmp_path / "killed", RUN)
    train(task, whole, 3, recorders())
    doomed = 3 if last else 2
    monkeypatch.setattr(Thrift, "due", lambda thrift: True)
    name = write if "." in write else f"wide.runs.folder.RunFolder.{write}"
    original, calls = _resolve(name), []

    def kill(*arguments):
        calls.append(arguments)
        dies = len(calls) == doomed + (write in ("save", "save_parameters"))  # which are called before the first epoch
        if dies and not after:
            raise Killed
        original(*arguments)
        if dies:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(name, kill)
        with pytest.raises(Killed):
            train(task, killed, 3, recorders())
    done = killed.status(3) == "done"
    assert done == (last and write == "append" and after)
    if not done:
        train(task, killed, 3, recorders())
    assert killed.status(3) == "done"
    assert files(killed) == files(whole)
    assert_same(whole, killed)


def _resolve(name):
    module, _, attribute = name.rpartition(".")
    return pytest.importorskip(module).__dict__[attribute] if "RunFolder" not in name else getattr(RunFolder, attribute)


def test_a_run_killed_between_a_last_checkpoint_that_diverged_and_its_row(task, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, Run("add", "rnn", "backprop", 64, 10.0, 99, 50, variant="published"))
    append = RunFolder.append

    def kill(self, row):
        if not math.isfinite(row["train_loss"]):
            raise Killed
        append(self, row)

    monkeypatch.setattr(RunFolder, "append", kill)
    with pytest.raises(Killed):
        train(task, folder, 50)
    assert folder.status(50) != "diverged"
    epochs = len(folder.rows())
    monkeypatch.setattr(RunFolder, "append", append)
    train(task, folder, 50)
    assert folder.status(50) == "diverged"
    assert len(folder.rows()) == epochs + 1


def test_rows_are_read_from_the_checkpoint_where_metrics_are_gone(task, trained, folder):
    before = without_seconds(folder)
    folder.metrics_path.unlink()
    train(task, folder, 3)
    assert without_seconds(folder) == before


def test_a_finished_run_needs_no_checkpoint(task, folder):
    folder.checkpoint_path.unlink()
    assert folder.status(3) == "done"
    with pytest.raises(UserError, match=r"no checkpoint\.pt to go on from"):
        train(task, folder, 4)
    assert len(folder.rows()) == 3


# ------------------------------------------------------------------------------------------------------ whose it is


def legacy(folder):
    """As earlier versions left a run: a checkpoint and parameters that do not say whose they are."""
    state = torch.load(folder.checkpoint_path)
    torch.save({name: state[name] for name in ("epoch", "rule", "optimizer", "stream")}, folder.checkpoint_path)
    for path in folder.path.glob("parameters/*"):
        torch.save(torch.load(path)["parameters"], path)
    config = json.loads(folder.config_path.read_text())
    del config["format"]
    folder.config_path.write_text(json.dumps(config))


def test_runs_of_earlier_versions_go_on(task, trained, folder, tmp_path):
    legacy(folder)
    whole = RunFolder(tmp_path / "whole", RUN)
    train(task, whole, 5, recorders())
    train(task, folder, 5, recorders())
    assert_same(whole, folder)
    assert torch.load(folder.checkpoint_path)["run"]["rule"] == "align_ada"
    assert folder.config()["format"] == 2


def test_parameters_of_earlier_versions_are_scored(task, tmp_path):
    folder = RunFolder(tmp_path, PAIR)
    train(task, folder, 1, [KeptParameters((0, 1))])
    _, before = kept_pair(folder, 1, ())
    legacy(folder)
    _, now = kept_pair(folder, 1, ())
    assert digest(before.align) == digest(now.align)


def other(task, tmp_path, **changes):
    """The checkpoint of another run."""
    folder = RunFolder(tmp_path / "other", Run(**{**vars(RUN), **changes}))
    train(task, folder, 3)
    return folder.checkpoint_path


def refused(task, folder, match):
    before = folder.metrics_path.read_bytes()
    with pytest.raises(UserError, match=match) as error:
        train(task, folder, 5)
    assert "\n" not in str(error.value)
    assert "delete" in str(error.value)
    assert folder.metrics_path.read_bytes() == before
    return str(error.value)


@pytest.mark.parametrize("change", [{"seed": 5}, {"learning_rate": 0.002}, {"rule": "align_zero"}])
def test_the_checkpoint_of_another_run(task, folder, tmp_path, change):
    shutil.copy(other(task, tmp_path, **change), folder.checkpoint_path)
    message = refused(task, folder, "it belongs to another run")
    assert next(iter(change)) in message
    # Nor one of an earlier version, which does not say whose it is.
    state = torch.load(folder.checkpoint_path)
    torch.save({name: state[name] for name in ("epoch", "rule", "optimizer", "stream")}, folder.checkpoint_path)
    refused(task, folder, "does not say which run it belongs to")


def test_the_checkpoint_of_an_earlier_epoch_leads_to_the_same_numbers(task, trained, folder, tmp_path):
    """The rows after it are trained again."""
    early, whole = RunFolder(tmp_path / "early", RUN), RunFolder(tmp_path / "whole", RUN)
    train(task, early, 2, recorders())
    train(task, whole, 5, recorders())
    rows = early.metrics_path.read_text()
    train(task, early, 4, recorders())
    shutil.copy(folder.checkpoint_path, early.checkpoint_path)
    refused(task, early, "its rows are not those that checkpoint.pt was saved with")  # other seconds, another session
    assert early.metrics_path.read_text().startswith(rows)
    shutil.rmtree(early.path)
    train(task, early, 2, recorders())
    checkpoint = early.checkpoint_path.read_bytes()
    train(task, early, 4, recorders())
    early.checkpoint_path.write_bytes(checkpoint)
    train(task, early, 5, recorders())
    assert files(early) == files(whole)


def changed(path, change, seal=True):
    """A checkpoint with something else in it, with a digest to match."""
    state = torch.load(path)
    state.pop("digest", None)
    change(state)
    torch.save(sealed(state) if seal else state, path)


def put(*place):
    *outer, last, value = place

    def change(state):
        for name in outer:
            state = state[name]
        state[last] = value

    return change


# Content that no run writes; each with a digest that agrees, as if a program had written it.
WRONG = {
    "an epoch that is a text": (put("epoch", "3"), "its epoch is '3'"),
    "an epoch that is a tensor": (put("epoch", torch.tensor(3)), "its epoch is tensor"),
    "an epoch that is true": (put("epoch", True), "its epoch is True"),
    "a negative epoch": (put("epoch", -1), "its epoch is -1"),
    "another epoch": (put("epoch", 2), "of epoch 2, but has 3 rows"),
    "an epoch to come": (put("epoch", 4), "of epoch 4, but has 3 rows"),
    "no optimiser": (put("optimizer", None), "its optimiser is not this run's"),
    "another learning rate": (
        lambda state: put("lr", 0.5)(state["optimizer"]["param_groups"][0]), "its optimiser has lr 0.5, not 0.001",
    ),
    "settings that are gone": (
        lambda state: state["optimizer"]["param_groups"][0].pop("params"), "its optimiser lacks params",
    ),
    "no generator": (put("stream", None), "no state of a generator"),
    "a position of 10**9": (put("stream", "position", 10**9), "generator is out of range"),
    "a position of -1": (put("stream", "position", -1), "generator is out of range"),
    "a position that is a text": (put("stream", "position", "5"), "generator is out of range"),
    "few keys": (put("stream", "keys", torch.zeros(5, dtype=torch.int64)), "generator is out of range"),
    "another generator": (put("stream", "kind", "PCG64"), "generator is out of range"),
    "another shape": (put("rule", "network.hidden.weight", torch.zeros(9, 9)), r"\(9, 9\) torch.float32, not"),
    "another type": (put("rule", "network.hidden.weight", torch.zeros(8, 8).double()), "float64, not"),
    "a number for a tensor": (put("rule", "network.hidden.weight", 3), "is no tensor"),
    "another name": (put("rule", "network.more", torch.zeros(1)), "the names in its rule are not those"),
    "no rule": (lambda state: state.pop("rule"), "it lacks rule"),
    "rows of another": (put("metrics", "epoch,a\n1,2\n2,2\n3,4\n"), "its rows are not those"),
    "a list": (put("run", []), "with no settings"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_run_writes_is_refused(task, folder, case):
    change, match = WRONG[case]
    changed(folder.checkpoint_path, change)
    refused(task, folder, match)


def test_a_change_without_its_digest(task, folder):
    changed(folder.checkpoint_path, put("digest", "0" * 64), seal=False)
    refused(task, folder, "its content is not what was written")
    changed(folder.checkpoint_path, put("rule", "network.hidden.weight", torch.zeros(8, 8)), seal=False)
    refused(task, folder, "does not say which run it belongs to")


def test_parameters_that_are_not_finite_in_a_run_of_an_earlier_version(task, folder):
    legacy(folder)
    changed(folder.checkpoint_path, put("rule", "network.hidden.weight", torch.full((8, 8), math.nan)), seal=False)
    refused(task, folder, "network.hidden.weight is not finite")


def test_flipped_bits_change_no_number(task, folder):
    """Of every bit that was flipped, either the run refuses the file, or it holds the same as before."""
    content, before = folder.checkpoint_path.read_bytes(), digest(parameters(folder))
    whole, stream, seen = digest(folder.load(CPU)), np.random.RandomState(0), {"refused": 0, "same": 0}
    for place in stream.randint(0, len(content), 150):
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << stream.randint(8)
        folder.checkpoint_path.write_bytes(bytes(spoiled))
        try:
            assert digest(folder.load(CPU)) == whole
            seen["same"] += 1
        except UserError:
            seen["refused"] += 1
    assert seen["refused"] > 50
    folder.checkpoint_path.write_bytes(content)
    assert digest(parameters(folder)) == before


class Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_code_in_files_is_not_run(task, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Code(), {"rule": Code()}):
        torch.save(content, folder.checkpoint_path)
        refused(task, folder, "weights_only=True")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["epoch_0.pt", "epoch_2.pt"])
def test_parameters_of_another_run_or_epoch(task, tmp_path, name):
    mine, theirs = RunFolder(tmp_path, PAIR), RunFolder(tmp_path, Run(**{**vars(PAIR), "seed": 5}))
    for folder in (mine, theirs):
        train(task, folder, 2, [KeptParameters((0, 1, 2))])
    path = mine.path / "parameters" / name
    kept_pair(mine, 2, ())
    whole = path.read_bytes()
    for spoiled, match in (
        (theirs.path / "parameters" / name, "belongs to another run, with seed 5 instead of 99"),
        (mine.path / "parameters" / "epoch_1.pt", "is of epoch 1"),
    ):
        path.write_bytes(spoiled.read_bytes())
        with pytest.raises(UserError, match=match):
            kept_pair(mine, 2, ())
    for content in (b"", b"garbage", whole[:-100], whole[:200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            kept_pair(mine, 2, ())


def test_the_config_of_another_run(task, folder, tmp_path):
    train(task, theirs := RunFolder(tmp_path / "other", Run(**{**vars(RUN), "seed": 5})), 1)
    shutil.copy(theirs.config_path, folder.config_path)
    with pytest.raises(UserError, match="trained with seed 5 instead of 99"):
        folder.config()


def test_rows_of_other_columns_are_not_mixed(folder):
    with pytest.raises(UserError, match="has the columns epoch, train_loss"):
        folder.append({"epoch": 4, "train_loss": 1.0, "more": 2.0})
    with open(folder.metrics_path) as file:
        assert len(list(csv.reader(file))) == 4
