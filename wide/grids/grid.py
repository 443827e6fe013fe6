"""Carrying out a study: what is missing of its grid, and training it."""

import contextlib
import math
import shutil
import tempfile

import torch
from tqdm import tqdm

from wide import UserError
from wide.grids.batches import note_other_batches, require_same_batches
from wide.grids.cluster import import_ray
from wide.grids.evaluation import evaluate
from wide.grids.one_run import Failures, Progress, say, train_one
from wide.grids.pace import Pace, counted, makespan
from wide.grids.parallel import train_side_by_side
from wide.grids.study import Study
from wide.runs.files import writing
from wide.runs.folder import FINISHED, RunFolder
from wide.training.devices import threads_for, usable_cores
from wide.training.session import PREPARE, train_as_worker
from wide.training.tasks import Task


def run(study: Study) -> Failures:
    """List the study's runs, or train those that are missing and report.

    Of several processes that train together the first leads, and the others work for it.

    Raises:
        UserError: a wrong command line, missing data, or an outputs folder that cannot be used.
    """
    processes = study.processes
    if study.options.parallel and processes.count > 1:
        raise UserError("--parallel trains each run in one process; start it without torchrun")
    if study.options.action == "profile":
        from wide.training.throughput import profile  # torchvision takes seconds to import

        profile(study.task(), study.runs[0], processes)
        return []
    if not processes.first:
        train_as_worker(processes, study.task)
        return []
    try:
        return run_as_leader(study)
    finally:
        processes.dismiss()


def run_as_leader(study: Study) -> Failures:
    """What the first process, or the only one, does of `run`."""
    if study.subject.distributed:
        note_other_batches(study.folders)
    if study.options.action == "list":
        print_list(study)
        return []
    if study.options.action == "evaluate":
        return evaluate(study)
    if study.options.action == "report":
        print(study.experiment.report.write(study.shown))
        return []
    require_kept_epochs(study)
    if study.options.parallel:
        require_placing(study)
    study.experiment.report.check(study.shown)
    if study.subject.distributed:
        require_same_batches(study.options.step, study.folders)
    failures = train_missing(study)
    try:
        print(study.experiment.report.write(study.shown))
    except UserError:
        if not failures:
            raise
    return failures


def require_kept_epochs(study: Study) -> None:
    """Raise UserError, before any training, for epochs that are asked to be kept but will not be trained."""
    if any(epoch > study.epochs for epoch in study.options.record.keep or ()):
        raise UserError(f"--keep-parameters: training ends at epoch {study.epochs}")


def require_placing(study: Study) -> None:
    """Raise UserError, before any training, where runs cannot be placed side by side."""
    if study.experiment.timed:
        raise UserError("the time of an epoch is measured here, which runs side by side would stretch; no --parallel")
    import_ray()


def print_list(study: Study) -> None:
    states = [folder.status(study.epochs) for folder in study.folders]
    for folder, state in zip(study.folders, states, strict=True):
        print(f"{state:12}  {folder.run.name}")
    finished = sum(state in FINISHED for state in states)
    grid = f"{counted(len(states), 'run')} of {counted(study.epochs, 'epoch')}"
    print(f"{grid}: {finished} done, {len(states) - finished} to train")


def train_missing(study: Study) -> Failures:
    """Train every run whose results are not there; go on where one fails, unless several processes train together.

    Raises:
        UserError: missing data, settings that do not fit them, or an outputs folder that cannot be used.
    """
    missing = [folder for folder in study.folders if not study.experiment.report.has(study.shown, folder)]
    if not missing:
        return []
    study.processes.send(PREPARE)
    task = (study.on_the_processor() if study.options.parallel else study).task()
    require_trainable(study, task, missing)
    if study.kept_epochs:
        require_space(study, task, missing)
    each = f"{counted(study.epochs, 'epoch')}{' each' * (len(missing) > 1)}"
    count = f"{len(missing)} of {counted(len(study.folders), 'run')} to train, {each}"
    pace = Pace(len(task.splits["train"]), study.epochs, products(task, missing))
    print(f"{study.shown.title}: {count}{gain_of_parallel(study, missing, pace)}", flush=True)
    if study.options.parallel:
        del task  # the workers have their own
        failures = train_side_by_side(study, missing, pace)
    else:
        failures = train_in_turn(study, task, missing, pace)
    # What another process was training may be done by now.
    return [(folder, reason) for folder, reason in failures if folder.status(study.epochs) not in FINISHED]


def gain_of_parallel(study: Study, missing: list[RunFolder], pace: Pace) -> str:
    """In words, how many times as fast runs of one thread would be side by side; nothing where that is not much."""
    alone = study.machine.device.type == "cpu" and not study.options.parallel and study.processes.count == 1
    threads = [threads_for(folder.run, study.options.threads) or torch.get_num_threads() for folder in missing]
    if not alone or study.experiment.timed or max(threads) > 1:
        return ""
    left = [pace.left([folder]) for folder in missing]
    gain = sum(left) / max(makespan(left, usable_cores()), 1e-9)
    return f" (--parallel: about {gain:.1f} times as fast)" if gain >= 1.5 else ""


def train_in_turn(study: Study, task: Task, missing: list[RunFolder], pace: Pace) -> Failures:
    """Train these runs one after the other."""
    progress, failures = Progress(study, pace, missing), []
    for folder in tqdm(missing, "runs", unit="run", leave=False, disable=None):
        if folder.status(study.epochs) in FINISHED:
            continue  # another process has trained it meanwhile
        outcome = train_one(study, task, folder, progress)
        if outcome.reason:
            failures.append((folder, outcome.reason))
        if outcome.reason and study.processes.working_now:
            say(f"{outcome.message}  [the other processes cannot go on]")
            break
        say(outcome.message + progress.rest(folder))
    return failures


def require_trainable(study: Study, task: Task, missing: list[RunFolder]) -> None:
    """Raise UserError, before anything is trained, for what would stop these runs, or mix data in their table."""
    for folder in missing:
        task.check(folder.run)
    for folder in study.folders:
        folder.check(task.fingerprint)
    with writing(study.outputs):
        tempfile.TemporaryFile(dir=study.outputs).close()


def products(task: Task, missing: list[RunFolder]) -> dict[int, int]:
    """Of a forward pass, by width; not for widths that are too large to make, as the run itself will say."""
    found = {}
    for width, run in {folder.run.width: folder.run for folder in missing}.items():
        with contextlib.suppress(RuntimeError):
            found[width] = task.products(run)
    return found


def require_space(study: Study, task: Task, missing: list[RunFolder]) -> None:
    """Say how much disk the runs will take; UserError if there is not that much."""
    needed = 0
    for folder in missing:
        try:
            parameters = task.rule(folder.run).state_dict().values()
        except (RuntimeError, MemoryError):  # too large to make: the run itself will say so
            continue
        # The checkpoint, once more while it is replaced, and the parameters of each epoch that is kept.
        needed += (2 + len(study.kept_epochs)) * sum(p.numel() * p.element_size() for p in parameters)
    free = shutil.disk_usage(study.outputs).free
    print(f"they will take up to {volume(needed)} of disk; {volume(free)} are free", flush=True)
    if needed > free:
        raise UserError(f"{study.outputs} has not that much space; use fewer --widths or another --outputs")


def volume(size: int) -> str:
    """Bytes, rounded up for people: 1 MB, 34 GB."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{math.ceil(size / unit)} {name}"
