"""What becomes of runs that are killed, and of files that are damaged.

    python3 benchmarks/faults.py [--moments 200] [--corruptions 200] [--seed 0] [--jobs NAME ...]

Each job is a command of a second or so on tiny networks. It is started, ended by SIGKILL, SIGTERM or SIGINT at a random
moment, and started again: the second start must end with the metrics, angles, parameters and data of one that nobody
disturbed, and leave no temporary file and no claim. Then files of a finished run are truncated, emptied, filled with
garbage, replaced by another run's, or a bit of them is flipped, and the run is told to go on: it must refuse in a line
or end with the same numbers. Then disks fill, and several processes share a grid. Prints a table of each; exits with 1
if something was not as promised.

Processes are forked from this one, which has imported torch and trained nothing, so a start takes little. POSIX only.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import http.server
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import alignment_add
import train_add
import wide.reports.figures  # noqa: F401  (here, so that no process pays for importing it)
from setup_kmnist import KMNIST, write_idx
from wide.command_line import main as run_command
from wide.command_line import setup
from wide.grids.alignment_experiments import scored
from wide.runs.checkpoints import digest

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STAYS = {".lock"}  # of hidden files in a run's folder


def train(*words: object) -> int:
    return run_command("", train_add.SUBJECT, train_add.EXPERIMENTS, [str(word) for word in words])


def align(*words: object) -> int:
    return run_command("", scored(train_add.SUBJECT), alignment_add.EXPERIMENTS, [str(word) for word in words])


@dataclass(frozen=True)
class Job:
    """A command, given a folder to work in; `longer` is one that goes on with what it leaves, and is compared with."""

    start: Callable[[Path], int]
    longer: Callable[[Path], int] | None = None


def training(epochs: int, *more: str) -> Callable[[Path], int]:
    return lambda place: train(1, "--rules", "align_ada", "--widths", 8, "--epochs", epochs, "--outputs", place, *more)


ALIGNMENT = ("--widths", 8, "--keep-parameters", 0, 4)


def alignment(place: Path) -> int:
    return align(2, *ALIGNMENT, "--epochs", 4, "--outputs", place)


def longer_alignment(place: Path) -> int:
    """Two epochs more; then scores of the parameters that were kept before."""
    return align(2, *ALIGNMENT, "--epochs", 6, "--outputs", place) or align(
        2, *ALIGNMENT, "--epochs", 4, "--shuffle-seed", 5, "--outputs", place
    )


GRID = ("--rules", "backprop", "align_ada", "align_zero", "last_layer", "--widths", 4, 8, "--epochs", 4)

# Other ways to start runs go here: a row each.
JOBS = {
    "training": Job(training(6), training(9)),
    "angles": Job(training(6, "--log-alignment"), training(9, "--log-alignment")),
    "alignment": Job(alignment, longer_alignment),
    "a grid": Job(lambda place: train(1, *GRID, "--outputs", place)),
    "download": Job(lambda place: setup(KMNIST, ["--data-dir", str(place), "--url", Slow.url])),
}
if importlib.util.find_spec("ray"):  # a start takes seconds
    JOBS["side by side"] = Job(lambda place: train(1, *GRID, "--parallel", "--outputs", place))


# ------------------------------------------------------------------------------------------------------------ processes


def fork(work: Callable[[], int], log: Path) -> int:
    """Do this in a process of its own, and return its number."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = work()
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def finish(process: int) -> int:
    """Its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left(place: Path) -> list[str]:
    """What should not be there."""
    return [str(path.relative_to(place)) for path in place.rglob(".*") if path.name not in STAYS]


def numbers(place: Path) -> dict[str, str]:
    """What a folder holds of numbers, without times, by path."""
    return {
        str(path.relative_to(place)): READ[kind](path)
        for path in sorted(place.rglob("*"))
        for kind in READ
        if path.match(kind) and path.is_file()
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> set[str]:
    """The files in which two folders differ."""
    return {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}


def rows(path: Path) -> str:
    found = list(csv.DictReader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    return repr([{key: value for key, value in row.items() if key != "seconds"} for row in found])


def tensors(path: Path) -> str:
    with contextlib.suppress(Exception):
        content = torch.load(path, weights_only=True)
        return digest(content.get("rule", content.get("parameters")))
    return "unreadable"


READ = {
    "metrics.csv": rows,
    "angles.csv": rows,
    "alignment_*.csv": rows,
    "*.pt": tensors,
    "*.gz": lambda path: hashlib.sha256(path.read_bytes()).hexdigest(),
}


# --------------------------------------------------------------------------------------------------------------- checks


class Faults:
    """Runs jobs in folders below `place`, and counts what came of them, by the name of a check."""

    def __init__(self, place: Path, seed: int):
        self.place, self.stream = place, np.random.RandomState(seed)
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.wrong: list[str] = []
        self.made = 0

    def folder(self) -> Path:
        self.made += 1
        return self.place / f"{self.made}"

    def do(self, work: Callable[[Path], int], folder: Path) -> tuple[int, str]:
        """Exit status and output of a job that nobody disturbs."""
        log = self.place / "log"
        status = finish(fork(lambda: work(folder), log))
        return status, log.read_text(encoding="utf-8")

    def reference(self, work: Callable[[Path], int]) -> tuple[Path, dict[str, str], float]:
        """The folder and numbers of a job that nobody disturbs, and how long it takes."""
        folder, start = self.folder(), time.monotonic()
        status, output = self.do(work, folder)
        assert status == 0, output
        return folder, numbers(folder), time.monotonic() - start

    def show(self) -> None:
        """Print what is counted and not printed yet."""
        for check, outcomes in self.counts.items():
            counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            print(f"| {check} | {counted} |", flush=True)
        self.counts.clear()

    def note(self, check: str, outcome: str, why: str = "") -> None:
        self.counts[check][outcome] += 1
        if why:
            self.wrong.append(f"{check}: {why}")

    def same(self, check: str, outcome: str, work: Callable[[Path], int], folder: Path, expected: dict) -> None:
        """Start a job again where another start was ended, and compare."""
        status, output = self.do(work, folder)
        if status:
            self.note(check, "WRONG", f"exit status {status}: {output[-300:]}")
        elif differing := differences(numbers(folder), expected):
            self.note(check, "WRONG", f"other numbers in {differing}")
        elif remains := left(folder):
            self.note(check, "WRONG", f"left behind: {', '.join(remains)}")
        else:
            self.note(check, outcome)
        shutil.rmtree(folder)

    def kill(self, name: str, moments: int) -> None:
        """End a job at random moments by each signal in turn, and start it again."""
        _, expected, seconds = self.reference(JOBS[name].start)
        for number in range(moments):
            by, folder = SIGNALS[number % len(SIGNALS)], self.folder()
            process = fork(lambda folder=folder: JOBS[name].start(folder), self.place / "log")
            time.sleep(self.stream.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, by)
            status = finish(process)
            outcome = "had ended" if status == 0 else by.name
            self.same(f"killed: {name}", outcome, JOBS[name].start, folder, expected)

    def fill(self, name: str, times: int) -> None:
        """A disk on which files end at a random size; then there is room again."""
        whole, expected, _ = self.reference(JOBS[name].start)
        largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        for _ in range(times):
            folder, limit = self.folder(), int(self.stream.uniform(0, largest))

            def work(folder: Path, limit: int = limit) -> int:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                return JOBS[name].start(folder)

            status, output = self.do(work, folder)
            if status and "Traceback" in output:
                self.note(f"disk full: {name}", "WRONG", f"a traceback: {output[-300:]}")
            said = {0: "nothing failed"}.get(status, "said in a line")
            self.same(f"disk full: {name}", said, JOBS[name].start, folder, expected)

    def share(self, processes: int) -> None:
        """Several processes on one grid, started at once; each run must be trained once, and all be done after."""
        job = JOBS["a grid"]
        _, expected, _ = self.reference(job.start)
        folder = self.folder()
        started = [fork(lambda: job.start(folder), self.place / f"log{k}") for k in range(processes)]
        statuses = [finish(process) for process in started]
        logs = [(self.place / f"log{k}").read_text(encoding="utf-8") for k in range(processes)]
        trained = sum(log.count(": done at epoch") for log in logs)
        check = f"{processes} processes, one grid"
        if any(status not in (0, 1) for status in statuses) or any("Traceback" in log for log in logs):
            self.note(check, "WRONG", f"{statuses}: {' '.join(log[-200:] for log in logs)}")
        sessions = [path.read_text().count('"started"') for path in folder.glob("add/*/config.json")]
        if sessions != [1] * 8:
            self.note(check, "WRONG", f"sessions {sessions}, {trained} trained")
        self.same(check, "each run once", job.start, folder, expected)

    def damage(self, name: str, times: int) -> None:
        """Files of a finished run in other states, after which it is told to go on."""
        job = JOBS[name]
        whole, *_ = self.reference(job.start)
        _, expected, _ = self.reference(job.longer)
        other, *_ = self.reference(lambda place: other_run(job, place))
        files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if "." in path.name[1:]]
        files = [path for path in files if path.parent.name != "add"]  # reports are made anew
        for number in range(times):
            path, kind = files[number % len(files)], list(DAMAGES)[number // len(files) % len(DAMAGES)]
            folder = self.folder()
            shutil.copytree(whole, folder)
            (folder / path).write_bytes(DAMAGES[kind]((whole / path).read_bytes(), theirs(other, path), self.stream))
            status, output = self.do(job.longer, folder)
            check, lines = f"{name}, {path.name}: {kind}", output.strip().splitlines()
            if status == 0:
                differing = differences(numbers(folder), expected)
                # Angles that stand there are not read again.
                outcome = "same numbers" if not differing else "kept as it is"
                wrong = differing - ({str(path)} if path.name == "angles.csv" else set())
                self.note(check, "WRONG" if wrong else outcome, f"other numbers in {wrong}" if wrong else "")
            elif "Traceback" in output or not lines[-1].startswith(("failed: ", os.path.basename(sys.argv[0]))):
                self.note(check, "WRONG", output[-300:])
            else:
                self.note(check, "refused")
            shutil.rmtree(folder)


def other_run(job: Job, place: Path) -> int:
    """The same job with another seed."""
    shorter = run_command

    def with_seed(*arguments):
        return shorter(*arguments[:-1], [*arguments[-1], "--seeds", "5"])

    globals()["run_command"] = with_seed  # in this process alone, which ends here
    return job.start(place)


def theirs(other: Path, path: Path) -> bytes:
    """The content of the other run's file of this name."""
    (found,) = (place for place in other.rglob(path.name) if place.is_file() and place.parent.name != "add")
    return found.read_bytes()


def flipped(content: bytes, stream: np.random.RandomState) -> bytes:
    spoiled = bytearray(content)
    spoiled[stream.randint(len(content))] ^= 1 << stream.randint(8)
    return bytes(spoiled)


DAMAGES = {
    "a bit flipped": lambda mine, theirs, stream: flipped(mine, stream),
    "truncated": lambda mine, theirs, stream: mine[: stream.randint(1, len(mine))],
    "another run's": lambda mine, theirs, stream: theirs,
    "emptied": lambda mine, theirs, stream: b"",
    "garbage": lambda mine, theirs, stream: stream.bytes(stream.randint(1, 2000)),
}


# ------------------------------------------------------------------------------------------------------------ downloads


class Slow(http.server.SimpleHTTPRequestHandler):
    """Serves files a little at a time."""

    url: str

    def copyfile(self, source, outputfile):
        with contextlib.suppress(OSError):
            while chunk := source.read(512):
                outputfile.write(chunk)
                time.sleep(0.004)

    def log_message(self, *_):
        pass


def serve(folder: Path) -> int:
    """Write a small KMNIST and serve it in a process of its own, whose number is returned."""
    stream = np.random.RandomState(0)
    for names, count in ((KMNIST.train_files, 60), (KMNIST.test_files, 20)):
        for name, shape in zip(names, ((count, 28, 28), (count,)), strict=True):
            write_idx(folder / name, stream.randint(0, 10, shape))
    KMNIST.md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    handler = functools.partial(Slow, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Slow.url = f"http://127.0.0.1:{server.server_port}/"
    os.environ["no_proxy"] = "127.0.0.1"
    if process := os.fork():
        server.server_close()
        return process
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.getppid() != 1:  # until the other is gone
        time.sleep(0.1)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=200, help="of every job (default %(default)s)")
    parser.add_argument("--corruptions", type=int, default=200, help="of every kind of run (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as served:
        server = serve(Path(served))
        faults, start = Faults(Path(place), arguments.seed), time.monotonic()
        print("| check | outcomes |\n|---|---|")
        try:
            for name in arguments.jobs:
                faults.kill(name, arguments.moments)
                if JOBS[name].longer:
                    faults.fill(name, arguments.moments // 10)
                    faults.damage(name, arguments.corruptions)
                faults.show()
            if "a grid" in arguments.jobs:
                for processes in (2, 4, 8):
                    faults.share(processes)
        finally:
            faults.show()
            os.kill(server, signal.SIGKILL)
            finish(server)
    print(f"\nseed {arguments.seed}; {time.monotonic() - start:.0f} s; torch {torch.__version__}")
    for why in faults.wrong:
        print(f"WRONG: {why}", file=sys.stderr)
    return 1 if faults.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
