"""What a report is handed, and what every kind of report does."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from wide.options import RecordOptions
from wide.reports.tables import Metrics, View
from wide.runs.folder import RunFolder
from wide.runs.run import Run


@dataclasses.dataclass(frozen=True)
class Shown:
    """The runs of an experiment, as it is asked for, and how they are shown.

    Args:
        path: of the report's files, without a suffix.
        title: of table and figure.
        epochs: that are shown of every run.
        folders: of the runs; `compared_folders` of those that are shown beside, where they are done.
        view, metrics: see there.
        references: metrics to compare with, by name.
        examples: number of training examples in the full dataset.
        image_size, strides: of convolutional networks; () where there are none.
        record: what was asked to be recorded.
    """

    path: Path
    title: str
    epochs: int
    folders: list[RunFolder]
    compared_folders: list[RunFolder]
    view: View
    metrics: Metrics
    references: Callable[[], Mapping[str, Mapping[str, float]]]
    examples: int
    image_size: tuple[int, ...]
    strides: tuple[int, ...]
    record: RecordOptions

    @property
    def runs(self) -> list[Run]:
        return [folder.run for folder in self.folders]


class Report(Protocol):
    """What an experiment shows of its runs."""

    def check(self, shown: Shown) -> None:
        """Raise UserError, before any training, for what could not be shown."""

    def has(self, shown: Shown, folder: RunFolder) -> bool:
        """Whether what it shows of a run is there, so that the run need not be trained."""

    def scored_epochs(self, shown: Shown) -> tuple[int, ...]:
        """The epochs whose alignment scores it shows, as far as they are named one by one."""

    def write(self, shown: Shown) -> str:
        """Write the report, and return its text; UserError if there is nothing to show."""
