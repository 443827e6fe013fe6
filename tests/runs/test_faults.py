"""A few of the faults of benchmarks/faults.py; disks that are full; the same command twice."""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from comparing import without_seconds
from PIL import Image
from running import ROOT
from small_data import made_up, write_cifar

import alignment_add
import alignment_cifar
import alignment_imagenet
import alignment_kmnist
import train_add
import train_cifar
import train_imagenet
import train_kmnist
from wide import UserError
from wide.command_line import main
from wide.grids.alignment_experiments import scored
from wide.runs import files
from wide.runs.files import mount_of, replace
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.session import train
from wide.training.tasks import AddTask

JOBS = ("training", "download")
RUN = Run("add", "rnn", "align_ada", width=8, learning_rate=0.001, seed=99, batch_size=50, variant="published")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_and_damaged():
    line = [sys.executable, ROOT / "benchmarks" / "faults.py", "--moments", 3, "--corruptions", 3, "--jobs", *JOBS]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(f"| killed: {job} |" in done.stdout for job in JOBS)
    assert "WRONG" not in done.stdout


# --------------------------------------------------------------------------------------------------------- full disks


class Full:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 1000, 4000])
def test_a_full_disk_is_named(tmp_path, monkeypatch, room):
    """torch.save would say "inline_container.cc", and not that there is no room."""
    task, folder = AddTask("published", torch.device("cpu")), RunFolder(tmp_path, RUN)
    train(task, folder, 1)
    before = folder.checkpoint_path.read_bytes()

    def opened(path, mode="r", **keywords):
        file = open(path, mode, **keywords)  # noqa: SIM115
        return Full(file, room) if mode == "wb" and "checkpoint" in path.name else file

    monkeypatch.setattr(files, "open", opened, raising=False)
    with pytest.raises(UserError, match=r"No space left on device.* is full.*make room there") as error:
        train(task, folder, 3)
    assert "\n" not in str(error.value)
    assert f"the file system at {mount_of(folder.path)} is full" in str(error.value)
    assert str(folder.path) in str(error.value)
    assert folder.checkpoint_path.read_bytes() == before
    monkeypatch.undo()
    train(task, folder, 3)
    assert folder.status(3) == "done"


def test_the_disk_is_not_blamed_for_other_errors(tmp_path):
    def write(file):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        replace(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["experiment_1.csv", "experiment_1.md"])
def test_a_folder_where_a_report_should_be(tmp_path, capsys, name):
    (tmp_path / "add" / name).mkdir(parents=True)
    words = ["1", "--rules", "backprop", "--widths", "4", "--epochs", "1", "--outputs", str(tmp_path)]
    assert main("", train_add.SUBJECT, train_add.EXPERIMENTS, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'add' / name} cannot be written (Is a directory)" in line


@pytest.mark.parametrize("name", ["metrics.csv", "config.json", "checkpoint.pt", "parameters", ".claim"])
def test_something_else_in_the_place_of_a_runs_file(tmp_path, capsys, name):
    folder = RunFolder(tmp_path, Run(**{**vars(RUN), "rule": "pair"}))
    folder.path.mkdir(parents=True)
    if name == "parameters":
        (folder.path / name).touch()
    else:
        (folder.path / name).mkdir()
    words = ["1", "--widths", "8", "--epochs", "1", "--outputs", str(tmp_path)]
    assert main("", scored(alignment_add.SUBJECT), alignment_add.EXPERIMENTS, words) in (1, 2)
    *_, last = capsys.readouterr().err.splitlines()
    assert str(folder.path) in last
    assert "Error:" not in last


def test_a_path_that_is_too_long(tmp_path, capsys):
    words = ["1", "--list", "--outputs", str(tmp_path / "/".join(["a" * 100] * 60))]
    assert main("", train_add.SUBJECT, train_add.EXPERIMENTS, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is too long a path for this system; choose a shorter --outputs" in line


# --------------------------------------------------------------------------------------------- the same command twice


@pytest.fixture(scope="module")
def data(kmnist, tmp_path_factory):
    """KMNIST, CIFAR-10 and folders of images, all small."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "kmnist").symlink_to(kmnist / "kmnist")
    write_cifar(folder, *made_up(60, (3, 32, 32), seed=1), *made_up(20, (3, 32, 32), seed=2))
    for part, count in (("train", 10), ("val", 4)):
        for label in (0, 1):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.RandomState(number + 100 * label).randint(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


SMALL = ["--widths", "4", "--epochs", "2", "--batch-size", "10"]
COMMANDS = {
    "train_add": (train_add, ["--widths", "8", "--epochs", "2", "--rules", "align_ada", "weight_mirror"]),
    "train_kmnist": (train_kmnist, [*SMALL, "--learning-rates", "1", "--rules", "align_ada", "dfa"]),
    "train_cifar": (train_cifar, [*SMALL, "--learning-rates", "1", "--rules", "fa"]),
    "train_imagenet": (train_imagenet, [*SMALL, "--rules", "align_zero", "--workers", "0"]),
    "alignment_add": (alignment_add, ["--widths", "8", "--epochs", "2"]),
    "alignment_kmnist": (alignment_kmnist, SMALL),
    "alignment_cifar": (alignment_cifar, SMALL),
    "alignment_imagenet": (alignment_imagenet, [*SMALL, "--workers", "0"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_twice_gives_the_same_numbers(data, tmp_path, name, capsys):
    module, words = COMMANDS[name]
    subject = scored(module.SUBJECT) if name.startswith("alignment") else module.SUBJECT
    for outputs in ("once", "twice"):
        arguments = ["1", *words, "--data-dir", str(data), "--outputs", str(tmp_path / outputs)]
        assert main("", subject, module.EXPERIMENTS, arguments) == 0, capsys.readouterr().err
        torch.rand(3)  # of torch's own generator nothing may depend
        np.random.rand(3)
    paths = sorted((tmp_path / "once").glob("*/*/metrics.csv"))
    assert paths
    for path in paths:
        same = tmp_path / "twice" / path.relative_to(tmp_path / "once")
        assert rows(path) == rows(same)
        assert len(rows(path)) == 2


def rows(path):
    folder = RunFolder(path.parents[2], RUN)
    folder.metrics_path = path
    return without_seconds(folder)


@pytest.mark.parametrize("path", [*(ROOT / "wide").rglob("*.py"), *ROOT.glob("*.py")], ids=lambda path: path.name)
def test_files_of_text_are_utf_8_on_every_system(path):
    """Not what a system's language has: each call that reads or writes text says so."""
    source = path.read_text(encoding="utf-8")
    calls = re.findall(r"(?:read_text|write_text|(?<![.\w])open)\((?:[^()]|\([^()]*\))*\)", source)
    assert [call for call in calls if "encoding=" not in call and '"rb"' not in call and '"wb"' not in call] in (
        [],
        ['open(self.lock_path, "w")'],  # which holds nothing
    )
