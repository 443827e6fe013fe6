"""results/: finished runs that are kept, in the format of outputs/, with reports of them and a page that lists them.

What is studied, by which commands: wide/results/studies.py. Nothing here trains.
"""

import dataclasses
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from wide import UserError
from wide.grids.study import Study as Grid
from wide.models.rules import RULES
from wide.reports.report import TableReport
from wide.results import baselines
from wide.results.studies import STUDIES, Study, commands
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


DATASETS = {
    "kmnist": "KMNIST: the 10,000 official test images alone, split into 5,334 training, 2,666 validation and 2,000 "
    "test images that do not overlap (`python3 setup_kmnist.py --split-test-images DATA`)",
    "cifar": "CIFAR-10: a copy whose images were re-encoded as JPEG, in another order than the official files; "
    "accuracies are close to those of the official images, not equal to them",
    "add": "the Add task: made from its seed, the same everywhere; seeds vary the network alone",
}

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
    planned = {_anywhere(run) for run in study.grid.runs}
    return [one for one in kept if _anywhere(one.run) in planned and one.went_on(study.grid.epochs)]


def _anywhere(run: Run) -> Run:
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
        # Of times those of this machine.
        found = [one for one in done(study, kept) if one.run in set(study.grid.runs)]
        if not found:
            continue
        grid = dataclasses.replace(study.grid, options=dataclasses.replace(study.grid.options, outputs=results))
        there = {one.run for one in found}
        shown = dataclasses.replace(grid.shown, folders=[folder for folder in grid.folders if folder.run in there])
        grid.experiment.report.write(shown)
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


def script(kept: list[Kept]) -> str:
    """A shell script that trains, resumably, the runs that are here and no others."""
    lines = [
        "#!/bin/sh",
        "# Trains the runs that results/ has; what OUTPUTS has is not trained again. Made by collect_results.py.",
        "# usage: sh results/studies.sh DATA [OUTPUTS]    (DATA: folder with kmnist/ and cifar-10-batches-bin/)",
        "DATA=${1:?folder of the data}; OUTPUTS=${2:-outputs}",
    ]
    trained = [command for study in STUDIES for command in commands_of(study, done(study, kept))]
    lines += ["python3 " + one.replace(" DATA", ' "$DATA"') + ' --outputs "$OUTPUTS"' for one in trained]
    return "\n".join([*lines, ""])


def commands_of(study: Study, found: list[Kept]) -> list[str]:
    """What trains these runs, wherever times of them were taken."""
    return commands(study, {_anywhere(one.run) for one in found})


def page(results: Path, kept: list[Kept]) -> str:
    """results/README.md: of every study its runs, commands, data, machines, seeds and hours."""
    lines = [PAGE, *(f"- {text}." for text in DATASETS.values()), "", STUDIES_NOTE]
    sections = []
    for study in STUDIES:
        if not (found := done(study, kept)):
            continue
        epochs, name = study.grid.epochs, study.name
        seeds = ", ".join(map(str, sorted({one.run.seed for one in found})))
        hours = sum(sum(row["seconds"] for row in one.rows[:epochs]) for one in found) / 3600
        diverged = sum(one.diverged() for one in found)
        count = f"{len(found)}" + (f" ({diverged} diverged)" if diverged else "")
        data = "; ".join(sorted({one.data for one in found}))
        lines.append(f"| {name} | {count} | {seeds} | {epochs} | {hours:.2f} | {data} | {machines(found)} |")
        sections += ["", f"### {name}", "", f"{study.title[0].upper()}{study.title[1:]}."]
        if (results / "reports" / f"{name}.png").exists():
            sections += ["", f"![{study.title}](reports/{name}.png)"]
        sections += ["", f"[table](reports/{name}.md), [rows](reports/{name}.csv)", "", "```sh"]
        sections += [f"python3 {command}" for command in commands_of(study, found)] + ["```"]
    total = defaultdict(float)
    for one in kept:
        total[one.device] += one.seconds / 3600
    lines += ["", "All runs, each once: " + "; ".join(f"{h:.2f} hours on {d}" for d, h in sorted(total.items())) + "."]
    return "\n".join([*lines, "", "## Tables, figures and commands", *sections, ""])


PAGE = """\
# Results

Made by `python3 collect_results.py`; what they say of each claim: [docs/claims.md](../docs/claims.md).
Run folders are as in outputs/ ([outputs/README.md](../outputs/README.md)), without checkpoints but those of
headline runs, and so cannot be trained further. `python3 <script> <number> <options> --outputs results
--report` prints a study's table of what is here and trains nothing; `--evaluate` measures what has a
checkpoint anew. `sh results/studies.sh DATA` trains again, resumably, the runs that are here and no others.

## Data
"""
STUDIES_NOTE = """\
## Studies

Hours are those of training passes, without evaluation, as metrics.csv has them (`seconds`), beside other work (on
the GPU, beside eight other runs): they say what the studies cost here, not how fast a step is. A processor's are on
one thread unless it says otherwise. Runs of two studies count in both. Where several machines took part, the widths
say which trained what.

| study | runs | seeds | epochs | hours | data | machine |
|---|---|---|---|---|---|---|"""


def machines(found: list[Kept]) -> str:
    """On which they were trained; the widths, where not all have all of them."""
    widths: dict[str, set[int]] = defaultdict(set)
    for one in found:
        widths[one.device].add(one.run.width)
    alike = len(set(map(frozenset, widths.values()))) == 1
    return "; ".join(
        device + ("" if alike else f" (width {', '.join(map(str, sorted(widths[device])))})")
        for device in sorted(widths)
    )


def write_page(path: Path, text: str) -> None:
    with writing(path.parent):
        replace_text(path, text)
