"""What a worker of Ray does: train runs that it is handed, on the device of its machine."""

import contextlib
import dataclasses
import functools
import io
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from wide import UserError
from wide.grids.one_run import Outcome, train_one
from wide.grids.study import Machine, Study
from wide.runs.folder import FINISHED, RunFolder
from wide.runs.run import Run
from wide.training.memory import keep_memory
from wide.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is trained. `gpu`: its number on that machine, if it is one."""

    host: str
    gpu: str = ""


def train_placed(packed: bytes, run: Run) -> Iterator[Place | str | Outcome | None]:
    """What a worker does: say where it is, train the run, and say what it noted and how it went; None: it was done."""
    study = unpacked(packed)
    on_gpu = study.machine.device.type == "cuda"
    yield Place(socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", "") if on_gpu else "")
    notes = io.StringIO()
    with contextlib.redirect_stderr(notes):
        outcome = _train(packed, run)
    yield notes.getvalue()
    yield outcome


def _train(packed: bytes, run: Run) -> Outcome | None:
    study = unpacked(packed)
    folder = RunFolder(study.options.outputs, run)
    if folder.status(study.epochs) in FINISHED:
        return None
    try:
        return train_one(*prepared(packed), folder)
    except UserError as error:  # the device, or the data, of this machine
        return Outcome(f"{run.name}: failed: {error}", str(error))


unpacked = functools.cache(pickle.loads)  # once per worker, which trains several runs


@functools.cache
def prepared(packed: bytes) -> tuple[Study, Task]:
    """A study on this worker's own device, and its data.

    Raises:
        UserError: there is no such device here, or no data.
    """
    study = unpacked(packed)
    keep_memory()
    torch.set_num_threads(study.options.parallel.threads)
    device, precision = study.machine.device.type, study.machine.precision  # as the driver has chosen them
    options = dataclasses.replace(study.options, device=device, precision=precision)
    study = dataclasses.replace(study, machine=Machine.alone(options))
    return study, study.task()


def look_around(marker: Path, data: Path | None) -> str | None:
    """Why runs cannot be trained on a machine, if they cannot: it does not see this file, or that folder."""
    for path, option in ((marker, "--outputs"), (data, "--data-dir")):
        if path and not path.exists():
            seen = path.parent if path == marker else path
            return f"does not see {seen}; choose {option} on a file system that all machines share"
    return None
