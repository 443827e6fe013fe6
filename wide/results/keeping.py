"""results/: finished runs that are kept, in the format of outputs/, with reports of them and a page that lists them.

What is studied, by which commands: wide/results/studies.py. Nothing here trains.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from wide import UserError
from wide.grids.study import Study as Grid
from wide.models.rules import RULES
from wide.reports.report import TableReport
from wide.results import baselines
from wide.results.studies import STUDIES, Study
from wide.runs.files import replace_text, writing
from wide.runs.folder import FINISHED, RunFolder
from wide.runs.run import Run

LIMIT = 35e6  # bytes of results/ in all
KEPT_FILES = ("config.json", "metrics.csv", "angles.csv", "changes.csv", "gaps.csv")


def matches(run: Run, fields: Mapping[str, object]) -> bool:
    """Whether a run has these fields: a value, several in a tuple, or one for each rule in a mapping.

    Where not given: the rule's own decay, and not centred.
    """
    fields = {"centred": False, "decay": RULES[run.rule].settings.get("decay", 0.0)} | dict(fields)
    for name, wanted in fields.items():
        values = wanted.get(run.rule) if isinstance(wanted, Mapping) else wanted
        if getattr(run, name) not in (values if isinstance(values, tuple) else (values,)):
            return False
    return True


# Runs whose checkpoints are kept, so that --evaluate can measure them anew.
HEADLINE = (
    {
        "dataset": "kmnist",
        "network": "mlp",
        "seed": 99,
        "width": 64,
        "data_limit": None,
        "learning_rate": 5.0,
    },
    {"dataset": "kmnist", "network": "cnn", "learning_rate": 5.0, "seed": 99, "width": (16, 64), "batch_size": 100},
    {"dataset": "cifar", "learning_rate": 5.0, "seed": 99, "width": 16, "batch_size": 100, "data_limit": None},
    {"dataset": "add", "seed": 99, "width": 64},
)


def is_headline(run: Run) -> bool:
    return run.rule in ("backprop", "align_ada", "align_zero") and any(matches(run, fields) for fields in HEADLINE)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Kept:
    """A finished run in results/."""

    run: Run
    folder: RunFolder
    rows: list[dict]
    data: str
    device: str
    finished: str  # date

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.rows)

    def is_of(self, fields: Mapping[str, object], epochs: int) -> bool:
        """Whether it has these fields of `Run`, and went on for so many epochs or diverged before."""
        return matches(self.run, fields) and self.went_on(epochs)

    def went_on(self, epochs: int) -> bool:
        return self.folder.status(epochs) in FINISHED

    def diverged(self, epochs: int | None = None) -> bool:
        """Within so many epochs, or all that it has."""
        return not math.isfinite(self.rows[:epochs][-1]["train_loss"])


def read(results: Path) -> list[Kept]:
    """All runs in a folder, in an order that does not depend on the file system.

    Raises:
        UserError: a file is damaged.
    """
    return [kept for path in sorted(results.glob("*/*/config.json")) if (kept := _read(results, path)) is not None]


def _read(results: Path, path: Path) -> Kept | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: value for name, value in config["run"].items() if name != "data"}
        run, sessions = Run(**fields), config["sessions"]
        device = ", ".join(dict.fromkeys(session["device"] for session in sessions))
        kept = (config["run"]["data"], device, sessions[-1]["started"][:10])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder") from error
    folder = RunFolder(results, run)
    if folder.path != path.parent:
        raise UserError(f"{path.parent} holds the run {run.name}; give the folder that name")
    rows = folder.rows()
    return Kept(run, folder, rows, *kept) if rows else None


def done(study: Study, kept: list[Kept]) -> list[Kept]:
    """A study's runs that are here, whatever machine a time was taken on."""
    planned = {anywhere(run) for run in study.grid.runs}
    return [one for one in kept if anywhere(one.run) in planned and one.went_on(study.grid.epochs)]


def anywhere(run: Run) -> Run:
    """The run, whatever machine a time of it was taken on."""
    return dataclasses.replace(run, timed_on=None)


# ------------------------------------------------------------------------------------------------------------- writing


def copy_finished(outputs: Path, results: Path) -> int:
    """Copy the finished runs of all studies, without what is not kept; those that are there already are left.

    Returns:
        How many were copied.

    Raises:
        UserError: a file is damaged, or results/ cannot be written.
    """
    there, copied = read(outputs), 0
    finished = {one.run: one for study in STUDIES for one in done(study, there)}
    for run, one in finished.items():
        target = RunFolder(results, run)
        if target.progress()[0] >= len(one.rows):
            continue
        files = [*KEPT_FILES, *(["checkpoint.pt"] if is_headline(run) else [])]
        with writing(target.path):
            for file in files:
                if (one.folder.path / file).exists():
                    shutil.copyfile(one.folder.path / file, target.path / file)
        copied += 1
    return copied


def require_small(results: Path) -> None:
    """Raise UserError for more than may be kept."""
    size = sum(path.stat().st_size for path in results.rglob("*") if path.is_file())
    if size > LIMIT:
        raise UserError(f"{results} has {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; keep fewer checkpoints")


def write_reports(results: Path, kept: list[Kept]) -> None:
    """results/reports/<study>.csv, .md and .png of the runs that are there; the last only where it shows something.

    Raises:
        UserError: a file is damaged.
    """
    for path in (results / "reports").glob("*"):
        if path.stem not in {study.name for study in STUDIES} | {baselines.PATH.stem}:
            path.unlink()
    for study in STUDIES:
        found = done(study, kept)
        if not found:
            continue
        newest = max(found, key=lambda one: one.finished).run.timed_on  # of times those of one machine
        there = {anywhere(one.run): one.folder for one in found if one.run.timed_on == newest}
        grid = dataclasses.replace(study.grid, options=dataclasses.replace(study.grid.options, outputs=results))
        folders = [there[run] for run in map(anywhere, grid.runs) if run in there]
        grid.experiment.report.write(shown := dataclasses.replace(grid.shown, folders=folders))
        for suffix in (".csv", ".md", ".png"):
            target = results / "reports" / (study.name + suffix)
            with writing(target.parent):
                target.unlink(missing_ok=True)
                if (source := shown.path.with_suffix(suffix)).exists():
                    os.replace(source, target)
            if not makes_lines(grid, found):
                target.with_suffix(".png").unlink(missing_ok=True)


def makes_lines(grid: Grid, found: list[Kept]) -> bool:
    """Whether its figure has lines of three points at least, of two rules or more, or is of another kind."""
    view, through = grid.experiment.view, [one.run for one in found if not one.diverged(grid.epochs)]
    in_lines = isinstance(grid.experiment.report, TableReport) and view.figure in ("lines", "gap", "timing")
    return not in_lines or (
        len({getattr(r, view.against) for r in through}) >= 3 and len({r.rule for r in through}) > 1
    )


def write_page(path: Path, text: str) -> None:
    with writing(path.parent):
        replace_text(path, text)
