"""The machines that Ray places runs on: joined where there is a cluster, else made of this one."""

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from wide import UserError
from wide.grids.one_run import first_line
from wide.grids.pace import counted
from wide.grids.study import Study
from wide.grids.worker import look_around, train_placed
from wide.runs.files import writing
from wide.runs.run import Run
from wide.training.devices import usable_cores

ROOT = Path(__file__).resolve().parents[2]
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
        return (
            "a GPU that Ray knows of"
            if self.on_gpus
            else f"{counted(self.study.options.parallel.threads, 'core')} for a run"
        )

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
        where = f"on {counted(len(machines), 'machine')}" if self.logs is None else "here"
        each = f"{parallel.runs_per_gpu} on each GPU" if self.on_gpus else f"{counted(parallel.threads, 'thread')} each"
        return f"{counted(sum(machines), 'run')} at a time {where}, {each}"
