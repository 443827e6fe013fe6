"""results/README.md and results/studies.sh: what was run, by which commands and on which machines."""

from collections import defaultdict
from pathlib import Path

from wide.results.keeping import Kept, anywhere, done
from wide.results.studies import STUDIES, Study, commands

DATASETS = {
    "kmnist": "KMNIST: the 10,000 official test images alone, split into 5,334 training, 2,666 validation and 2,000 "
    "test images that do not overlap (`python3 setup_kmnist.py --split-test-images DATA`)",
    "cifar": "CIFAR-10: a copy whose images were re-encoded as JPEG, in another order than the official files; "
    "accuracies are close to those of the official images, not equal to them",
    "add": "the Add task: made from its seed, the same everywhere; seeds vary the network alone",
}


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
    return commands(study, {anywhere(one.run) for one in found})


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
