"""Output that ends early: the work goes on, and what ended is said once, on what is left."""

import subprocess
import sys

import pytest
from running import ROOT

pytestmark = pytest.mark.quick

PROGRAM = """
import sys
from wide.printing import lasting
with lasting():
    for number in range(5):
        print(number, flush=True)
        print("note", file=sys.stderr)
    print("not flushed")
open(sys.argv[1], "w").write("done")
"""


def worked(shell, tmp_path):
    """What is left on stderr of a program under this shell command, which ends well and without a word of Python's."""
    line = ["bash", "-o", "pipefail", "-c", shell.replace("PROGRAM", '"$0" -c "$1" "$2"')]
    done = subprocess.run(
        [*line, sys.executable, PROGRAM, tmp_path / "work"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "work").read_text() == "done"
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("shell", "reason"), [("PROGRAM > /dev/full", "No space left on device"), ("PROGRAM | true", "Broken pipe")]
)
def test_what_can_no_longer_be_printed_is_said_once(tmp_path, shell, reason):
    said = worked(shell, tmp_path)
    assert said.count("note") == 5
    assert said.count(f"nothing more can be printed ({reason}); the work goes on") == 1


@pytest.mark.parametrize(
    "shell", ["PROGRAM >&-", "PROGRAM > /dev/null 2> /dev/full", "PROGRAM 2>&-", "PROGRAM >&- 2>&-"]
)
def test_without_an_output(tmp_path, shell):
    assert set(worked(shell, tmp_path)) <= {"note"}


def test_output_that_lasts(tmp_path):
    assert "not flushed" in worked("PROGRAM | cat >&2", tmp_path)
