"""Readers, given what nobody would write: they say in a line what is wrong with it, or read what is there."""

import contextlib
import gzip
import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from setup_cifar import CIFAR
from setup_kmnist import KMNIST
from wide import UserError
from wide.reports.alignment_report import read_scores
from wide.reports.tables import BEST_LOSS, Summary
from wide.runs.checkpoints import Unusable, digest, sealed
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.loop import Training
from wide.training.recorders import Angles
from wide.training.session import train
from wide.training.tasks import AddTask

CPU = torch.device("cpu")
RUN = Run("add", "rnn", "backprop", width=2, learning_rate=0.001, seed=99, batch_size=50, variant="published")
fuzzed = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def spoiled(content: bytes):
    """This content with some bytes replaced, a part cut out, or something put in."""
    places = st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(places, st.integers(0, 8), st.binary(max_size=6)), min_size=1, max_size=4)

    def change(edits):
        text = bytearray(content)
        for place, length, new in edits:
            text[place : place + length] = new
        return bytes(text)

    return st.one_of(changes.map(change), places.map(lambda end: content[:end]), st.binary(max_size=200))


@contextlib.contextmanager
def in_place_of(path):
    """Gives the file's content; what is written over it within goes again, and an error of ours is in a line."""
    content = path.read_bytes()
    try:
        yield content
    except UserError as error:
        in_a_line(error)
    finally:
        path.write_bytes(content)


def in_a_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


# ----------------------------------------------------------------------------------------------------------------- data

PIXELS = np.random.RandomState(0).randint(0, 256, (7, 28, 28)).astype(np.uint8)
IDX = struct.pack(">4B3I", 0, 0, 8, 3, *PIXELS.shape) + PIXELS.tobytes()
GZIP = gzip.compress(IDX, mtime=0)


@fuzzed
@given(st.one_of(spoiled(IDX).map(lambda content: gzip.compress(content, compresslevel=1)), spoiled(GZIP)))
def test_idx(tmp_path, content):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    reader = KMNIST.__new__(KMNIST)
    reader.command = "the command"
    try:
        images = reader.read_idx(path, (28, 28))
    except UserError as error:
        in_a_line(error)
        return
    unpacked = gzip.decompress(content)
    assert unpacked[:8] == struct.pack(">4BI", 0, 0, 8, 3, len(images))
    assert images.tobytes() == unpacked[16:]


RECORDS = bytes(range(10)) + np.random.RandomState(0).bytes(3073 * 2 - 10)


@fuzzed
@given(st.one_of(spoiled(RECORDS), st.integers(0, 255).map(lambda label: bytes([label]) + RECORDS[1:])))
def test_cifar_records(tmp_path, content):
    path = tmp_path / "records.bin"
    path.write_bytes(content)
    reader = CIFAR.__new__(CIFAR)
    reader.command = "the command"
    try:
        images, labels = reader.read((path,))
    except UserError as error:
        in_a_line(error)
        return
    whole = b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))
    assert whole == content
    assert max(labels) < 10


# ------------------------------------------------------------------------------------------------------- a run's folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("trained")
    train(AddTask("published", CPU), RunFolder(outputs, RUN), 2, [Angles()])
    return outputs


@pytest.fixture
def folder(trained, tmp_path):
    return RunFolder(shutil.copytree(trained, tmp_path / "copy"), RUN)


def again(folder):
    """The folder as another process sees it."""
    return RunFolder(folder.path.parents[1], RUN)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzzed
@given(st.data())
def test_config(folder, data):
    text = folder.config_path.read_text()
    config, kind = json.loads(text), data.draw(st.sampled_from(["run", "sessions", "format", "a setting", "bytes"]))
    if kind == "a setting":
        config["run"][data.draw(st.sampled_from(sorted(config["run"])))] = data.draw(anything)
    elif kind != "bytes":
        config[kind] = data.draw(anything)
    content = data.draw(spoiled(text.encode())) if kind == "bytes" else json.dumps(config).encode()
    with in_place_of(folder.config_path):
        folder.config_path.write_bytes(content)
        read = again(folder).config()
        summary = Summary.read(again(folder), 2, BEST_LOSS)
        assert {name: read["run"].get(name) for name in RUN.settings()} == RUN.settings()
        assert summary.data == read["run"]["data"]


@fuzzed
@given(st.data())
def test_metrics(folder, data):
    with in_place_of(folder.metrics_path) as text:
        content = data.draw(spoiled(text))
        folder.metrics_path.write_bytes(content)
        rows = again(folder).rows()
        again(folder).status(2)
        read_scores(again(folder), 2)
        Summary.read(again(folder), 2, BEST_LOSS)
        lines = content.decode().splitlines(keepends=True)
        whole = [line.rstrip("\n").split(",") for line in lines if line.endswith("\n")]
        for row, cells in zip(rows, [cells for cells in whole[1:] if cells != [""]], strict=True):
            assert len(row) == len(cells)
            for value, cell in zip(row.values(), cells, strict=True):
                assert cell == "" if value is None else value == float(cell) or math.isnan(value)


@fuzzed
@given(st.data())
def test_metrics_are_those_that_the_checkpoint_was_saved_with(folder, data):
    """What is not refused is what was there, in the rows that the checkpoint covers."""
    with in_place_of(folder.metrics_path) as text:
        folder.metrics_path.write_bytes(data.draw(spoiled(text)))
        again(folder).load(CPU)
        again(folder).keep(2)
        assert folder.metrics_path.read_bytes() == text


@fuzzed
@given(st.data())
def test_angles(folder, data):
    path = folder.path / Angles.file
    with in_place_of(path) as text:
        path.write_bytes(data.draw(spoiled(text)))
        again(folder).keep(2)


@fuzzed
@given(st.data())
def test_checkpoints(folder, data):
    whole = digest(folder.load(CPU))
    with in_place_of(folder.checkpoint_path) as content:
        folder.checkpoint_path.write_bytes(data.draw(spoiled(content)))
        assert digest(again(folder).load(CPU)) == whole


PLACES = [
    ("epoch",), ("run",), ("metrics",), ("rule",), ("optimizer",), ("stream",), ("optimizer", "state"),
    ("optimizer", "param_groups"), ("optimizer", "param_groups", 0), ("optimizer", "param_groups", 0, "lr"),
    *(("stream", name) for name in ("kind", "keys", "position", "has_gauss", "cached")),
    ("rule", "network.hidden.weight"), ("run", "seed"),
]  # fmt: skip
tensors = st.sampled_from([torch.zeros(()), torch.zeros(624), torch.full((2, 2), math.nan), torch.zeros(2, 2).int()])


@fuzzed
@given(place=st.sampled_from(PLACES), value=st.one_of(anything, tensors))
def test_checkpoints_that_another_program_wrote(folder, place, value):
    """With a digest that agrees: the process goes on, and says in a line what is wrong, or takes what it could be."""
    state = torch.load(folder.checkpoint_path)
    del state["digest"]
    inner = state
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    training = Training(AddTask("published", CPU), RUN)
    with in_place_of(folder.checkpoint_path):
        torch.save(sealed(state), folder.checkpoint_path)
        try:
            training.restore(again(folder).load(CPU))
            assert training.epoch == 2
            training.stream.permutation(5)
            assert training.optimizer.param_groups[0]["lr"] == RUN.learning_rate
        except Unusable as error:
            in_a_line(error)
