"""The alignment experiments, the same for every dataset: pairs of networks, scores against width and against time."""

import argparse
import csv
import dataclasses
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from wide import UserError
from wide.alignment import AlignmentScores
from wide.experiments import Experiment, Subject
from wide.report import write_report
from wide.runs import RunFolder
from wide.tables import settings_text, unusual_text

KINDS = ("score", "control")
TABLE_EPOCHS = 10  # columns of the table of scores against time; the .csv has every epoch


def scored(subject: Subject) -> Subject:
    """A training script's subject, for pairs of networks whose scores are measured."""

    def task(arguments, device):
        task = subject.task(arguments, device)
        image_size = getattr(task, "image_shape", ())[1:]
        task.observe = AlignmentScores(image_size, arguments.score_epochs)
        return task

    axes = tuple(axis for axis in subject.axes if axis not in ("rules", "learning_rates"))
    return dataclasses.replace(subject, task=task, axes=axes, stem="alignment", scores=True)


def alignment_experiments(
    widths: tuple[int, ...],
    learning_rate: float,
    epochs: int,
    scored_after: int,
    timed_width: int,
    quick: Mapping[str, object],
) -> dict[int, Experiment]:
    """Parts 1, 2 and 3.

    Args:
        epochs: of training.
        scored_after: the epoch of the scores against width.
        timed_width: the width of the scores against training time.
        quick: what --quick replaces; part 2 then scores after the last epoch.
    """
    grid = Experiment(
        title="train the pairs of networks",
        rules=("pair",),
        widths=widths,
        learning_rates=(learning_rate,),
        epochs=epochs,
        keep=(0, scored_after),
        quick=quick,
    )
    return {
        1: grid,
        2: dataclasses.replace(
            grid,
            title="alignment score against width",
            epochs=scored_after,
            scored_last=True,
            reporter=against_width,
        ),
        3: dataclasses.replace(
            grid,
            title="alignment score against training time",
            widths=(timed_width,),
            reporter=against_epoch,
            quick={**quick, "widths": quick["widths"][-1:]},
        ),
    }


# -------------------------------------------------------------------------------------------------------------- scores


@dataclasses.dataclass(frozen=True)
class LayerScore:
    """A score of a layer, and of its control. Layers are "layer 1", from the input, and so on; of an RNN "W_hh"."""

    width: int
    seed: int
    epoch: int
    layer: str
    score: float
    control: float | None
    standard_error: float = 0.0  # scores are computed in closed form


def read_scores(folder: RunFolder, epochs: int) -> list[LayerScore]:
    """The defined scores of a run, up to an epoch."""
    scores = []
    for row in folder.rows()[:epochs]:
        layers = [int(name.removeprefix("score_")) for name in row if name.startswith("score_")]
        for layer in layers:
            if (score := row[f"score_{layer}"]) is not None:
                name = "W_hh" if folder.run.network == "rnn" else f"layer {layer}"
                place = (folder.run.width, folder.run.seed, int(row["epoch"]), name)
                scores.append(LayerScore(*place, score, row[f"control_{layer}"]))
    return scores


def mean_text(scores: list[LayerScore], kind: str) -> str:
    """The mean over seeds, with its standard deviation."""
    values = [value for score in scores if (value := getattr(score, kind)) is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def against_width(path: Path, experiment: Experiment, folders: list[RunFolder], arguments: argparse.Namespace) -> str:
    """Part 2: scores per layer against width, after the experiment's last epoch."""
    after = f"after epoch {experiment.epochs}"
    scores = [s for folder in folders for s in read_scores(folder, experiment.epochs) if s.epoch == experiment.epochs]
    if not scores:
        raise UserError(f"no scores {after}: no pair of networks was trained that far and scored (--score-epochs)")
    return _write(path, f"{experiment.title}, {after}", {"": scores}, "width", folders)


def against_epoch(path: Path, experiment: Experiment, folders: list[RunFolder], arguments: argparse.Namespace) -> str:
    """Part 3: scores per layer against training time, a section per width."""
    asked = set(arguments.score_epochs or range(1, experiment.epochs + 1))
    sections = defaultdict(list)
    for folder in folders:
        for score in read_scores(folder, experiment.epochs):
            if score.epoch in asked:
                sections[f"width {score.width}"].append(score)
    if not sections:
        raise UserError("no scores at these epochs; choose others with --score-epochs, or delete the run to score them")
    return _write(path, experiment.title, sections, "epoch", folders)


def _write(
    path: Path, title: str, sections: Mapping[str, list[LayerScore]], against: str, folders: list[RunFolder]
) -> str:
    from wide.figures import draw_scores  # matplotlib takes a second to import

    title += unusual_text([folder.run for folder in folders])
    text = _markdown(title, sections, against, folders)
    draw = partial(draw_scores, title=title, sections=sections, against=against)
    return write_report(path, _as_csv(sections), text, draw)


def _as_csv(sections: Mapping[str, list[LayerScore]]) -> str:
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(LayerScore)]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(score) for scores in sections.values() for score in scores)
    return stream.getvalue()


def _markdown(title: str, sections: Mapping[str, list[LayerScore]], against: str, folders: list[RunFolder]) -> str:
    data = ", ".join(sorted({config["run"]["data"] for folder in folders if (config := folder.config())}))
    seeds = len({folder.run.seed for folder in folders})
    spread = "mean ± standard deviation over seeds; " if seeds > 1 else ""
    runs = [folder.run for folder in folders]
    lines = [f"# {title}", "", f"{spread}computed exactly (standard error 0); {settings_text(runs)}; data {data}.", ""]
    shown = {(score.width, score.seed) for scores in sections.values() for score in scores}
    if absent := [run.name for run in runs if (run.width, run.seed) not in shown]:
        lines += [f"Without scores (diverged, not trained or not scored): {', '.join(absent)}.", ""]
    for section, scores in sections.items():
        places = _thinned(sorted({getattr(score, against) for score in scores}))
        lines += [f"## {section}", ""] if section else []
        lines.append("| layer | " + " | ".join(f"{against} {place}" for place in places) + " |")
        lines.append("|---" * (1 + len(places)) + "|")
        for kind in KINDS:
            for layer in sorted({score.layer for score in scores}):
                cells = [[s for s in scores if s.layer == layer and getattr(s, against) == place] for place in places]
                label = layer if kind == "score" else f"{layer}, weights shuffled"
                lines.append(f"| {label} | " + " | ".join(mean_text(cell, kind) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _thinned(places: list[int]) -> list[int]:
    """At most TABLE_EPOCHS of them, evenly spaced on a logarithmic scale, first and last among them."""
    if len(places) <= TABLE_EPOCHS:
        return places
    last = len(places) - 1
    steps = [round((last + 1) ** (k / (TABLE_EPOCHS - 1))) - 1 for k in range(TABLE_EPOCHS)]
    return [places[k] for k in sorted(set(steps))]
