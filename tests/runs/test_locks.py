"""One process at a time: with locks and without, on this machine and on others; what dead processes leave."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from running import ROOT

from wide import UserError
from wide.reports.report import write_report
from wide.runs import files, locks
from wide.runs.files import temporary_name
from wide.runs.folder import RunFolder
from wide.runs.locks import Busy, Claim
from wide.runs.run import Run
from wide.training.session import train
from wide.training.tasks import AddTask

pytestmark = pytest.mark.quick

RUN = Run("add", "rnn", "fa", 4, 0.001, 99, 50, variant="published")

# How a system is without the locks of this one.
SYSTEMS = {
    "flock": None,
    "ENOSYS": errno.ENOSYS,
    "ENOLCK": errno.ENOLCK,
    "EOPNOTSUPP": errno.EOPNOTSUPP,
    "local flock": 0,  # of another machine: every lock succeeds
    "no fcntl": "Windows",
}


def as_on(patch, system):
    code = SYSTEMS[system]
    if code == "Windows":
        patch.setattr(locks, "fcntl", None)
    elif code is not None:

        def flock(*_):
            if code:
                raise OSError(code, os.strerror(code))

        patch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_process_at_a_time(tmp_path, monkeypatch, capsys, system):
    as_on(monkeypatch, system)
    first, second = RunFolder(tmp_path, RUN), RunFolder(tmp_path, RUN)
    with first.locked(), pytest.raises(Busy), second.locked():
        pass
    with second.locked():
        assert (second.path / ".claim").exists()
    assert not (second.path / ".claim").exists()
    assert capsys.readouterr().err == ""


HOLD = """
import sys, time
from pathlib import Path
from wide.runs import locks
locks.fcntl = None
with locks.Claim(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder, by its claim alone."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_claim_ends_with_its_process(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(Busy), Claim(tmp_path).held():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Claim(tmp_path).held():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.fixture
def brief(monkeypatch):
    """Leases of a second."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "NAMING", 0.5)


def of_another_machine(folder, age=0.0):
    """Leave a claim as a process of another machine would, that died so many seconds ago."""
    claim = Claim(folder)
    with claim.held():
        content = claim.path.read_text()
    assert os.uname().nodename in content
    claim.path.write_text(content.replace(os.uname().nodename, "elsewhere"))
    os.utime(claim.path, (time.time() - age,) * 2)


def test_a_claim_of_another_machine_is_respected_while_it_is_fresh(tmp_path, brief):
    of_another_machine(tmp_path)
    with pytest.raises(Busy), Claim(tmp_path).held():
        pass


def test_a_claim_of_another_machine_that_has_gone_silent_is_taken_over(tmp_path, brief):
    of_another_machine(tmp_path, age=30)
    with Claim(tmp_path).held():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_claim_of_another_machine_that_wakes_up_is_left_to_it(tmp_path, brief):
    of_another_machine(tmp_path, age=30)
    timer = threading.Timer(0.3, os.utime, [tmp_path / ".claim"])
    timer.start()
    with pytest.raises(Busy), Claim(tmp_path).held():
        pass
    timer.join()


def test_a_claim_whose_maker_died_before_it_wrote_its_name(tmp_path, brief):
    (tmp_path / ".claim").touch()
    with Claim(tmp_path).held():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_claim_that_is_being_written(tmp_path, brief):
    of_another_machine(tmp_path)
    named = (tmp_path / ".claim").read_text()
    (tmp_path / ".claim").write_text("")
    timer = threading.Timer(0.1, (tmp_path / ".claim").write_text, [named])
    timer.start()
    with pytest.raises(Busy), Claim(tmp_path).held():
        pass
    timer.join()


def test_who_lost_its_claim_writes_no_more(tmp_path, monkeypatch, brief):
    """As a process that was suspended while another took over."""
    task, folder = AddTask("published", torch.device("cpu")), RunFolder(tmp_path, RUN)
    begin = RunFolder.begin_session

    def lose(self, *arguments):
        begin(self, *arguments)
        (self.path / ".claim").unlink()
        deadline = time.monotonic() + 30
        while not self.claim.lost and time.monotonic() < deadline:
            time.sleep(0.05)

    monkeypatch.setattr(RunFolder, "begin_session", lose)
    with pytest.raises(UserError, match="taken over by another process"):
        train(task, folder, 3)
    assert folder.rows() == []


# ------------------------------------------------------------------------------------------------- what the dead leave


def dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_removes_what_killed_processes_left_in_its_folder(tmp_path):
    task, folder = AddTask("published", torch.device("cpu")), RunFolder(tmp_path, RUN)
    (folder.path / "parameters").mkdir(parents=True)
    for name in (".checkpoint.pt.4242", f".checkpoint.pt.{files.HOST}.{os.getpid()}.part", ".config.json.else.7.part"):
        (folder.path / name).touch()
    (folder.path / "parameters" / ".epoch_2.pt.4242").touch()
    train(task, folder, 1)
    assert {path.name for path in folder.path.glob(".*")} == {".lock"}
    assert not list((folder.path / "parameters").iterdir())


def test_a_report_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    gone, mine = f".experiment_1.png.{files.HOST}.{dead()}.part", temporary_name("experiment_1.png")
    theirs, old = ".experiment_1.png.elsewhere.7.part", ".experiment_2.csv.4242"
    for name in (gone, mine, theirs, old, ".hidden", ".bashrc.4242"):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (1, 1))
    write_report(tmp_path / "experiment_3", "a\n", "b\n", lambda file: file.write(b"c"))
    kept = {path.name for path in tmp_path.glob(".*")}
    assert kept == {mine, theirs, ".hidden", ".bashrc.4242"}


def test_processes_are_not_asked_where_asking_would_end_them(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "name", "nt")
    monkeypatch.setattr(files.os, "kill", lambda *_: pytest.fail("on Windows this ends the process"))
    assert files._alive(1)
