"""Runs side by side: what is refused, the order; and with Ray, where it is installed, whole grids of real processes."""

import importlib.util
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from running import NO_NETWORK, command, fresh_script

import train_add
import train_cifar
import train_imagenet
from wide import UserError
from wide.command_line import main
from wide.grids import grid
from wide.grids.pace import Pace, makespan
from wide.grids.parallel import in_order
from wide.grids.study import Machine, Study
from wide.grids.worker import look_around
from wide.options import DataOptions, Options, ParallelOptions
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.processes import Processes

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
RULES, EPOCHS = ("backprop", "align_ada", "align_zero", "last_layer"), 40


def arguments(outputs, *more):
    grid = ["--rules", *RULES, "--widths", 8, "--learning-rates", 0.0001, "--epochs", EPOCHS]
    return [1, *grid, "--outputs", outputs, *more]


def folders(outputs):
    runs = [Run("add", "rnn", rule, 8, 0.0001, 99, 50, variant="published") for rule in RULES]
    return [RunFolder(outputs, run) for run in runs]


# ---------------------------------------------------------------------------------------------------------- without Ray


def test_without_ray_it_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    done = fresh_script("train_add.py", *arguments(tmp_path, "--parallel"), variables={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.endswith("pip install -r requirements-ray.txt\n")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1", "--runs-per-gpu", "4"], "--runs-per-gpu is for runs side by side; add --parallel"),
        (["1", "--threads-per-run", "2"], "--threads-per-run is for runs side by side; add --parallel"),
        (["7", "--parallel"], "time of an epoch is measured here"),
    ],
)
def test_what_is_refused(tmp_path, capsys, given, message):
    outputs = ["--device", "cpu", "--outputs", str(tmp_path)]
    assert main("", train_cifar.SUBJECT, train_cifar.EXPERIMENTS, [*given, *outputs]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_is_refused():
    options = Options(1, "cnn", DataOptions(Path("data")), parallel=ParallelOptions())
    machine = Machine(torch.device("cpu"), "fp32", Processes(rank=1, count=2))
    study = Study.of(train_imagenet.SUBJECT, train_imagenet.EXPERIMENTS, options, machine)
    with pytest.raises(UserError, match="without torchrun"):
        grid.run(study)


def test_when_the_last_of_several_is_over():
    assert makespan([3, 1, 1, 1], 1) == 6
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 1, 3], 2) == 4
    assert makespan([], 2) == 0


def test_the_widest_first_where_that_shortens_the_whole(tmp_path):
    narrow, middle, wide = (RunFolder(tmp_path, Run("add", "rnn", "fa", w, 1.0, 99, 50)) for w in (8, 16, 64))
    pace = Pace(examples=300, epochs=2, products={8: 8, 16: 16, 64: 64})
    grid = [narrow, narrow, middle, wide]
    assert in_order(grid, pace, slots=2) == [wide, middle, narrow, narrow]
    assert in_order(grid, pace, slots=1) == grid
    assert in_order([*grid, wide], pace, slots=8) == [*grid, wide]


@pytest.mark.parametrize(
    ("cores", "chosen", "gain"),
    [
        (1, {}, None),
        (2, {}, "1.7"),  # a core trains what makes 3 and 4 products, the other 4 and 1
        (3, {}, "3.0"),
        (3, {"threads": 2}, None),
        (3, {"parallel": ParallelOptions()}, None),
        (3, {"device": "meta"}, None),
    ],
)
def test_the_gain_of_runs_side_by_side(tmp_path, monkeypatch, cores, chosen, gain):
    monkeypatch.setattr(grid, "usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    chosen = {"device": "cpu"} | chosen
    options = Options(1, "rnn", DataOptions(Path("data"), "published"), outputs=tmp_path, **chosen)
    study = Study.of(train_add.SUBJECT, train_add.EXPERIMENTS, options, Machine(torch.device(chosen["device"]), "fp32"))
    told = grid.gain_of_parallel(study, folders(tmp_path), Pace(300, EPOCHS, {8: 1.0}))
    assert told == (f" (--parallel: about {gain} times as fast)" if gain else "")


def test_machines_that_do_not_see_the_files(tmp_path):
    marker = tmp_path / "marker"
    assert look_around(marker, None).startswith(f"does not see {tmp_path}; choose --outputs")
    marker.touch()
    assert look_around(marker, tmp_path) is None
    assert look_around(marker, tmp_path / "data").startswith(f"does not see {tmp_path / 'data'}; choose --data-dir")


# ------------------------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outputs of the same runs one after the other, on one thread."""
    outputs = tmp_path_factory.mktemp("alone")
    assert fresh_script("train_add.py", *arguments(outputs), variables={"OMP_NUM_THREADS": "1"}).returncode == 0
    return outputs


class Driver:
    """A command with --parallel, in a process group of its own, as a shell starts it."""

    def __init__(self, outputs, *more, **variables):
        self.outputs = outputs
        self.found = {folder.path: len(folder.rows()) for folder in folders(outputs)}
        self.process = subprocess.Popen(
            command("train_add.py", *arguments(outputs, "--parallel", *more)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **NO_NETWORK, **variables},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.workers = set()

    def when_rows(self, count):
        """Wait until this command has added so many rows to a run, which is not its end."""
        while not any(
            self.found.get(folder.path, 0) + count <= len(folder.rows()) < EPOCHS for folder in folders(self.outputs)
        ):
            assert self.process.poll() is None, self.process.communicate()
            self.workers |= set(processes("ray::train_placed"))
            time.sleep(0.01)

    def end(self):
        out, err = self.process.communicate(timeout=180)
        return self.process.returncode, out, err


def processes(title):
    """The numbers of processes whose command line begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def assert_each_trained(outputs, alone, sessions=1):
    for mine, other in zip(folders(outputs), folders(alone), strict=True):
        assert_same(mine, other)
        assert len(mine.config()["sessions"]) <= sessions
        assert mine.config()["sessions"][0]["device"].endswith(", 1 threads")


@with_ray
def test_each_run_is_trained_once_and_a_failing_one_is_told(tmp_path, alone):
    broken = RunFolder(tmp_path, Run("add", "rnn", "align_prop", 8, 0.0001, 99, 50, variant="published"))
    (broken.path / ".lock").mkdir(parents=True)
    status, out, err = Driver(tmp_path, "--rules", *RULES, "align_prop").end()
    assert status == 1
    assert err.splitlines() == [err.strip()]
    assert err.startswith(f"failed: {broken.run.name}: ")
    assert "error.txt" in err
    assert_each_trained(tmp_path, alone)
    assert len(re.findall(r": done at epoch 40, .*\[[1-4] of 5 runs done", out)) == 4
    assert (tmp_path / "add" / "experiment_1.md").read_text() in out


@with_ray
def test_a_run_whose_worker_is_killed_goes_on(tmp_path, alone):
    driver = Driver(tmp_path)
    driver.when_rows(3)
    for worker in processes("ray::train_placed"):
        os.kill(worker, signal.SIGKILL)
    status, out, err = driver.end()
    assert (status, err) == (0, "")
    assert "its process was killed or crashed; it goes on from its last checkpoint" in out
    assert_each_trained(tmp_path, alone, sessions=2)


@with_ray
def test_interrupted_terminated_and_shared(tmp_path, alone):
    for sent, status in (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM):
        driver = Driver(tmp_path)
        driver.when_rows(1)
        os.killpg(driver.process.pid, sent)  # SIGINT reaches all of a terminal's processes
        ended, _, err = driver.end()
        assert ended == status
        assert err.endswith("ed; the same command goes on from the last checkpoint\n")
        assert err.count("\n") == 1
        assert driver.workers
        assert not driver.workers & set(processes("ray::train_placed"))
    drivers = [Driver(tmp_path) for _ in range(2)]
    for driver in drivers:
        status, out, err = driver.end()
        assert (status, err) == (0, "")
        assert "| Last layer |" in out
    assert_each_trained(tmp_path, alone, sessions=3)


@with_ray
def test_a_machine_of_a_cluster_is_lost(tmp_path, alone):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        driver = Driver(tmp_path, RAY_ADDRESS=cluster.address)
        driver.when_rows(3)
        cluster.remove_node(nodes[0], allow_graceful=False)
        status, out, err = driver.end()
    finally:
        cluster.shutdown()
    assert (status, err) == (0, "")
    assert "2 runs at a time on 2 machines" in out
    assert "it goes on from its last checkpoint" in out
    assert_each_trained(tmp_path, alone, sessions=2)
