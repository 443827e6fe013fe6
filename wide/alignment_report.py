"""Reports of alignment scores: layer by layer, against width or against training time."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from wide import UserError
from wide.alignment import layer_scores
from wide.files import csv_text
from wide.options import PAPER_SEED
from wide.parameters import KINDS, kept_pair, load_pair
from wide.report import figures, write_report
from wide.runs import FINISHED, RunFolder
from wide.tables import data_text, settings_text, unusual_text

if TYPE_CHECKING:
    from wide.experiments import Subject
    from wide.study import Study

COLUMNS = ("score", "control")
TABLE_EPOCHS = 10  # columns of the table of scores against time; the .csv has every epoch


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
    """The defined scores of a run that were taken while it trained, up to an epoch.

    Raises:
        UserError: its metrics are damaged.
    """
    try:
        return [score for row in folder.rows()[:epochs] for score in _of_layers(folder, int(row["epoch"]), row)]
    except (KeyError, ValueError) as error:  # names of columns
        raise folder.damaged(folder.metrics_path, ValueError("its columns are not score_1, control_1, ...")) from error


def kept_scores(study: "Study", folder: RunFolder, epochs: set[int]) -> list[LayerScore]:
    """The scores of a run from the parameters that it kept, after those of these epochs whose parameters are there.

    Raises:
        UserError: a file is damaged, or of another network.
    """
    subject, scores = study.subject, []
    for epoch in sorted(epochs & folder.kept_epochs()):
        network, parameters = kept_pair(folder, epoch, subject.strides)
        found = layer_scores(network, parameters, subject.image_size, study.options.record.shuffle_seed)
        scores += _of_layers(folder, epoch, found)
    return scores


def _of_layers(folder: RunFolder, epoch: int, row: Mapping[str, float | None]) -> list[LayerScore]:
    """The scores that are defined, from columns score_1, control_1, score_2 and so on."""
    place = (folder.run.width, folder.run.seed, epoch)
    numbers = [int(name.removeprefix("score_")) for name in row if name.startswith("score_")]
    return [
        LayerScore(*place, _layer_name(folder.run.network, number), score, row[f"control_{number}"])
        for number in numbers
        if (score := row[f"score_{number}"]) is not None
    ]


def _layer_name(network: str, number: int) -> str:
    return "W_hh" if network == "rnn" else f"layer {number}"


def mean_text(scores: list[LayerScore], kind: str) -> str:
    """The mean over seeds, with its standard deviation."""
    values = [value for score in scores if (value := getattr(score, kind)) is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """Scores per layer (see experiments.Report).

    Those taken while the pairs trained are read from metrics.csv; where there are none, or the control is asked for
    with another seed of the shuffle, they are computed from the parameters that the runs kept.

    Args:
        against: "width", after the experiment's last epoch (part 2); or "epoch", a section per width (part 3).
    """

    against: str

    def check(self, study: "Study") -> None:
        if len(study.experiment.data_limits) > 1:
            raise UserError("--data-limits takes one value here; for others run the command again")
        scored, last = study.options.record.score_epochs, study.epochs
        missing = any(not self.has(study, folder) for folder in study.folders)
        if self.against == "width" and missing and scored and last not in scored:
            raise UserError(f"scores after epoch {last} are shown; add {last} to --score-epochs")

    def scored_epochs(self, study: "Study") -> tuple[int, ...]:
        return (study.epochs,) if self.against == "width" else study.options.record.score_epochs or ()

    def asked(self, study: "Study") -> set[int]:
        """The epochs whose scores are shown, where they are there."""
        return set(self.scored_epochs(study) or range(1, study.epochs + 1))

    def has(self, study: "Study", folder: RunFolder) -> bool:
        if folder.status(study.epochs) in FINISHED:
            return True
        taken = {score.epoch for score in self.taken(study, folder)}
        return self.asked(study) <= taken | folder.kept_epochs()

    def taken(self, study: "Study", folder: RunFolder) -> list[LayerScore]:
        """What was asked for and scored while the run trained, with the published seed of the shuffle."""
        if study.options.record.shuffle_seed != PAPER_SEED:
            return []
        asked = self.asked(study)
        return [score for score in read_scores(folder, study.epochs) if score.epoch in asked]

    def scores(self, study: "Study", folder: RunFolder) -> list[LayerScore]:
        taken = self.taken(study, folder)
        lacking = self.asked(study) - {score.epoch for score in taken}
        return sorted([*taken, *kept_scores(study, folder, lacking)], key=lambda score: score.epoch)

    def write(self, study: "Study") -> str:
        sections = defaultdict(list)
        for folder in study.folders:
            for score in self.scores(study, folder):
                sections["" if self.against == "width" else f"width {score.width}"].append(score)
        if not sections:
            raise UserError(self.nothing(study))
        after = f", after epoch {study.epochs}" if self.against == "width" else ""
        title = study.title + after + unusual_text(study.runs)

        def draw(file: BinaryIO) -> None:
            figures("score_figure").draw_scores(file, title, sections, self.against)

        text = _markdown(title, sections, self.against, study)
        rows = csv_text([dataclasses.asdict(score) for scores in sections.values() for score in scores], header=True)
        return write_report(study.report_path, rows, text, draw)

    def nothing(self, study: "Study") -> str:
        """Why there is nothing to show, in a line."""
        if study.options.record.shuffle_seed != PAPER_SEED:
            return "--shuffle-seed: no parameters are kept after these epochs; see --score-epochs, --keep-parameters"
        if self.against == "width":
            trained = "no pair of networks was trained that far and scored (--score-epochs)"
            return f"no scores after epoch {study.epochs}: {trained}"
        return "no scores at these epochs; choose others with --score-epochs, or delete the run to score them"


def score_files(subject: "Subject", files: tuple[Path, Path, Path], shuffle_seed: int) -> str:
    """A table of the scores of a pair of networks from three state_dicts: initial, trained and align.

    Raises:
        UserError: as for `load_pair`, or a kind of network that the subject does not have.
    """
    network, parameters = load_pair(*files, subject.strides)
    if (kind := KINDS[type(network)]) not in subject.networks:
        raise UserError(f"{files[0]} holds a network of the kind {kind}, which {subject.title} has not")
    scores = layer_scores(network, parameters, subject.image_size, shuffle_seed)
    lines = ["| layer | score | weights shuffled |", "|---|---|---|"]
    for number in range(1, len(scores) // 2 + 1):
        cells = [scores[f"{kind}_{number}"] for kind in COLUMNS]
        texts = ["undefined" if value is None else f"{value:.4f}" for value in cells]
        lines.append(f"| {_layer_name(kind, number)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _markdown(title: str, sections: Mapping[str, list[LayerScore]], against: str, study: "Study") -> str:
    runs, seeds = study.runs, len({run.seed for run in study.runs})
    spread = "mean ± standard deviation over seeds; " if seeds > 1 else ""
    seed = study.options.record.shuffle_seed
    shuffle = f"; shuffled with seed {seed}" if seed != PAPER_SEED else ""
    legend = f"{spread}computed exactly (standard error 0){shuffle}; {settings_text(runs)}; {data_text(study.folders)}."
    lines = [f"# {title}", "", legend, ""]
    shown = {(score.width, score.seed) for scores in sections.values() for score in scores}
    if absent := [run.name for run in runs if (run.width, run.seed) not in shown]:
        lines += [f"Without scores (diverged, not trained or not scored): {', '.join(absent)}.", ""]
    for section, scores in sections.items():
        lines += [f"## {section}", ""] if section else []
        lines += [*_table(scores, against), ""]
    return "\n".join(lines)


def _table(scores: list[LayerScore], against: str) -> list[str]:
    """The lines of a table: a row per layer, and one per control."""
    places = _thinned(sorted({getattr(score, against) for score in scores}))
    lines = ["| layer | " + " | ".join(f"{against} {place}" for place in places) + " |"]
    lines.append("|---" * (1 + len(places)) + "|")
    for kind in COLUMNS:
        for layer in sorted({score.layer for score in scores}):
            cells = [[s for s in scores if s.layer == layer and getattr(s, against) == place] for place in places]
            label = layer if kind == "score" else f"{layer}, weights shuffled"
            lines.append(f"| {label} | " + " | ".join(mean_text(cell, kind) for cell in cells) + " |")
    return lines


def _thinned(places: list[int]) -> list[int]:
    """At most TABLE_EPOCHS of them, evenly spaced on a logarithmic scale, first and last among them."""
    if len(places) <= TABLE_EPOCHS:
        return places
    last = len(places) - 1
    steps = [round((last + 1) ** (k / (TABLE_EPOCHS - 1))) - 1 for k in range(TABLE_EPOCHS)]
    return [places[k] for k in sorted(set(steps))]
