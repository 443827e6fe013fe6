"""Runs side by side: every run that a grid lacks is a task of Ray, on a core or a GPU of this machine or of a cluster.

Ray places runs and does nothing else. The truth is in outputs/: whoever trains a run holds its folder, and the rows
there tell the driver how far it is. So several drivers can share a grid, and a run whose worker died goes on from its
checkpoint, wherever it is placed then.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import math
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from wide import UserError
from wide.grids.grid import Failures, Outcome, first_line, say, train_one
from wide.grids.pace import Pace, duration, makespan
from wide.grids.study import Machine, Study
from wide.runs.files import writing
from wide.runs.folder import FINISHED, Run, RunFolder
from wide.training.devices import usable_cores
from wide.training.memory import keep_memory
from wide.training.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 3  # workers that may die over a run one after the other, none of them an epoch further than the one before
ASK_AGAIN = 10  # seconds, for runs that other processes train
LOOK = 1  # seconds between looks at the rows of runs
TELL = 600  # seconds between lines of progress where there is no terminal
SHOWN = 8  # runs that are named there
ANSWER = 300  # seconds that a machine has to start a worker
OBJECT_STORE = 100_000_000  # bytes; nothing large goes through it
# Of what Ray prints, users can act on nothing: what they can is said here. To be set before it is imported.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def import_ray() -> ModuleType:
    """
    Raises:
        UserError: it is not installed.
    """
    os.environ.update(QUIET)
    try:
        import ray
    except ImportError as error:
        raise UserError("--parallel needs Ray, which is missing here: pip install -r requirements-ray.txt") from error
    return ray


def train_side_by_side(study: Study, missing: list[RunFolder], pace: Pace) -> Failures:
    """Train these runs on whatever cores or GPUs there are. Ctrl-C and SIGTERM end the workers, too.

    Raises:
        UserError: no cluster answers, none of its machines has what a run needs, or one does not see the same files.
    """
    ray = import_ray()
    try:
        with cluster(ray, elsewhere(study)) as places:
            folders = in_order(missing, pace, places.slots())
            say(f"{places}{'; widest first' if folders != missing else ''}")
            with Driver(places, folders, pace) as driver:
                return driver.work()
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up ({first_line(error)}); the same command goes on") from error


def elsewhere(study: Study) -> Study:
    """The study for processes that work in other folders."""
    options = study.options
    data = dataclasses.replace(options.data, folder=options.data.folder.absolute())
    options = dataclasses.replace(options, outputs=options.outputs.absolute(), data=data)
    return dataclasses.replace(study, options=options)


def in_order(missing: list[RunFolder], pace: Pace, slots: int) -> list[RunFolder]:
    """The widest first if that shortens the whole by a twentieth; else as they are, which fills the table evenly."""
    widest_first = sorted(missing, key=lambda folder: -folder.run.width)
    as_they_are, other = (makespan([pace.left([f]) for f in order], slots) for order in (missing, widest_first))
    return widest_first if other < 0.95 * as_they_are else missing


# ------------------------------------------------------------------------------------------------------------- a worker


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


# ------------------------------------------------------------------------------------------------------------ a cluster


@contextlib.contextmanager
def cluster(ray: ModuleType, study: Study) -> Iterator["Places"]:
    """Connected to the Ray cluster that runs here, else to one of this machine alone, which ends with this.

    Raises:
        UserError: see `train_side_by_side`.
    """
    previous, logs = signal.getsignal(signal.SIGTERM), None
    if not _started():
        # On a path that is short enough for a socket's name.
        logs = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp" if Path("/tmp").is_dir() else None))
    places = Places(ray, study, logs)
    try:
        _connect(ray, study, logs)
        signal.signal(signal.SIGTERM, places.terminate)  # after Ray, which sets its own
        if not places.slots():
            raise UserError(f"no machine here has {places.share_text}; start fewer at a time, or on another --device")
        _require_same_files(ray, study)
        yield places
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # no worker is to outlive this
        ray.shutdown()
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, previous)
        if logs and not places.keep_logs:
            shutil.rmtree(logs, ignore_errors=True)
        if places.terminated:
            print("terminated; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


def _started() -> bool:
    """Whether there is a cluster to join: RAY_ADDRESS names it, or `ray start` has left a note of it here."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address != "local"
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").exists()


def _connect(ray: ModuleType, study: Study, logs: Path | None) -> None:
    """To a cluster that was started; or, if there is a folder for its logs, to a new one."""
    threads = str(study.options.parallel.threads)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}
    settings = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        raise UserError("RAY_ADDRESS is of Ray's client; start on a machine of the cluster, with its host:port there")
    if logs:
        settings |= {"address": "local", "num_cpus": usable_cores(), "object_store_memory": OBJECT_STORE}
        settings |= {"include_dashboard": False, "_temp_dir": str(logs)}
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = "unset RAY_ADDRESS, or end that cluster with `ray stop`, for one of this machine alone"
        raise UserError(f"no Ray cluster can be joined or started ({first_line(error)}); {remedy}") from error


def _require_same_files(ray: ModuleType, study: Study) -> None:
    """Raise UserError for a machine of the cluster that does not see this code, the outputs and the data."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mine = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    others.pop(mine, None)
    if not others:
        return
    data = study.options.data.folder if study.options.data.folder.exists() else None
    marker = study.outputs / f".seen-by-all-{secrets.token_hex(8)}"
    task = ray.remote(num_cpus=0, max_retries=0)(look_around)
    with writing(study.outputs):
        marker.touch()
    try:
        there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in others}
        answers = {node: task.options(scheduling_strategy=there[node]).remote(marker, data) for node in others}
        for node, answer in answers.items():
            try:
                found = ray.get(answer, timeout=ANSWER)
            except ray.exceptions.RayError as error:
                found = f"cannot run {ROOT} ({first_line(error)}); all machines must see it, with the same Python"
            if found:
                raise UserError(f"{others[node]}, a machine of the Ray cluster, {found}")
    finally:
        marker.unlink(missing_ok=True)


class Places:
    """What there is to place runs on.

    Attributes:
        keep_logs: whether Ray's logs stay, where it was started here.
        terminated: whether SIGTERM has ended this process' work.

    Args:
        study: for processes elsewhere.
        logs: Ray's folder, if it was started here.
    """

    def __init__(self, ray: ModuleType, study: Study, logs: Path | None):
        self.ray, self.study, self.logs = ray, study, logs
        self.keep_logs = self.terminated = False
        self.on_gpus = study.machine.device.type == "cuda"
        self.packed = ray.cloudpickle.dumps(study)
        self.task = ray.remote(num_returns="streaming", max_retries=0, scheduling_strategy="SPREAD")(train_placed)

    def terminate(self, *_) -> None:
        """A handler of SIGTERM. Ray makes a plain KeyboardInterrupt of whatever is raised while it waits."""
        self.terminated = True
        raise KeyboardInterrupt

    def share(self, times: int = 1) -> dict[str, float]:
        """The part of a machine that a run takes, or so many times that."""
        parallel = self.study.options.parallel
        if self.on_gpus:  # to four digits, rounded down: that is how finely Ray counts
            return {"num_cpus": 0, "num_gpus": min(math.floor(1e4 / parallel.runs_per_gpu) / 1e4 * times, 1)}
        return {"num_cpus": parallel.threads * times, "num_gpus": 0}

    @property
    def share_text(self) -> str:
        return "a GPU that Ray knows of" if self.on_gpus else f"{self.study.options.parallel.threads} cores for a run"

    def machines(self) -> list[int]:
        """How many runs fit on each machine that is there now."""
        kind, name = ("GPU", "num_gpus") if self.on_gpus else ("CPU", "num_cpus")
        found = [node["Resources"].get(kind, 0) for node in self.ray.nodes() if node["Alive"]]
        return [fitting for amount in found if (fitting := int(amount / self.share()[name]))]

    def slots(self) -> int:
        """How many runs at a time."""
        return sum(self.machines())

    def start(self, run: Run, times: int):
        """Have a run trained that takes so many shares of a machine.

        Returns:
            Ray's generator of references to what `train_placed` says.
        """
        return self.task.options(**self.share(times)).remote(self.packed, run)

    def __str__(self) -> str:
        parallel, machines = self.study.options.parallel, self.machines()
        where = f"on {len(machines)} machine{'s' * (len(machines) > 1)}" if self.logs is None else "here"
        threads = "1 thread" if parallel.threads == 1 else f"{parallel.threads} threads"
        each = f"{parallel.runs_per_gpu} on each GPU" if self.on_gpus else f"{threads} each"
        return f"{sum(machines)} runs at a time {where}, {each}"


# ----------------------------------------------------------------------------------------------------------- the driver


@dataclasses.dataclass
class Going:
    """A run that was handed to Ray.

    Attributes:
        place: where it is, once a worker has begun.
        begun: when, and after which epoch.
        seen: when an epoch was last seen to have ended, and which.
    """

    folder: RunFolder
    place: Place | None = None
    begun: tuple[float, int] = (0.0, 0)
    seen: tuple[float, int] | None = None

    def trained(self) -> int:
        return self.folder.progress()[0]


class Driver:
    """Hands runs to Ray, follows them by their rows, and starts those again whose workers died."""

    def __init__(self, places: Places, folders: list[RunFolder], pace: Pace):
        self.ray, self.places, self.pace = places.ray, places, pace
        self.epochs, self.total = places.study.epochs, len(folders)
        self.queue = deque(folders)
        self.tasks: dict[object, Going] = {}
        self.left_to_others: dict[RunFolder, float] = {}  # and when to ask for them again
        self.deaths: dict[RunFolder, tuple[int, int]] = {}  # at which epoch, and how many there
        self.times: dict[RunFolder, int] = {}  # shares of a machine that a run takes, where it is not one
        self.failures: Failures = []
        self.done, self.told_waiting, self.noted = 0, False, set()
        self.board = Board(min(places.slots(), SHOWN))

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_) -> None:
        self.board.close()
        for task in self.tasks:
            self.ray.cancel(task, force=True)  # a cluster that was joined lives on

    def work(self) -> Failures:
        """Until every run is finished or has failed."""
        looked = 0.0
        while self.queue or self.tasks or self.left_to_others:
            self.ask_again()
            self.hand_out()
            if self.tasks:
                ready, _ = self.ray.wait(list(self.tasks), timeout=LOOK)
                for task in ready:
                    self.hear(task)
            else:
                self.wait_for_others()
            if time.monotonic() - looked >= LOOK:
                self.look()
                looked = time.monotonic()
        return self.failures

    def hand_out(self) -> None:
        """As many runs as can be trained, and once more as many to follow them."""
        waiting = sum(going.place is None for going in self.tasks.values())
        for _ in range(min(self.places.slots() - waiting, len(self.queue)) if self.queue else 0):
            folder = self.queue.popleft()
            self.tasks[self.places.start(folder.run, self.times.get(folder, 1))] = Going(folder)

    def hear(self, task) -> None:
        """What a worker says next, or that it died."""
        going, errors = self.tasks[task], self.ray.exceptions
        try:
            said = self.ray.get(next(task))
        except errors.RayTaskError as error:  # of this module, whose errors no run's folder has
            said = Outcome(f"{going.folder.run.name}: failed: {first_line(error)}", first_line(error))
        except errors.RayError as error:
            del self.tasks[task]
            self.died(going, error)
            return
        if isinstance(said, Place):
            going.place, going.begun = said, (time.monotonic(), going.trained())
        elif isinstance(said, str):
            self.note(said)
        else:
            del self.tasks[task]
            self.ended(going, said)

    def ended(self, going: Going, outcome: Outcome | None) -> None:
        folder = going.folder
        if outcome and outcome.busy:
            self.left_to_others[folder] = time.monotonic() + ASK_AGAIN
            return
        if outcome and outcome.reason:
            self.failures.append((folder, outcome.reason))
        else:
            self.done += 1
            self.saw_the_whole_of(going)
        if outcome:  # else another process has trained it, and said so
            say(f"{outcome.message}  [{self.summary()}]")

    def died(self, going: Going, error: Exception) -> None:
        """Have a run go on whose worker died; unless that led nowhere several times."""
        folder, errors = going.folder, self.ray.exceptions
        trained = going.trained()
        before, times = self.deaths.get(folder, (trained, 0))
        self.deaths[folder] = trained, (times + 1 if trained == before else 1)
        why = "its process was killed or crashed"
        if isinstance(error, errors.NodeDiedError):
            why = "its machine was lost"
        elif isinstance(error, errors.OutOfMemoryError):
            why = "memory ran short"  # so fewer beside it
            self.times[folder] = min(2 * self.times.get(folder, 1), max(self.places.machines(), default=1))
        where = f" ({self.where(going.place)})" if going.place and self.where(going.place) else ""
        if self.deaths[folder][1] < ATTEMPTS:
            say(f"{folder.run.name}: {why}{where}; it goes on from its last checkpoint")
            self.queue.appendleft(folder)
            return
        self.places.keep_logs = True
        logs = f"; Ray's logs are in {self.places.logs}" if self.places.logs else ""
        say(f"{folder.run.name}: failed: {why}{where}, {ATTEMPTS} times after epoch {trained}")
        self.failures.append((folder, f"{why}, {ATTEMPTS} times after epoch {trained}{logs}"))

    def note(self, text: str) -> None:
        """What workers print on stderr, each line once."""
        for line in text.splitlines():
            if line.strip() and line not in self.noted:
                self.noted.add(line)
                tqdm.write(line, file=sys.stderr)

    def ask_again(self) -> None:
        """Queue the runs of others that may be free by now."""
        for folder, when in list(self.left_to_others.items()):
            if folder.status(self.epochs) in FINISHED:
                self.done += 1
            elif time.monotonic() >= when:
                self.queue.append(folder)
            else:
                continue
            del self.left_to_others[folder]

    def wait_for_others(self) -> None:
        if self.left_to_others and not self.told_waiting:
            number = len(self.left_to_others)
            runs = "the last run, which another process trains" if number == 1 else f"{number} runs of other processes"
            say(f"waiting for {runs}; what they leave goes on here")
            self.told_waiting = True
        time.sleep(LOOK)

    # --- how far it is

    def look(self) -> None:
        """See which epochs have ended, and show it."""
        now = time.monotonic()
        for going in self.under_way():
            trained = going.trained()
            before = going.seen[1] if going.seen else going.begun[1]
            if trained > before:
                if going.seen:  # else it was the first here, which pays for what happens only once
                    self.pace.saw(going.folder.run, (now - going.seen[0]) / (trained - before))
                going.seen = now, trained
        self.board.show(self.summary, self.lines)

    def saw_the_whole_of(self, going: Going) -> None:
        """Time a run by its whole length, where it was too short to see its epochs end."""
        when, before = going.begun
        if going.folder.run.width not in self.pace.seen and (epochs := going.trained() - before) > 0:
            self.pace.saw(going.folder.run, (time.monotonic() - when) / epochs)

    def under_way(self) -> list[Going]:
        return [going for going in self.tasks.values() if going.place]

    def summary(self) -> str:
        words = [f"{self.done} of {self.total} runs done", f"{len(self.under_way())} under way"]
        waiting = [going.folder for going in self.tasks.values() if not going.place]
        folders = [*(going.folder for going in self.under_way()), *waiting, *self.queue]
        if folders and self.pace.seen and (slots := self.places.slots()):
            words.append(f"about {duration(makespan([self.pace.left([f]) for f in folders], slots))} left")
        return ", ".join(words)

    def lines(self) -> list[str]:
        """The runs that are under way: where, which, how far."""
        found = []
        for going in self.under_way():
            place = self.where(going.place)
            found.append(
                f"{place}{': ' * bool(place)}{going.folder.run.name}, epoch {going.trained()} of {self.epochs}"
            )
        return found

    def where(self, place: Place) -> str:
        """As much of it as tells it apart here."""
        host = place.host if self.places.logs is None else ""
        return " ".join(filter(None, (host, f"GPU {place.gpu}" if place.gpu else "")))


class Board:
    """Progress in one place: lines that change on a terminal, one and so many for runs; elsewhere one now and then."""

    def __init__(self, runs: int):
        form = {"bar_format": "{desc}", "leave": False, "disable": None, "dynamic_ncols": True}
        self.bars = [tqdm(position=place, **form) for place in range(1 + runs)]
        self.told = time.monotonic()

    def show(self, summary, lines) -> None:
        """What these functions say."""
        if not self.bars[0].disable:
            shown = lines()
            room = len(self.bars) - 1
            more = [f"and {len(shown) - room + 1} more"] if len(shown) > room else []
            texts = [summary(), *(f"  {line}" for line in [*shown[: room - len(more)], *more])]
            for bar, text in itertools.zip_longest(self.bars, texts, fillvalue=""):
                bar.set_description_str(text)
        elif time.monotonic() - self.told >= TELL:
            say(f"{summary()}: {'; '.join(lines()[:SHOWN])}")
            self.told = time.monotonic()

    def close(self) -> None:
        for bar in reversed(self.bars):
            bar.close()
