"""Running the scripts as their users do, in processes of their own."""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
LIMIT = 300  # seconds
# What scripts import, in a process that scripts are forked from: importing torch takes seconds.
IMPORTED = ["wide.command_line", "wide.reports.figures", "wide.training.folder_task"]


def command(name, *arguments, processes=1):
    """The command line of a script, under torchrun where several processes train together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, arguments)]


def script(name, *arguments, cwd=None):
    """The finished process of a script, with its output as text: a fork of one that has imported torch.

    The environment is that of a start of Python; only what is read at its start or by imports is not read anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return fresh_script(name, *arguments, cwd=cwd)
    line = [str(ROOT / name), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        shown = [str(Path(folder, stream)) for stream in ("stdout", "stderr")]
        environment = {**os.environ, **NO_NETWORK}
        process = forking().Process(target=run, args=(line, shown, environment, str(cwd or os.getcwd())))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        return subprocess.CompletedProcess(line, process.exitcode, *(Path(path).read_text("utf-8") for path in shown))


def fresh_script(name, *arguments, processes=1, variables=None, cwd=None):
    """The same from a start of Python; `variables` of the environment replace ours."""
    environment = {**os.environ, **NO_NETWORK, **(variables or {})}
    line = command(name, *arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=LIMIT, cwd=cwd)


@functools.cache
def forking():
    """The context of such processes, once the one is started that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def run(line, shown, environment, cwd):
    """What a fork does: a script, with its output in two files."""
    for stream, path in enumerate(shown, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")
