"""results/: finished runs that are kept, in the format of outputs/, with reports of them and a page that lists them.

What is studied, by which commands, stands in `STUDIES`. Nothing here trains.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from wide import UserError, baselines
from wide.command_line import asked
from wide.files import replace_text, writing
from wide.report import TableReport
from wide.rules import RULES
from wide.runs import FINISHED, Run, RunFolder
from wide.study import Machine
from wide.study import Study as Grid

ROOT = Path(__file__).parents[1]
LIMIT = 25e6  # bytes of results/ in all
KEPT_FILES = ("config.json", "metrics.csv", "angles.csv", "changes.csv", "gaps.csv")
DATA = " --data-dir DATA"  # in commands: the folder of the data
ALL = "backprop align_ada align_zero align_prop fa dfa last_layer sign_symmetry kolen_pollack weight_mirror"
SEVEN = "backprop align_ada align_zero align_prop fa dfa last_layer"
SIX = "backprop align_ada align_zero fa dfa last_layer"
FIVE = "backprop align_ada align_zero fa dfa"
THREE = "backprop align_ada align_zero"
ADD_RULES = "backprop align_ada align_zero last_layer fa align_prop"
THREE_SEEDS, SEEDS = "99 100 101", "99 100 101 102 103"


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


# ------------------------------------------------------------------------------------------------------------- studies


@dataclasses.dataclass(frozen=True)
class Study:
    """A command whose runs are in results/, and what its report is called there.

    Args:
        name: of the report's files in results/reports/.
        command: script, number and options. The study is what it would train.
    """

    name: str
    title: str
    command: str

    @functools.cached_property
    def grid(self) -> Grid:
        """As the script itself reads its command."""
        script, *words = shlex.split(self.command)
        module = importlib.import_module(script.removesuffix(".py"))
        words += ["--device", "cpu", "--outputs", str(ROOT / "results")]
        options = asked(module.SUBJECT, module.EXPERIMENTS, words)
        return Grid.of(module.SUBJECT, module.EXPERIMENTS, options, Machine.alone(options))

    def done(self, kept: "list[Kept]") -> "list[Kept]":
        """The runs that are here, whatever machine a time was taken on."""
        planned = {_anywhere(run) for run in self.grid.runs}
        return [one for one in kept if _anywhere(one.run) in planned and one.went_on(self.grid.epochs)]


def _anywhere(run: Run) -> Run:
    return dataclasses.replace(run, timed_on=None)


# The learning rate of every rule on fully connected networks, chosen as wide/rates.py says.
RATES: Mapping[str, float] = dict.fromkeys(ALL.split(), 5.0) | {"align_zero": 2.0}
CENTRED_RATES: Mapping[str, float] = dict.fromkeys(ALL.split(), 5.0)
MLP = "train_kmnist.py 1 --network mlp"
FIFTY = f"--epochs 50 --evaluate-every 10{DATA}"
# Training images and epochs: 900 updates each, in batches of 100 or all images.
LITTLE = {30: 900, 100: 900, 300: 300, 1000: 90, 3000: 30}


def by_rate(name: str, title: str, rates: Mapping[str, float], options: str) -> tuple[Study, ...]:
    """A study of all rules, each at its rate: one command, and so one report, for each rate."""
    found = []
    for rate in sorted(set(rates.values()), reverse=True):
        rules = " ".join(rule for rule in rates if rates[rule] == rate)
        called = name if rate == max(rates.values()) else f"{name}_lr{rate:g}"
        command = f"{MLP} --rules {rules} --learning-rates {rate:g} {options}"
        found.append(Study(called, f"{title}, learning rate {rate:g}", command))
    return tuple(found)


WIDTHS = "16 32 64 128 256 512 1024"
STUDIES = (
    Study(
        "mlp_rates", "fully connected: learning rates, 50 epochs",
        f"{MLP} --rules {ALL} --widths 64 1024 --learning-rates 5 2 1 10 --seeds 99 {FIFTY}",
    ),
    *by_rate(
        "mlp_width", "fully connected: accuracy against width, 50 epochs", RATES,
        f"--widths {WIDTHS} --seeds {SEEDS} {FIFTY}",
    ),
    Study(
        "mlp_width_align_zero", "fully connected: Align-zero at the rate of the others, 50 epochs",
        f"{MLP} --rules align_zero --learning-rates 5 --widths {WIDTHS} --seeds {SEEDS} {FIFTY}",
    ),
    *by_rate(
        "mlp_wide", "fully connected: accuracy at width 2048, 50 epochs", RATES,
        f"--widths 2048 --seeds {THREE_SEEDS} {FIFTY}",
    ),
    Study(
        "mlp_centred_rates", "fully connected, centred outputs: learning rates, 50 epochs",
        f"{MLP} --centred --rules {ALL} --widths 64 256 --learning-rates 5 2 1 10 --seeds 99 {FIFTY}",
    ),
    *by_rate(
        "mlp_centred", "fully connected, centred outputs: accuracy against width, 50 epochs", CENTRED_RATES,
        f"--centred --widths {WIDTHS} 2048 --seeds {THREE_SEEDS} {FIFTY}",
    ),
    *(
        Study(
            f"mlp_{images}_images{'_centred' * bool(centred)}",
            f"fully connected{', centred outputs' * bool(centred)}: {images} training images, 900 updates",
            f"{MLP} {centred}--rules {SEVEN} --widths 1024 --learning-rates 5 --data-limits {images} --seeds {SEEDS} "
            f"--epochs {epochs} --evaluate-every {epochs}{DATA}",
        )
        for centred in ("", "--centred ")
        for images, epochs in LITTLE.items()
    ),
    Study(
        "mlp_theory", "fully connected: distance from theory against width, after 9 updates",
        f"train_kmnist.py 3 --network mlp --widths 16 32 64 128 256 512 1024 2048 4096 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "mlp_outputs", "fully connected: distance of outputs from those of backprop's network against width",
        "train_kmnist.py 4 --network mlp --widths 16 32 64 128 256 512 1024 2048 4096 "
        f"--seeds {THREE_SEEDS} --evaluate-every 1000{DATA}",
    ),
    Study(
        "kmnist_seeds", "convolutional: accuracy against width, 100 epochs, learning rate 5",
        f"train_kmnist.py 1 --rules {SEVEN} --widths 8 16 32 --learning-rates 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_wider", "convolutional: two rules at width 64, 100 epochs, learning rate 5",
        f"train_kmnist.py 1 --rules backprop align_ada --widths 64 --learning-rates 5{DATA}",
    ),
    Study(
        "kmnist_early", "convolutional: accuracy against width after 20 epochs, learning rate 5",
        f"train_kmnist.py 1 --rules {THREE} --widths 8 16 32 64 --learning-rates 5 --epochs 20 "
        f"--seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_rules", "convolutional: all rules, 100 epochs, learning rate 5 (Kolen-Pollack alone has weight decay)",
        f"train_kmnist.py 1 --rules {ALL} --widths 8 16 --learning-rates 5{DATA}",
    ),
    Study(
        "kmnist_decay", "convolutional: accuracy at equal weight decay, learning rate 5",
        "train_kmnist.py 1 --rules backprop align_ada kolen_pollack --widths 8 --learning-rates 5 "
        f"--weight-decay 0.0001{DATA}",
    ),
    Study(
        "kmnist_rates", "convolutional: accuracy against learning rate, 100 epochs",
        f"train_kmnist.py 2 --rules {SIX} --widths 8 --learning-rates 1 2 5{DATA}",
    ),
    Study(
        "kmnist_diverging", "convolutional: rates at which training diverges",
        f"train_kmnist.py 2 --rules backprop align_ada --widths 8 --learning-rates 5 10 20{DATA}",
    ),
    Study(
        "kmnist_theory", "convolutional: distance from theory against width, after 9 updates",
        f"train_kmnist.py 3 --widths 8 16 32 64 128 256 512 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_alignment", "convolutional: alignment scores of pairs against width, after 20 epochs",
        f"alignment_kmnist.py 2 --widths 8 16 32 64 --epochs 20 --seeds {THREE_SEEDS}{DATA}",
    ),
    *(
        Study(
            f"kmnist_{precision}", f"convolutional: accuracy and angles in {precision}, 10 epochs, learning rate 5",
            f"train_kmnist.py 1 --rules {SIX} --widths 8 32 --learning-rates 5 --seeds {SEEDS} "
            f"--epochs 10 --log-alignment --precision {precision}{DATA}",
        )
        for precision in ("fp32", "bf16")
    ),
    *(
        Study(
            f"kmnist_alignment_{precision}", f"convolutional: alignment scores of pairs in {precision}, 10 epochs",
            f"alignment_kmnist.py 2 --widths 8 32 --epochs 10 --seeds {SEEDS} --precision {precision}{DATA}",
        )
        for precision in ("fp32", "bf16")
    ),
    Study(
        "cifar_width", "convolutional: accuracy against width, all 45,000 training images, 5 epochs, learning rate 5",
        f"train_cifar.py 1 --rules {SEVEN} --widths 8 16 --learning-rates 5 "
        f"--epochs 5 --evaluate-every 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_early",
        "convolutional: accuracy against width after 600 updates (3,000 training images, batch 50, 10 epochs), rate 5",
        f"train_cifar.py 1 --rules {THREE} --widths 8 16 32 --learning-rates 5 --data-limits 3000 "
        f"--batch-size 50 --epochs 10 --evaluate-every 10 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_seeds", "convolutional: accuracy over seeds, 5 epochs, learning rate 5",
        f"train_cifar.py 6 --widths 8 --learning-rates 5 --epochs 5 --evaluate-every 5{DATA}",
    ),
    Study(
        "cifar_images", "convolutional, width 8: accuracy against number of training images, learning rate 5",
        f"train_cifar.py 4 --rules {FIVE} --widths 8 --learning-rates 5 "
        f"--data-limits 45 150 450 1500 --evaluate-every 150 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_images_16", "convolutional, width 16: accuracy against number of training images, learning rate 5",
        f"train_cifar.py 4 --rules {FIVE} --widths 16 --learning-rates 5 "
        f"--data-limits 45 150 450 --evaluate-every 150 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_ntk", "convolutional, 4,500 images, NTK parameterisation, 10 epochs: what the next is compared with",
        f"train_cifar.py 1 --rules {THREE} --widths 8 16 --data-limits 4500 --epochs 10 --evaluate-every 10{DATA}",
    ),
    Study(
        "cifar_standard", "convolutional, 4,500 images, standard parameterisation with Adam, 10 epochs",
        f"train_cifar.py 3 --widths 8 16 --learning-rates 0.0005 0.001 0.002 0.005 0.01 "
        f"--data-limits 4500 --epochs 10 --evaluate-every 10{DATA}",
    ),
    Study(
        "cifar_time", "convolutional: training time of an epoch of 1,000 images against width",
        f"train_cifar.py 7 --widths 8 16 32 --learning-rates 5 --data-limits 1000 --seeds 100 101 102{DATA}",
    ),
    Study(
        "cifar_alignment", "convolutional: alignment scores of pairs against width, 5 epochs",
        f"alignment_cifar.py 2 --widths 8 16 --epochs 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    *(
        Study(
            f"add_{variant}", f"Add task, {variant} variant: loss against width",
            f"train_add.py 1 --variant {variant} --rules {ADD_RULES} --widths 8 16 32 64 128 --seeds {SEEDS}",
        )
        for variant in ("published", "corrected")
    ),
    Study(
        "add_alignment", "Add task: alignment scores of pairs against width, after 40 epochs",
        f"alignment_add.py 2 --widths 16 64 256 1024 --epochs 40 --seeds {THREE_SEEDS}",
    ),
)  # fmt: skip

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
        "rule": ("backprop", "align_ada", "align_zero"),
    },
    {"dataset": "kmnist", "network": "cnn", "learning_rate": 5.0, "seed": 99, "width": (16, 64), "batch_size": 100},
    {"dataset": "cifar", "learning_rate": 5.0, "seed": 99, "width": 16, "batch_size": 100, "data_limit": None},
    {"dataset": "add", "seed": 99, "width": (64,), "rule": ("backprop", "align_ada", "align_zero")},
)


def is_headline(run: Run) -> bool:
    return any(matches(run, fields) for fields in HEADLINE)


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


# ------------------------------------------------------------------------------------------------------------- writing


def copy_finished(outputs: Path, results: Path) -> int:
    """Copy the finished runs of all studies, without what is not kept; those that are there already are left.

    Returns:
        How many were copied.

    Raises:
        UserError: a file is damaged, or results/ cannot be written.
    """
    there, copied = read(outputs), 0
    finished = {one.run: one for study in STUDIES for one in study.done(there)}
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
        found = [one for one in study.done(kept) if one.run in set(study.grid.runs)]
        if not found:
            continue
        options = dataclasses.replace(study.grid.options, outputs=results)
        grid = dataclasses.replace(study.grid, experiment=_trimmed(study.grid, found), options=options)
        grid.experiment.report.write(grid)
        for suffix in (".csv", ".md", ".png"):
            target = results / "reports" / (study.name + suffix)
            with writing(target.parent):
                target.unlink(missing_ok=True)
                if (source := grid.report_path.with_suffix(suffix)).exists():
                    os.replace(source, target)
            if not makes_lines(grid, found):
                target.with_suffix(".png").unlink(missing_ok=True)


def makes_lines(grid: Grid, found: list[Kept]) -> bool:
    """Whether its figure has lines of three points at least, or is of another kind."""
    view = grid.experiment.view
    in_lines = isinstance(grid.experiment.report, TableReport) and view.figure in ("lines", "gap", "timing")
    return not in_lines or len({getattr(one.run, view.against) for one in found if not one.diverged(grid.epochs)}) >= 3


def _trimmed(grid: Grid, found: list[Kept]):
    """The experiment with the values alone for which there are runs."""
    axes = {"rules": "rule", "widths": "width", "learning_rates": "learning_rate", "seeds": "seed"}
    axes["data_limits"] = "data_limit"
    there = {axis: {getattr(one.run, field) for one in found} for axis, field in axes.items()}
    kept = {axis: tuple(v for v in getattr(grid.experiment, axis) if v in there[axis]) for axis in axes}
    return dataclasses.replace(grid.experiment, **kept)


def commands(kept: list[Kept]) -> str:
    """A shell script that trains, resumably, what is missing of the studies that were begun."""
    lines = [
        "#!/bin/sh",
        "# The studies that results/ has, whole or in part; what OUTPUTS has is not trained again. Made by",
        "# collect_results.py. usage: sh results/studies.sh DATA [OUTPUTS]",
        "# (DATA: folder with kmnist/ and cifar-10-batches-bin/)",
        "# To train only what results/ lacks: cp -r results/add results/cifar results/kmnist OUTPUTS   first.",
        "DATA=${1:?folder of the data}; OUTPUTS=${2:-outputs}",
    ]
    begun = [study for study in STUDIES if study.done(kept)]
    lines += ["python3 " + one.command.replace(" DATA", ' "$DATA"') + ' --outputs "$OUTPUTS"' for one in begun]
    return "\n".join([*lines, ""])


def page(results: Path, kept: list[Kept]) -> str:
    """results/README.md: every study, how much of it is done, its command, data, machine, seeds and hours."""
    lines = [
        "# Results",
        "",
        "Made by `python3 collect_results.py`; what they say of each claim: [docs/claims.md](../docs/claims.md).",
        "Run folders are as in outputs/ ([outputs/README.md](../outputs/README.md)), without checkpoints but those of",
        "headline runs, and so cannot be trained further. `python3 <script> <number> <options> --outputs results",
        "--report` prints a study's table of what is here and trains nothing; `--evaluate` measures what has a",
        "checkpoint anew. `sh results/studies.sh DATA` trains again, resumably, the studies that are done or begun.",
        "",
        "## Data",
        "",
        *(f"- {text}." for text in DATASETS.values()),
        "",
        "## Studies",
        "",
        "Hours are those of training passes, without evaluation, as metrics.csv has them (`seconds`), on one thread",
        "beside other work, with what it was paused: they say what the studies cost here, not how fast a step is.",
        "Runs of two studies count in both. Times (cifar_time) were taken on every machine that is named.",
        "",
        "| study | runs done of planned | seeds | epochs | hours | data | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    sections, planned = [], []
    for study in STUDIES:
        found, grid = study.done(kept), study.grid
        if not found:
            planned.append(f"| {study.name} | {len(grid.runs)} | `python3 {study.command}` |")
            continue
        seeds = ", ".join(map(str, sorted({one.run.seed for one in found})))
        hours = sum(sum(row["seconds"] for row in one.rows[: grid.epochs]) for one in found) / 3600
        diverged = sum(one.diverged() for one in found)
        data, machine = ("; ".join(sorted({getattr(one, name) for one in found})) for name in ("data", "device"))
        runs = f"{_count(found)} of {len(grid.runs)}" + (f" ({diverged} diverged)" if diverged else "")
        lines.append(f"| {study.name} | {runs} | {seeds} | {grid.epochs} | {hours:.2f} | {data} | {machine} |")
        sections += ["", f"### {study.name}", "", f"{study.title[0].upper()}{study.title[1:]}. "]
        sections[-1] += f"`python3 {study.command}`"
        if (results / "reports" / f"{study.name}.png").exists():
            sections += ["", f"![{study.title}](reports/{study.name}.png)"]
        sections += ["", f"[table](reports/{study.name}.md), [rows](reports/{study.name}.csv)"]
    total = defaultdict(float)
    for one in kept:
        total[one.device] += one.seconds / 3600
    lines += ["", "All runs, each once: " + "; ".join(f"{h:.2f} hours on {d}" for d, h in sorted(total.items())) + "."]
    if planned:
        lines += ["", "Planned, and not begun:", "", "| study | runs | command |", "|---|---|---|", *planned]
    return "\n".join([*lines, "", "## Tables and figures", *sections, ""])


def _count(found: list[Kept]) -> str:
    """How many; of times, on each machine."""
    counts = Counter(one.run.timed_on for one in found)
    return " and ".join(str(counts[machine]) for machine in sorted(counts, key=str))


def write_page(path: Path, text: str) -> None:
    with writing(path.parent):
        replace_text(path, text)
