"""The scripts as their users run them: real processes, tiny grids, wrong command lines, missing and broken data."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from running import ROOT, Script, script
from small_data import made_up, write_kmnist

from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.recorders import Angles

RULES = ["backprop", "last_layer", "fa", "dfa", "align_prop", "align_ada", "align_zero"]


def tiny(kmnist, outputs, *arguments):
    options = ["--widths", 4, "--learning-rates", 1, "--epochs", 2, "--batch-size", 50]
    return [*options, "--data-dir", kmnist, "--outputs", outputs, *arguments]


@pytest.mark.quick
@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_train_kmnist_end_to_end(kmnist, tmp_path, network):
    arguments = tiny(kmnist, tmp_path, "--rules", *RULES, "--network", network)
    done = script("train_kmnist.py", 1, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # bars are for terminals
    assert sum(": done at epoch 2" in line for line in done.stdout.splitlines()) == len(RULES)
    with open(tmp_path / "kmnist" / "experiment_1.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == RULES
    assert {row["status"] for row in rows} == {"done"}
    assert all(0 <= float(row["final_test_accuracy"]) <= 1 for row in rows)
    assert (tmp_path / "kmnist" / "experiment_1.md").read_text() in done.stdout
    assert (tmp_path / "kmnist" / "experiment_1.png").stat().st_size > 5000
    for row in rows:
        run = Run("kmnist", network, row["rule"], 4, 1.0, 99, 50)
        header = (tmp_path / "kmnist" / run.name / "metrics.csv").read_text().splitlines()[0]
        assert header == "epoch,train_loss,train_accuracy,validation_accuracy,test_accuracy,seconds"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("kmnist/*/*")}
    again = script("train_kmnist.py", 1, *arguments, "--data-dir", "/nowhere")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("# KMNIST")  # nothing was trained, nor the data read
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("kmnist/*/*")}


def test_log_alignment(kmnist, tmp_path):
    rules = ["backprop", "last_layer", "fa", "dfa"]
    done = script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", *rules, "--log-alignment"))
    assert done.returncode == 0, done.stderr
    for rule in rules:
        folder = RunFolder(tmp_path, Run("kmnist", "cnn", rule, 4, 1.0, 99, 50))
        rows = list(csv.DictReader((folder.path / Angles.file).read_text().splitlines()))
        layers = ["blocks.0.layer", "blocks.1.layer", "blocks.2.layer", "readout"]
        assert [(row["epoch"], row["layer"]) for row in rows] == [(str(k), layer) for k in (1, 2) for layer in layers]
        for row in rows:
            to_backprop, feedback = row["degrees_to_backprop"], row["degrees_feedback_to_weight"]
            assert (feedback != "") == (rule == "fa")
            if rule == "backprop" or row["layer"] == "readout":
                assert float(to_backprop) < 0.1
            else:
                assert to_backprop == "" if rule == "last_layer" else 1 < float(to_backprop) < 180
    assert script("alignment_kmnist.py", 1, "--log-alignment").returncode == 2  # its networks N learn by backprop


@pytest.mark.parametrize("variant", ["published", "corrected"])
def test_train_add_end_to_end(tmp_path, variant):
    rules = [rule for rule in RULES if rule != "dfa"]
    options = ["--widths", 8, "--epochs", 2, "--outputs", tmp_path, "--variant", variant, "--rules", *rules]
    done = script("train_add.py", 1, *options)
    assert done.returncode == 0, done.stderr
    assert "| guessing 0.5 |" in done.stdout
    with open(tmp_path / "add" / "experiment_1.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == rules
    assert {row["variant"] for row in rows} == {variant}
    run = Run("add", "rnn", "fa", 8, 0.001, 99, 50, variant=variant)
    assert RunFolder(tmp_path, run).metrics_path.read_text().startswith("epoch,train_loss,test_loss,seconds\n")


def test_list_shows_states_and_trains_nothing(kmnist, tmp_path):
    short = tiny(kmnist, tmp_path, "--rules", "backprop")
    assert script("train_kmnist.py", 1, *short, "--epochs", 1).returncode == 0
    before = sorted(tmp_path.rglob("*"))
    done = script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "backprop", "fa"), "--list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("at epoch 1 ")
    assert lines[1].startswith("missing ")
    assert lines[-1] == "2 runs of 2 epochs: 0 done, 2 to train"
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupt_says_how_to_go_on(kmnist, tmp_path):
    options = tiny(kmnist, tmp_path, "--rules", "backprop", "--epochs", 100000)
    process = Script("train_kmnist.py", 1, *options)
    while not list(tmp_path.glob("kmnist/*/metrics.csv")):
        time.sleep(0.01)
        assert not process.ended()
    process.send(signal.SIGINT)
    done = process.finished()
    assert done.returncode == 130
    assert done.stderr == "train_kmnist.py: interrupted; the same command goes on from the last checkpoint\n"


def test_interrupt_while_torch_is_imported(tmp_path):
    """One line; Python ends itself by the signal, which a shell shows as status 130."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    program = f"import runpy; runpy.run_path({str(ROOT / 'train_add.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted\n"


def test_a_failing_run_is_reported_and_the_others_go_on(kmnist, tmp_path):
    """A run whose folder cannot be locked fails; the exit status and the last line tell."""
    broken = RunFolder(tmp_path, Run("kmnist", "cnn", "fa", 4, 1.0, 99, 50))
    (broken.path / ".lock").mkdir(parents=True)
    done = script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "fa", "backprop"))
    assert done.returncode == 1
    assert "cnn-backprop-width4-lr1-seed99-batch50: done" in done.stdout
    assert "| FA | failed" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("failed: cnn-fa-width4")
    assert "error.txt" in last
    assert "Traceback" in broken.error_path.read_text()
    assert "Traceback" not in done.stderr

    (broken.path / ".lock").rmdir()
    assert script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "fa", "backprop")).returncode == 0
    assert not broken.error_path.exists()


def test_diverged_runs_are_recorded_and_the_rest_go_on(tmp_path):
    options = ["--widths", 64, "--epochs", 2, "--outputs", tmp_path, "--learning-rates", 10, 0.001]
    done = script("train_add.py", 1, *options, "--rules", "backprop")
    assert done.returncode == 0, done.stderr
    assert "diverged at epoch" in done.stdout
    assert "(lr 0.001 at the edge)" in done.stdout


WRONG = {
    "no such experiment": (["7"], "invalid choice"),
    "no such rule": (["1", "--rules", "hebb"], "invalid choice"),
    "width zero": (["1", "--widths", "0"], "not a positive whole number"),
    "rate of nan": (["1", "--learning-rates", "nan"], "not a positive number"),
    "seed too large": (["1", "--seeds", "4294967296"], "not a whole number between"),
    "no epochs": (["1", "--epochs", "0"], "not a positive whole number"),
    "no number": (["1", "--widths", "wide"], "'wide' is not a positive whole number"),
    "unknown option": (["1", "--width", "8", "--colour", "red"], "unrecognized arguments"),
    "tf32 on a CPU": (["1", "--device", "cpu", "--precision", "tf32"], "use fp32"),
    "recurrent network on images": (["1", "--network", "rnn"], "invalid choice"),
    "batch of one": (["1", "--batch-size", "1", "--epochs", "1"], "a batch of one"),
    "limit without a divisor": (["1", "--data-limits", "101"], "which --data-limits 101 leads to"),
    "limit beyond the data": (["1", "--data-limits", "201"], "use --data-limits up to 200"),
    "batch larger than the data": (["1", "--batch-size", "1000", "--epochs", "1"], "use a smaller --batch-size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_lines(kmnist, tmp_path, case):
    arguments, message = WRONG[case]
    done = script("train_kmnist.py", *arguments, "--data-dir", kmnist, "--outputs", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "dfa"], "not defined for the recurrent network"),
        (["--batch-size", "128"], "use --batch-size 100 or less"),
        (["--device", "cuda"], "use --device cpu"),
    ],
)
def test_wrong_command_lines_of_the_add_task(tmp_path, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script("train_add.py", 1, *arguments, "--outputs", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_data(tmp_path):
    done = script("train_kmnist.py", 1, "--data-dir", tmp_path / "data", "--outputs", tmp_path / "outputs")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--data-dir" in done.stderr


def test_truncated_data(tmp_path):
    write_kmnist(tmp_path, *made_up(30, (28, 28)), *made_up(30, (28, 28)))
    path = tmp_path / "kmnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-500])
    done = script("train_kmnist.py", 1, *tiny(tmp_path, tmp_path / "outputs"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
    assert "setup_kmnist.py" in done.stderr


def test_unwritable_outputs(kmnist, tmp_path):
    (tmp_path / "outputs").write_text("a file, not a folder")
    done = script("train_kmnist.py", 1, *tiny(kmnist, tmp_path / "outputs"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "choose another --outputs" in done.stderr


def test_help_explains_each_experiment():
    for name in ("train_add.py", "train_kmnist.py"):
        done = script(name, "--help")
        assert done.returncode == 0
        assert "\n  1  " in done.stdout
    assert "\n  2  accuracy against learning rate" in done.stdout


def test_runs_kept_without_a_checkpoint_are_left_alone(kmnist, tmp_path):
    """As those in results/ are; the others of the grid are trained."""
    assert script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "backprop")).returncode == 0
    (checkpoint,) = tmp_path.glob("kmnist/*/checkpoint.pt")
    checkpoint.unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()}
    options = tiny(kmnist, tmp_path, "--rules", "backprop", "last_layer", "--epochs", 3)
    done = script("train_kmnist.py", 1, *options)
    assert done.returncode == 1
    assert "no checkpoint.pt" in done.stderr
    assert "use another --outputs" in done.stderr
    assert {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()} == before
    assert "last_layer" in done.stdout


def test_a_table_does_not_mix_data(kmnist, tmp_path):
    """Width 4 is done on other data; training width 6 beside it is refused."""
    assert script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "backprop")).returncode == 0
    write_kmnist(tmp_path / "data", *made_up(300, (28, 28), seed=7), *made_up(60, (28, 28), seed=8))
    options = tiny(tmp_path / "data", tmp_path, "--rules", "backprop", "--widths", 4, 6)
    done = script("train_kmnist.py", 1, *options)
    assert done.returncode == 2
    assert "use another --outputs" in done.stderr


def test_two_processes_share_a_grid(kmnist, tmp_path):
    """Each takes runs that the other is not training; between them every run is trained once."""
    options = tiny(kmnist, tmp_path, "--rules", *RULES, "--epochs", 4)
    both = [Script("train_kmnist.py", 1, *options) for _ in range(2)]
    outputs = []
    for process in both:
        done = process.finished()
        assert done.returncode in (0, 1)
        outputs.append(done.stdout)
    assert script("train_kmnist.py", 1, *options).returncode == 0
    for rule in RULES:
        folder = RunFolder(tmp_path, Run("kmnist", "cnn", rule, 4, 1.0, 99, 50))
        assert folder.status(4) == "done"
        assert [session["from_epoch"] for session in folder.config()["sessions"]] == [0]
        assert sum(f"cnn-{rule}-width4-lr1-seed99-batch50: done" in output for output in outputs) >= 1


def test_reports_say_what_is_unusual(kmnist, tmp_path):
    options = tiny(kmnist, tmp_path, "--rules", "backprop", "--network", "mlp", "--precision", "bf16", "--widths", 8, 4)
    done = script("train_kmnist.py", 1, *options)
    assert done.returncode == 0, done.stderr
    assert "# KMNIST: accuracy against width (fully connected, bf16)" in done.stdout
    assert "network mlp, sgd, lr 1, batch 50, seed 99, bf16; data 200-100-60-" in done.stdout
    assert "| rule | width 4 | width 8 |" in done.stdout


def test_data_limits_take_the_first_images(kmnist, tmp_path):
    done = script("train_kmnist.py", 1, *tiny(kmnist, tmp_path, "--rules", "backprop", "--data-limits", 20, 50))
    assert done.returncode == 0, done.stderr
    assert "## 20 images" in done.stdout
    metrics = RunFolder(tmp_path, Run("kmnist", "cnn", "backprop", 4, 1.0, 99, 20, data_limit=20)).rows()
    shares = np.array([row["validation_accuracy"] for row in metrics]) * 20
    assert shares == pytest.approx(shares.round(), abs=1e-5)
