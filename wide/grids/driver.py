"""The process that hands runs to Ray: it follows them by their rows, and starts those again whose workers died."""

import dataclasses
import itertools
import sys
import time
from collections import deque

from tqdm import tqdm

from wide.grids.cluster import Places
from wide.grids.one_run import Failures, Outcome, first_line, say
from wide.grids.pace import Pace, makespan
from wide.grids.worker import Place
from wide.runs.folder import FINISHED, RunFolder

ATTEMPTS = 3  # workers that may die over a run one after the other, none of them an epoch further than the one before
ASK_AGAIN = 10  # seconds, for runs that other processes train
LOOK = 1  # seconds between looks at the rows of runs
TELL = 600  # seconds between lines of progress where there is no terminal
SHOWN = 8  # runs that are named there


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
        run = going.folder.run
        if (run.width, run.rule) not in self.pace.seen and (epochs := going.trained() - before) > 0:
            self.pace.saw(run, (time.monotonic() - when) / epochs)

    def under_way(self) -> list[Going]:
        return [going for going in self.tasks.values() if going.place]

    def summary(self) -> str:
        words = [f"{self.done} of {self.total} runs done", f"{len(self.under_way())} under way"]
        waiting = [going.folder for going in self.tasks.values() if not going.place]
        folders = [*(going.folder for going in self.under_way()), *waiting, *self.queue]
        if folders and self.pace.seen and (slots := self.places.slots()):
            words.append(self.pace.text(makespan([self.pace.left([f]) for f in folders], slots), folders))
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
