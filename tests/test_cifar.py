"""train_cifar.py: the published trajectories through its own command line, and each of its seven experiments."""

import csv

import numpy as np
import pytest
from golden_runs import BATCH, EPOCHS, RULES, load
from golden_runs import made_up as golden_images
from running import script
from small_data import made_up, write_cifar

from train_cifar import EXPERIMENTS
from wide.runs.folder import RunFolder
from wide.runs.run import Run


@pytest.fixture(scope="module")
def golden_files(tmp_path_factory):
    """The made-up data of the golden runs in the official files, which round them to 256 levels."""
    images, labels = golden_images(0, 300, 32, 3)
    images, labels = (images.numpy() * 255).round().astype(np.uint8), labels.numpy()
    held_out, train = slice(200, 300), slice(0, 200)
    folder = tmp_path_factory.mktemp("golden")
    in_order = [np.concatenate([part[held_out], part[train]]) for part in (images, labels)]
    write_cifar(folder, *in_order, images[held_out], labels[held_out])
    return folder


@pytest.mark.parametrize(
    ("experiment", "key", "rate", "names", "tolerance", "examples"),
    [
        (1, "width=8 lr=5.0 seed=99 data_limit=45000", 5, list(RULES), 1e-3, 1),
        # Rounding the images moves the very first loss of a single batch of 45 by 7e-4 already, and runs with Adam
        # more than rounding the arithmetic does. The images as they are, without the files: test_golden.py.
        (4, "width=8 lr=5.0 seed=99 data_limit=45", 5, ["normal", "alignada"], 2e-3, 2),
        (3, "width=8 lr=0.01 seed=99 adam", 0.01, ["alignada_adam", "alignzero_adam"], 2e-2, 2),
    ],
)
def test_golden_trajectories_through_the_script(
    golden_files, tmp_path, experiment, key, rate, names, tolerance, examples
):
    golden = {name: run for name, run in load("train_cifar")[key].items() if name in names}
    rules = {name: RULES[name.removesuffix("_adam")] for name in golden}
    options = ["--rules", *rules.values(), "--widths", 8, "--learning-rates", rate, "--epochs", EPOCHS]
    options += ["--batch-size", BATCH, "--data-dir", golden_files, "--outputs", tmp_path]
    options += ["--data-limits", 45] if experiment == 4 else []
    done = script("train_cifar.py", experiment, *options)
    assert done.returncode == 0, done.stderr
    for name, rule in rules.items():
        (path,) = tmp_path.glob(f"cifar/cnn-{rule}-*/metrics.csv")
        rows = list(csv.DictReader(path.open()))
        losses = np.reshape(golden[name]["step_loss"], (EPOCHS, -1)).mean(1)
        assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses, rel=tolerance), name
        near = examples / (45 if experiment == 4 else BATCH) + 1e-6
        for metric in ("train_accuracy", "validation_accuracy"):
            assert [float(row[metric]) for row in rows] == pytest.approx(golden[name][metric], abs=near), name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_cifar(folder, *made_up(90, (3, 32, 32), seed=1), *made_up(30, (3, 32, 32), seed=2))
    return folder


GRID = ["--widths", 4, 8, "--learning-rates", 1, 5, "--epochs", 1, "--batch-size", 20]


@pytest.fixture(scope="module")
def outputs(small, tmp_path_factory):
    """An outputs folder in which experiment 1 is done."""
    folder = tmp_path_factory.mktemp("outputs")
    done = script("train_cifar.py", 1, *GRID, "--data-dir", small, "--outputs", folder)
    assert done.returncode == 0, done.stderr
    return folder


EXPECTED = {
    1: ["| Last layer |", "width 4 | width 8"],
    2: ["## width 4", "| rule | lr 1 | lr 5 |"],
    3: ["## standard parameterisation", "## NTK parameterisation"],
    4: ["| rule | 20 images | 40 images |", "width "],
    5: ["| Align-prop |", "| Backprop |"],
    6: ["±", "n=2"],
    7: ["1.00x", "threads."],
}

ONE_RATE = ["--learning-rates", 1]
TWO_SEEDS = [*ONE_RATE, "--seeds", 100, 101]
MORE = {4: [*ONE_RATE, "--data-limits", 20, 40], 6: TWO_SEEDS, 7: TWO_SEEDS}


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_each_experiment(small, outputs, number):
    """Into a folder where experiment 1 is done: its runs are not trained again, and are shown beside 3's and 5's."""
    options = [*GRID, *MORE.get(number, [])]
    command = ["train_cifar.py", number, *options, "--data-dir", small, "--outputs", outputs]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    for text in EXPECTED[number]:
        assert text in done.stdout
    assert ("to train" in done.stdout) == (number not in (1, 2))  # experiment 1 trained all of 2's as well
    assert (outputs / "cifar" / f"experiment_{number}.png").stat().st_size > 5000

    listed = script(*command, "--list")
    runs = len(list(csv.DictReader((outputs / "cifar" / f"experiment_{number}.csv").open())))
    assert f"{runs} runs of 1 epoch: {runs} done, 0 to train" in listed.stdout


def test_runs_of_another_experiment_count_once(small, outputs):
    options = ["--rules", "align_prop", "backprop", "--widths", 4, "--learning-rates", 1, "--epochs", 1]
    done = script("train_cifar.py", 5, *options, "--batch-size", 20, "--data-dir", small, "--outputs", outputs)
    assert done.returncode == 0, done.stderr
    assert "| Backprop |" in done.stdout
    assert "n=2" not in done.stdout


def test_all_images_are_no_limit(small, outputs):
    """Experiment 4 with 45000 images is experiment 1."""
    options = ["--rules", "fa", "--widths", 4, "--learning-rates", 1, "--epochs", 1, "--batch-size", 20]
    done = script("train_cifar.py", 4, *options, "--data-limits", 45000, "--data-dir", small, "--outputs", outputs)
    assert done.returncode == 0, done.stderr
    assert RunFolder(outputs, Run("cifar", "cnn", "fa", 4, 1.0, 99, 20)).status(1) == "done"
    assert not list(outputs.glob("cifar/*images45000*"))
