"""Surroundings that differ: notebooks, other operating systems and file systems, schedulers, plain terminals."""

import ast
import errno
import os
import subprocess
import sys

import pytest
from running import ROOT, fresh_script

from wide import UserError
from wide.reports.report import write_report
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.folder_task import _cores
from wide.training.processes import join

RUN = Run("add", "rnn", "fa", 4, 0.001, 99, 50)
TINY = ["--widths", 8, "--rules", "backprop", "--epochs", 1]
SCRIPTS = sorted(path for stem in ("setup", "train", "alignment") for path in ROOT.glob(f"{stem}_*.py"))


def test_a_notebooks_backend_and_a_terminal_of_ascii(tmp_path):
    """The backend is never loaded, and need not be installed; what the terminal lacks is a question mark."""
    variables = {"MPLBACKEND": "module://no_such_module.backend_inline", "PYTHONIOENCODING": "ascii"}
    arguments = [1, *TINY, "--seeds", 1, 2, "--outputs", tmp_path]
    done = fresh_script("train_add.py", *arguments, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "add" / "experiment_1.md").read_text(encoding="utf-8")
    assert " ± " in text
    assert text.replace("±", "?") in done.stdout
    assert (tmp_path / "add" / "experiment_1.csv").exists()
    assert (tmp_path / "add" / "experiment_1.png").exists()


def test_importing_leaves_pyplot_alone_and_sets_no_hook():
    program = "import sys, train_add, wide.reports.figures"
    program += "; print('matplotlib.pyplot' in sys.modules, sys.excepthook is sys.__excepthook__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False True\n", done.stderr


def test_a_figure_that_fails_is_a_note(tmp_path, capsys):
    def draw(file):
        file.write(b"half of a figure")
        raise RuntimeError("no fonts")

    (tmp_path / "report.png").write_text("an earlier one")
    text = write_report(tmp_path / "report", "a,b\n", "# Title\n", draw)
    assert text.endswith("written to " + str(tmp_path / "report") + ".csv, .md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.md"]
    note = capsys.readouterr().err
    assert note.startswith("note: ")
    assert "no fonts" in note


def test_other_errors_of_locks_are_errors(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="Input/output error"), RunFolder(tmp_path, RUN).locked():
        pass


def test_systems_that_do_not_say_which_cores_are_free(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert _cores() >= 1


@pytest.mark.parametrize("size", ["4", "0", "many"])
def test_a_world_size_that_a_scheduler_left(monkeypatch, size):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"WORLD_SIZE is {size} here .* start with torchrun, or unset"):
        join(None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_show_interrupts_in_a_line_from_the_start(path):
    """The hook is set before anything that imports torch, and only where the script is run."""
    body = ast.parse(path.read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module.startswith("wide")]
    guards = [node for node in body if isinstance(node, ast.If) and "install_excepthook()" in ast.unparse(node)]
    assert [alias.name for alias in imports[0].names] == ["install_excepthook"]
    assert len(guards) == 1
    early = [node for node in body if isinstance(node, ast.Import) and node.lineno < guards[0].lineno]
    assert {node.names[0].name for node in early} <= sys.stdlib_module_names
