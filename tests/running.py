"""Running the scripts: in this process, or as their users do in processes of their own."""

import contextlib
import functools
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
LIMIT = 300  # seconds
# What scripts import, in a process that scripts are forked from: importing torch takes seconds.
IMPORTED = ["wide.command_line", "wide.reports.figures", "wide.training.folder_task"]


def command(name, *arguments, processes=1):
    """The command line of a script, under torchrun where several processes train together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, arguments)]


class Script:
    """A script under way: a fork of a process that has imported torch.

    The environment is that of a start of Python; only what is read at its start or by imports is not read anew.
    """

    def __init__(self, name, *arguments, variables=()):
        self.line, self.folder = [str(ROOT / name), *map(str, arguments)], tempfile.TemporaryDirectory()
        self.shown = [str(Path(self.folder.name, stream)) for stream in ("stdout", "stderr")]
        environment = {**os.environ, **NO_NETWORK, **dict(variables)}
        self.process = forking().Process(target=run, args=(self.line, self.shown, environment))
        self.process.start()

    def ended(self):
        return self.process.exitcode is not None

    def send(self, number):
        os.kill(self.process.pid, number)

    def finished(self):
        """Its exit status and output, as text."""
        self.process.join(LIMIT)
        if not self.ended():
            self.process.kill()
        output = [Path(path).read_text("utf-8") for path in self.shown]
        return subprocess.CompletedProcess(self.line, self.process.exitcode, *output)


def script(name, *arguments, processes=1, cwd=None):
    """A finished script; of several processes that train together, the first.

    One alone runs in this process, which has torch and the graphs of networks already; a new one would make them anew.
    """
    if processes > 1:
        return together(processes, name, *arguments)
    line = [str(ROOT / name), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        patch.setattr(sys, "excepthook", sys.excepthook)
        stack.enter_context(mock.patch.dict(os.environ, NO_NETWORK))
        stack.enter_context(contextlib.chdir(cwd or os.getcwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(shown_warnings())
        stack.callback(torch.use_deterministic_algorithms, False)  # as --deterministic may leave it
        try:
            runpy.run_path(line[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
    return subprocess.CompletedProcess(line, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def shown_warnings():
    """Warnings go to stderr, as they do where pytest does not collect them."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)
        warnings.filterwarnings("ignore", "Guards may run slower on Python")  # torch's advice on 3.13.0
        warnings.showwarning = lambda *message, **_: sys.stderr.write(warnings.formatwarning(*message[:4]))
        yield


def together(processes, name, *arguments):
    """See `script`; started as by torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    scripts = [Script(name, *arguments, variables={key: str(value) for key, value in v.items()}) for v in places]
    first, *_ = [one.finished() for one in scripts]
    return first


def fresh_script(name, *arguments, variables):
    """The same from a start of Python, with these variables of the environment."""
    environment = {**os.environ, **NO_NETWORK, **variables}
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, env=environment, timeout=LIMIT)


@functools.cache
def forking():
    """The context of such processes, once the one is started that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def run(line, shown, environment):
    """What a fork does: a script, with its output in two files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, wherever the tests run
    for stream, path in enumerate(shown, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")
