"""results/: finished runs that are kept, in the format of outputs/, with reports of them and a page that lists them.

What is studied, by which commands, stands in `STUDIES`. Nothing here trains.
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from wide import UserError
from wide.devices import device_name
from wide.files import replace_text, writing
from wide.rules import RULES
from wide.runs import FINISHED, Run, RunFolder

ROOT = Path(__file__).parents[1]
LIMIT = 20e6  # bytes of results/ in all
KEPT_FILES = ("config.json", "metrics.csv", "angles.csv", "changes.csv")
DATA = "DATA"  # in commands: the folder of the data
ALL = "backprop align_ada align_zero align_prop fa dfa last_layer sign_symmetry kolen_pollack weight_mirror"
FIVE = "backprop align_ada align_zero fa dfa"
SIX = "backprop align_ada align_zero fa dfa last_layer"
THREE = "backprop align_ada align_zero"
ADD_RULES = "backprop align_ada align_zero last_layer fa align_prop"
SEEDS = "99 100 101 102 103"


def matches(run: Run, fields: Mapping[str, object]) -> bool:
    """Whether a run has these fields; a tuple gives several values. Where not given: the rule's decay, not centred."""
    fields = {"centred": False, "decay": RULES[run.rule].settings.get("decay", 0.0)} | dict(fields)
    return all(
        getattr(run, name) in (value if isinstance(value, tuple) else (value,)) for name, value in fields.items()
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """A command whose runs are in results/, and what its report is called there.

    Args:
        name: of the report's files in results/reports/.
        script, number, options: the command; options on seeds and widths may name more than is there yet.
        fields: of `Run` that its runs have, for counting them (see `matches`).
        epochs: how many its runs have.
    """

    name: str
    title: str
    script: str
    number: int
    options: str
    fields: Mapping[str, object]
    epochs: int

    @property
    def command(self) -> str:
        return f"python3 {self.script} {self.number} {self.options}"

    @property
    def report_stem(self) -> str:
        return f"{'alignment' if self.script.startswith('alignment') else 'experiment'}_{self.number}"

    @property
    def dataset(self) -> str:
        return str(self.fields["dataset"])


def _study(title: str, command: str, epochs: int, **fields) -> Study:
    """From "name: script number options"."""
    name, _, line = command.partition(": ")
    script, number, options = line.split(" ", 2)
    return Study(name, title, script, int(number), options, fields, epochs)


TRAINED = {"network": "cnn", "parameterisation": "ntk", "optimizer": "sgd", "timed_on": None}
TIMED = {"network": "cnn", "data_limit": 1000, "batch_size": 100, "learning_rate": 5.0, "seed": (100, 101, 102)}
FULL = TRAINED | {"batch_size": 100, "data_limit": None, "precision": "fp32"}
TRAINING_RULES = tuple(ALL.split())  # all but pairs

STUDIES = (
    _study(
        "accuracy against width, seed 99 (Kolen-Pollack alone has weight decay)",
        f"kmnist_width: train_kmnist.py 1 --rules {ALL} --widths 8 16 32 64 128 --data-dir {DATA}",
        100, dataset="kmnist", rule=TRAINING_RULES, seed=99, learning_rate=(5.0, 2.0, 1.0), **FULL,
    ),
    _study(
        "accuracy against width over seeds, learning rate 5",
        f"kmnist_seeds: train_kmnist.py 1 --rules {SIX} align_prop --widths 8 16 32 --learning-rates 5 "
        f"--seeds 99 100 101 --data-dir {DATA}",
        100, dataset="kmnist", rule=(*SIX.split(), "align_prop"), learning_rate=5.0, width=(8, 16, 32),
        seed=(99, 100, 101), **FULL,
    ),
    _study(
        "accuracy against width after 20 epochs, learning rate 5",
        f"kmnist_early: train_kmnist.py 1 --rules {THREE} --widths 8 16 32 64 --learning-rates 5 --epochs 20 "
        f"--seeds 99 100 101 --data-dir {DATA}",
        20, dataset="kmnist", rule=tuple(THREE.split()), learning_rate=5.0, width=(8, 16, 32, 64),
        seed=(99, 100, 101), **FULL,
    ),
    _study(
        "accuracy at equal weight decay, learning rate 5, seed 99",
        "kmnist_decay: train_kmnist.py 1 --rules backprop align_ada kolen_pollack --widths 8 --learning-rates 5 "
        f"--weight-decay 0.0001 --data-dir {DATA}",
        100, dataset="kmnist", rule=("backprop", "align_ada", "kolen_pollack"), seed=99, learning_rate=5.0, width=8,
        decay=1e-4, **FULL,
    ),
    _study(
        "accuracy against learning rate",
        f"kmnist_learning_rates: train_kmnist.py 2 --widths 8 64 --data-dir {DATA}",
        100, dataset="kmnist", rule=tuple(SIX.split()), seed=99, width=(8, 64), **FULL,
    ),
    _study(
        "distance from theory against width, after 9 updates",
        f"kmnist_theory: train_kmnist.py 3 --widths 8 16 32 64 128 256 512 --seeds 99 100 101 --data-dir {DATA}",
        1, dataset="kmnist", **TRAINED, batch_size=50, data_limit=500,
    ),
    _study(
        "alignment scores of pairs against width",
        f"kmnist_alignment: alignment_kmnist.py 2 --widths 8 16 32 64 --epochs 20 --seeds 99 100 101 --data-dir {DATA}",
        20, dataset="kmnist", rule="pair", precision="fp32",
    ),
    *(
        _study(
            f"accuracy and angles in {precision}, learning rate 5, 10 epochs",
            f"kmnist_{precision}: train_kmnist.py 1 --rules {SIX} --widths 8 32 --learning-rates 5 --seeds {SEEDS} "
            f"--epochs 10 --log-alignment --precision {precision} --data-dir {DATA}",
            10, dataset="kmnist", rule=tuple(SIX.split()), width=(8, 32), learning_rate=5.0,
            **FULL | {"precision": precision},
        )
        for precision in ("fp32", "bf16")
    ),
    *(
        _study(
            f"alignment scores of pairs in {precision}",
            f"kmnist_alignment_{precision}: alignment_kmnist.py 2 --widths 8 32 --epochs 10 --seeds {SEEDS} "
            f"--precision {precision} --data-dir {DATA}",
            10, dataset="kmnist", rule="pair", width=(8, 32), precision=precision,
        )
        for precision in ("fp32", "bf16")
    ),
    _study(
        "accuracy against width, all 45,000 training images, learning rate 5, 5 epochs",
        f"cifar_width: train_cifar.py 1 --rules {FIVE} last_layer align_prop --widths 8 16 32 64 --learning-rates 5 "
        f"--epochs 5 --evaluate-every 5 --seeds 99 100 101 --data-dir {DATA}",
        5, dataset="cifar", rule=TRAINING_RULES, seed=(99, 100, 101), **FULL,
    ),
    _study(
        "accuracy against width after 600 updates (3,000 training images, batch 50, 10 epochs), learning rate 5",
        f"cifar_early: train_cifar.py 1 --rules {THREE} --widths 8 16 32 64 --learning-rates 5 --data-limits 3000 "
        f"--batch-size 50 --epochs 10 --evaluate-every 10 --seeds 99 100 101 --data-dir {DATA}",
        10, dataset="cifar", rule=tuple(THREE.split()), **FULL | {"batch_size": 50, "data_limit": 3000},
    ),
    _study(
        "accuracy of Align-prop against width beside the other rules, learning rate 5, 5 epochs (runs of cifar_width)",
        "cifar_align_prop: train_cifar.py 5 --widths 8 16 32 --learning-rates 5 --epochs 5 --evaluate-every 5 "
        f"--seeds 99 100 101 --data-dir {DATA}",
        5, dataset="cifar", rule=(*SIX.split(), "align_prop"), seed=(99, 100, 101), **FULL,
    ),
    _study(
        "accuracy over seeds, learning rate 5, 5 epochs",
        f"cifar_seeds: train_cifar.py 6 --widths 8 --learning-rates 5 --epochs 5 --evaluate-every 5 --data-dir {DATA}",
        5, dataset="cifar", rule=tuple(FIVE.split()), width=8, seed=(100, 101, 102, 103, 104), **FULL,
    ),
    _study(
        "accuracy against number of training images",
        f"cifar_images: train_cifar.py 4 --rules {FIVE} --widths 8 16 --learning-rates 5 2 1 "
        f"--data-limits 45 150 450 1500 --evaluate-every 150 --seeds 99 100 101 --data-dir {DATA}",
        150, dataset="cifar", **TRAINED, data_limit=(45, 150, 450, 1500),
    ),
    _study(
        "4,500 training images in NTK parameterisation, 10 epochs, seed 99: what the next is compared with",
        f"cifar_ntk: train_cifar.py 1 --rules {THREE} --widths 8 16 --data-limits 4500 --epochs 10 "
        f"--evaluate-every 10 --data-dir {DATA}",
        10, dataset="cifar", rule=tuple(THREE.split()), **TRAINED, data_limit=4500,
    ),
    _study(
        "4,500 training images in standard parameterisation with Adam, 10 epochs, seed 99",
        f"cifar_standard: train_cifar.py 3 --widths 8 16 --learning-rates 0.0005 0.001 0.002 0.005 0.01 "
        f"--data-limits 4500 --epochs 10 --evaluate-every 10 --data-dir {DATA}",
        10, dataset="cifar", network="cnn", parameterisation="standard", data_limit=4500,
    ),
    _study(
        "training time of an epoch of 1,000 images against width",
        "cifar_time: train_cifar.py 7 --widths 8 16 32 --learning-rates 5 --data-limits 1000 --seeds 100 101 102 "
        f"--data-dir {DATA}",
        1, dataset="cifar", **TIMED,
    ),
    _study(
        "alignment scores of pairs against width, 5 epochs",
        f"cifar_alignment: alignment_cifar.py 2 --widths 8 16 32 --epochs 5 --seeds 99 100 101 --data-dir {DATA}",
        5, dataset="cifar", rule="pair",
    ),
    *(
        _study(
            f"loss against width over seeds, {variant} variant",
            f"add_{variant}: train_add.py 1 --variant {variant} --rules {ADD_RULES} --widths 8 16 32 64 128 256 "
            f"--seeds {SEEDS}",
            200, dataset="add", variant=variant, rule=tuple(ADD_RULES.split()),
        )
        for variant in ("published", "corrected")
    ),
    _study(
        "alignment scores of pairs against width",
        "add_alignment: alignment_add.py 2 --widths 16 64 256 1024 --epochs 40 --seeds 99 100 101",
        40, dataset="add", rule="pair",
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
    {"dataset": "kmnist", "learning_rate": 5.0, "seed": 99, "width": (16, 64), "batch_size": 100},
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
        return matches(self.run, fields) and self.folder.status(epochs) in FINISHED

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


def study_runs(kept: list[Kept], study: Study) -> list[Kept]:
    return [one for one in kept if one.is_of(study.fields, study.epochs)]


# ------------------------------------------------------------------------------------------------------------- writing


def copy_finished(outputs: Path, results: Path) -> int:
    """Copy the finished runs of all studies, without what is not kept; those that are there already are left.

    Returns:
        How many were copied.

    Raises:
        UserError: a file is damaged, or results/ cannot be written.
    """
    copied = 0
    for one in read(outputs):
        target = RunFolder(results, one.run)
        if not any(one.is_of(study.fields, study.epochs) for study in STUDIES):
            continue
        if target.progress()[0] >= len(one.rows):
            continue
        files = [*KEPT_FILES, *(["checkpoint.pt"] if is_headline(one.run) else [])]
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
    """results/reports/<study>.csv, .md and .png, by the studies' own commands, of the runs that are there.

    Raises:
        UserError: a command fails.
    """
    here = (None, device_name(torch.device("cpu")))  # times are shown by the machine that took them
    for study in STUDIES:
        found = [one for one in study_runs(kept, study) if one.run.timed_on in here]
        if not found:
            continue
        words = shlex.split(study.options)
        if DATA in words:
            place = words.index(DATA)
            del words[place - 1 : place + 1]  # nothing is read
        words = _present(study, words, found)
        line = [sys.executable, str(ROOT / study.script), str(study.number), *words, "--report", "--device", "cpu"]
        done = subprocess.run([*line, "--outputs", str(results)], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise UserError(f"{study.name}: {done.stderr.strip().splitlines()[-1]}")
        for suffix in (".csv", ".md", ".png"):
            source = results / study.dataset / (study.report_stem + suffix)
            if source.exists():
                with writing(results / "reports"):
                    os.replace(source, results / "reports" / (study.name + suffix))


def _present(study: Study, words: list[str], found: list[Kept]) -> list[str]:
    """Options with the values alone for which there are runs, and those that the command leaves at their defaults."""
    there: dict[str, Collection] = {
        "--widths": {one.run.width for one in found},
        "--seeds": {one.run.seed for one in found},
        "--rules": {one.run.rule for one in found},
        "--data-limits": {one.run.data_limit for one in found},
        "--learning-rates": {f"{one.run.learning_rate:g}" for one in found},
    }
    kept, option = [], None
    for word in words:
        option = word if word.startswith("--") else option
        if word == option or option not in there or word in {str(value) for value in there[option]}:
            kept.append(word)
    asked = ("--seeds",) if study.script.startswith("alignment") else ("--seeds", "--learning-rates")
    for option in asked:
        if option not in words:
            kept += [option, *map(str, sorted(there[option]))]
    return kept


def commands(results: str = "results") -> str:
    """A shell script that trains, resumably, what is missing of all studies."""
    lines = [
        "#!/bin/sh",
        "# All studies; what OUTPUTS has is not trained again. Made by collect_results.py.",
        "# usage: sh results/studies.sh DATA [OUTPUTS]   (DATA: folder with kmnist/ and cifar-10-batches-bin/)",
        "# To train only what results/ lacks: cp -r results/add results/cifar results/kmnist OUTPUTS   first.",
        "DATA=${1:?folder of the data}; OUTPUTS=${2:-outputs}",
    ]
    lines += [study.command.replace(f" {DATA}", ' "$DATA"') + ' --outputs "$OUTPUTS"' for study in STUDIES]
    return "\n".join([*lines, ""])


def page(results: Path, kept: list[Kept]) -> str:
    """results/README.md: every figure, its command, data, machine, seeds and hours."""
    lines = [
        "# Results",
        "",
        "Made by `python3 collect_results.py`; what they say of each claim: [docs/claims.md](../docs/claims.md).",
        "Run folders are as in outputs/ ([outputs/README.md](../outputs/README.md)), without checkpoints but those of",
        "headline runs, and so cannot be trained further. `python3 <script> <number> <options> --outputs results",
        "--report` prints a study's table of what is here and trains nothing; `--evaluate` measures what has a",
        "checkpoint anew. `sh results/studies.sh DATA` trains everything again, resumably.",
        "",
        "## Data",
        "",
        *(f"- {text}." for text in DATASETS.values()),
        "",
        "## Studies",
        "",
        "Hours are those of training passes, without evaluation, as metrics.csv has them (`seconds`), on one thread",
        "beside other work, with what it was paused: they say what the studies cost here, not how fast a step is.",
        "Runs of two studies count in both.",
        "",
        "| study | runs | seeds | epochs | hours | data | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    sections = []
    for study in STUDIES:
        found = study_runs(kept, study)
        if not found:
            lines.append(f"| {study.name} | none yet | | {study.epochs} | | | |")
            continue
        seeds = ", ".join(map(str, sorted({one.run.seed for one in found})))
        hours = sum(sum(row["seconds"] for row in one.rows[: study.epochs]) for one in found) / 3600
        diverged = sum(one.diverged() for one in found)
        runs = f"{len(found)}" + (f" ({diverged} diverged)" if diverged else "")
        data, machine = ("; ".join(sorted({getattr(one, name) for one in found})) for name in ("data", "device"))
        lines.append(f"| {study.name} | {runs} | {seeds} | {study.epochs} | {hours:.2f} | {data} | {machine} |")
        sections += ["", f"### {study.name}", "", f"{study.title[0].upper()}{study.title[1:]}. `{study.command}`", ""]
        if (results / "reports" / f"{study.name}.png").exists():
            sections.append(f"![{study.title}](reports/{study.name}.png)")
        sections += ["", f"[table](reports/{study.name}.md), [rows](reports/{study.name}.csv)"]
    total = defaultdict(float)
    for one in kept:
        total[one.device] += one.seconds / 3600
    lines += ["", "All runs, each once: " + "; ".join(f"{h:.2f} hours on {d}" for d, h in sorted(total.items())) + "."]
    return "\n".join([*lines, "", "## Figures", *sections, ""])


def write_page(path: Path, text: str) -> None:
    with writing(path.parent):
        replace_text(path, text)
