"""Reports of alignment scores: layer by layer, against width or against training time."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import BinaryIO

from wide import UserError
from wide.alignment.pairs import layer_scores
from wide.alignment.parameters import kept_pair
from wide.options import PAPER_SEED
from wide.reports.report import figures, write_report
from wide.reports.shown import Shown
from wide.reports.tables import data_text, settings_text, unusual_text
from wide.runs.files import csv_text
from wide.runs.folder import FINISHED, RunFolder

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


def kept_scores(shown: Shown, folder: RunFolder, epochs: set[int]) -> list[LayerScore]:
    """The scores of a run from the parameters that it kept, after those of these epochs whose parameters are there.

    Raises:
        UserError: a file is damaged, or of another network.
    """
    scores = []
    for epoch in sorted(epochs & folder.kept_epochs()):
        network, parameters = kept_pair(folder, epoch, shown.strides)
        found = layer_scores(network, parameters, shown.image_size, shown.record.shuffle_seed)
        scores += _of_layers(folder, epoch, found)
    return scores


def _of_layers(folder: RunFolder, epoch: int, row: Mapping[str, float | None]) -> list[LayerScore]:
    """The scores that are defined, from columns score_1, control_1, score_2 and so on."""
    place = (folder.run.width, folder.run.seed, epoch)
    numbers = [int(name.removeprefix("score_")) for name in row if name.startswith("score_")]
    return [
        LayerScore(*place, layer_name(folder.run.network, number), score, row[f"control_{number}"])
        for number in numbers
        if (score := row[f"score_{number}"]) is not None
    ]


def layer_name(network: str, number: int) -> str:
    return "W_hh" if network == "rnn" else f"layer {number}"


def mean_text(scores: list[LayerScore], kind: str) -> str:
    """The mean over seeds, with its standard deviation."""
    values = [value for score in scores if (value := getattr(score, kind)) is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """Scores per layer (see shown.Report).

    Those taken while the pairs trained are read from metrics.csv; where there are none, or the control is asked for
    with another seed of the shuffle, they are computed from the parameters that the runs kept.

    Args:
        against: "width", after the experiment's last epoch (part 2); or "epoch", a section per width (part 3).
    """

    against: str

    def check(self, shown: Shown) -> None:
        if len({run.data_limit for run in shown.runs}) > 1:
            raise UserError("--data-limits takes one value here; for others run the command again")
        scored, last = shown.record.score_epochs, shown.epochs
        missing = any(not self.has(shown, folder) for folder in shown.folders)
        if self.against == "width" and missing and scored and last not in scored:
            raise UserError(f"scores after epoch {last} are shown; add {last} to --score-epochs")

    def scored_epochs(self, shown: Shown) -> tuple[int, ...]:
        return (shown.epochs,) if self.against == "width" else shown.record.score_epochs or ()

    def asked(self, shown: Shown) -> set[int]:
        """The epochs whose scores are shown, where they are there."""
        return set(self.scored_epochs(shown) or range(1, shown.epochs + 1))

    def has(self, shown: Shown, folder: RunFolder) -> bool:
        if folder.status(shown.epochs) in FINISHED:
            return True
        taken = {score.epoch for score in self.taken(shown, folder)}
        return self.asked(shown) <= taken | folder.kept_epochs()

    def taken(self, shown: Shown, folder: RunFolder) -> list[LayerScore]:
        """What was asked for and scored while the run trained, with the published seed of the shuffle."""
        if shown.record.shuffle_seed != PAPER_SEED:
            return []
        asked = self.asked(shown)
        return [score for score in read_scores(folder, shown.epochs) if score.epoch in asked]

    def scores(self, shown: Shown, folder: RunFolder) -> list[LayerScore]:
        taken = self.taken(shown, folder)
        lacking = self.asked(shown) - {score.epoch for score in taken}
        return sorted([*taken, *kept_scores(shown, folder, lacking)], key=lambda score: score.epoch)

    def write(self, shown: Shown) -> str:
        sections = defaultdict(list)
        for folder in shown.folders:
            for score in self.scores(shown, folder):
                sections["" if self.against == "width" else f"width {score.width}"].append(score)
        if not sections:
            raise UserError(self.nothing(shown))
        after = f", after epoch {shown.epochs}" if self.against == "width" else ""
        title = shown.title + after + unusual_text(shown.runs)

        def draw(file: BinaryIO) -> None:
            figures("score_figure").draw_scores(file, title, sections, self.against)

        text = _markdown(title, sections, self.against, shown)
        rows = csv_text([dataclasses.asdict(score) for scores in sections.values() for score in scores], header=True)
        return write_report(shown.path, rows, text, draw)

    def nothing(self, shown: Shown) -> str:
        """Why there is nothing to show, in a line."""
        if shown.record.shuffle_seed != PAPER_SEED:
            return "--shuffle-seed: no parameters are kept after these epochs; see --score-epochs, --keep-parameters"
        if self.against == "width":
            trained = "no pair of networks was trained that far and scored (--score-epochs)"
            return f"no scores after epoch {shown.epochs}: {trained}"
        return "no scores at these epochs; choose others with --score-epochs, or delete the run to score them"


def _markdown(title: str, sections: Mapping[str, list[LayerScore]], against: str, shown: Shown) -> str:
    runs, seeds = shown.runs, len({run.seed for run in shown.runs})
    spread = "mean ± standard deviation over seeds; " if seeds > 1 else ""
    seed = shown.record.shuffle_seed
    shuffle = f"; shuffled with seed {seed}" if seed != PAPER_SEED else ""
    legend = f"{spread}computed exactly{shuffle}; {settings_text(runs)}; {data_text(shown.folders)}."
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
