"""How far a run's outputs are from those of backprop's network, recorded as it is trained."""

import dataclasses
from collections.abc import Iterable

from wide.runs.files import append_rows, writing
from wide.runs.folder import RunFolder
from wide.training.loop import Training
from wide.training.recorders import Recorder


class Gaps(Recorder):
    """gaps.csv: how far outputs are from those of backprop's network, from the same start on the same batches.

    mean_squared_gap is over the outputs for the test images that the run uses. That network is trained beside, as
    far as these epochs need it, and after an interruption from its start again.
    """

    file = "gaps.csv"

    def __init__(self, epochs: Iterable[int]):
        self.epochs = frozenset(epochs)
        self.other: Training | None = None

    def epoch(self, learner: Training, folder: RunFolder) -> None:
        if learner.epoch not in self.epochs:
            return
        if self.other is None:
            run = dataclasses.replace(learner.run, rule="backprop", decay=0.0, rule_variant=None)
            self.other = Training(learner.task, run)
        while self.other.epoch < learner.epoch:
            self.other.train_epoch(evaluate=False)
        gap = (learner.outputs("test") - self.other.outputs("test")).square().mean()
        updates = learner.epoch * (learner.task.size(learner.run, "train") // learner.run.batch_size)
        with writing(folder.path):
            row = {"epoch": learner.epoch, "updates": updates, "mean_squared_gap": gap.item()}
            append_rows(folder.path / self.file, [row])
