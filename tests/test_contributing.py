"""CONTRIBUTING.md: a made-up dataset, rule, experiment and figure, added to a copy in the files that it names."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT

SETUP = '''
"""Get and read letters."""

import sys
from typing import ClassVar

import numpy as np

from wide.command_line import setup
from wide.data.datasets import ImageDataset


class Letters(ImageDataset):
    name = "letters"
    title = "Letters"
    image_shape = (1, 8, 8)
    directory = "letters"
    train_files = ("train.npy",)
    test_files = ("test.npy",)
    url = "https://example.org/"
    md5: ClassVar = {}

    def read(self, paths):
        rows = np.load(paths[0])
        return rows[:, 1:].reshape(-1, 1, 8, 8), rows[:, 0]


if __name__ == "__main__":
    sys.exit(setup(Letters))
'''

TRAIN = '''
"""Networks on letters."""

import sys

from setup_letters import Letters
from wide.command_line import main
from wide.grids.experiments import Experiment, Subject
from wide.reports.tables import ACCURACY
from wide.training.tasks import ImageTask

STRIDES = (1, 2)
EXPERIMENTS = {1: Experiment("accuracy against width", ("backprop", "dfa"), (4, 8), (1,), epochs=2)}
SUBJECT = Subject(
    dataset="letters",
    title="Letters",
    task=lambda data, device: ImageTask(Letters(data.folder), STRIDES, device),
    networks=("cnn", "mlp"),
    batch_size=20,
    metrics=ACCURACY,
    examples=80,
    image_size=Letters.image_shape[1:],
    strides=STRIDES,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, SUBJECT, EXPERIMENTS))
'''

ALIGNMENT = '''
"""Alignment on letters."""

import sys

from train_letters import SUBJECT
from wide.grids.alignment_experiments import alignment_experiments, pairs, scored
from wide.command_line import main

EXPERIMENTS = alignment_experiments(pairs((4, 8), 1, 3, quick={"widths": (4,)}), scored_after=2, timed_width=8)

if __name__ == "__main__":
    sys.exit(main(__doc__, scored(SUBJECT), EXPERIMENTS))
'''

RULE = '''

class HalfProp(Backprop):
    """delta_in = W^T delta;  dW = c delta a^T, with c drawn at the start"""

    def __init__(self, network, generator):
        super().__init__(network)
        self.register_buffer("c", torch.rand((), generator=generator))
        for parameter in network.parameters():
            parameter.register_hook(lambda gradient: self.c * gradient)


RULES["half_prop"] = HalfProp
'''

ROW = """

import torch

RULES["half_prop"] = RuleSpec(
    align_rules.HalfProp, "Half-prop", "#00aa00", "*", "-",
    arguments=lambda run, network: {"generator": torch.Generator().manual_seed(run.seed)},
    settings={"decay": 0.25},
)
"""

EXPERIMENT = """EXPERIMENTS = {
    2: Experiment("loss against learning rate", ("backprop",), (8,), (0.001, 0.002), epochs=2,
                  view=View(against="learning_rate", best_over=(), figure="empty_axes")),
"""

FIGURE = """

def empty_axes(table: Table, references, examples: int):
    figure, axes = panels(1)
    axes[0].set_title(" ".join(RULES[rule].title for rows in table.sections.values() for rule in rows))
    return figure


KINDS["empty_axes"] = empty_axes
"""


class Copy:
    """A copy of the code, and which of its files were touched."""

    def __init__(self, folder):
        self.folder, self.touched = folder, set()
        shutil.copytree(ROOT / "wide", folder / "wide", ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)

    def add(self, name, text):
        self.touched.add(name)
        with open(self.folder / name, "a") as file:
            file.write(text)

    def replace(self, name, old, new):
        self.touched.add(name)
        before = (self.folder / name).read_text()
        assert before.count(old) == 1
        (self.folder / name).write_text(before.replace(old, new))

    def run(self, name, *arguments):
        line = [sys.executable, str(self.folder / name), *map(str, arguments)]
        done = subprocess.run(
            line, cwd=self.folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def named(section, **words):
    """The files that a section of CONTRIBUTING.md names."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    files = re.findall(r"`([^`]+)`", re.search(r"^Files: (.*)$", text, re.MULTILINE)[1])
    for word, value in words.items():
        files = [file.replace(f"<{word}>", value) for file in files]
    return set(files)


def test_a_dataset(copy):
    for name, text in (("setup", SETUP), ("train", TRAIN), ("alignment", ALIGNMENT)):
        copy.add(f"{name}_letters.py", text)
    data = copy.folder / "data" / "letters"
    data.mkdir(parents=True)
    for part, count in (("train", 120), ("test", 40)):
        rows = np.random.RandomState(count).randint(0, 10, (count, 65)).astype(np.uint8)
        np.save(data / f"{part}.npy", rows)
    assert "80 training, 40 validation and 40 test images of shape 1x8x8" in copy.run("setup_letters.py")
    assert "| DFA |" in copy.run("train_letters.py", 1, "--widths", 4)
    assert "| layer 2 |" in copy.run("alignment_letters.py", 2, "--widths", 4)
    assert copy.touched == named("A dataset", name="letters")


def test_a_rule(copy):
    copy.add("align_rules.py", RULE)
    copy.add("wide/models/rules.py", ROW)
    printed = copy.run("train_add.py", 1, "--rules", "half_prop", "backprop", "--widths", 8, "--epochs", 2)
    assert "| Half-prop |" in printed
    assert "rnn-half_prop-width8-lr0.001-seed99-batch50-published-decay0.25: done" in printed
    assert "rnn-backprop-width8-lr0.001-seed99-batch50-published: done" in printed
    assert copy.touched == named("A rule")


def test_an_experiment_and_a_figure(copy):
    copy.replace("train_add.py", "EXPERIMENTS = {\n", EXPERIMENT)
    copy.replace(
        "train_add.py", "from wide.reports.tables import BEST_LOSS", "from wide.reports.tables import BEST_LOSS, View"
    )
    assert copy.touched == named("An experiment", dataset="add")
    copy.touched.clear()
    copy.add("wide/reports/figures.py", FIGURE)
    assert copy.touched == named("A figure")
    assert "| rule | lr 0.001 | lr 0.002 |" in copy.run("train_add.py", 2)
    assert (copy.folder / "outputs" / "add" / "experiment_2.png").exists()
