"""What is recorded of a run beside its metrics: angles between gradients, changes since the start, parameters.

A run's training is given a list of recorders, and calls each of them when it starts, before the last update of every
epoch, and after every epoch. Each keeps what it records in files of its own in the run's folder, or in columns of its
own. The time that they take is no part of an epoch's seconds.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align_rules import feedback_angles, gradient_angles, layer_weights
from wide.files import append_rows, writing
from wide.runs import RunFolder

if TYPE_CHECKING:
    from wide.training import Training


class Recorder:
    """Records nothing. Others override what they need.

    Of several processes that train together the first has recorders, which see its share of the batches.
    """

    def start(self, training: "Training", folder: RunFolder) -> None:
        """Before the first step of a run, once in its life."""

    def gradients(self, training: "Training", inputs: Tensor, targets: Tensor) -> None:
        """Before the last update of an epoch, whose gradients stand in .grad; they were made from this batch.

        Where a step has several batches, this is its last one.
        """

    def columns(self, training: "Training") -> Mapping[str, float | None]:
        """After an epoch, number `training.epoch`: columns to add to its row of metrics.csv, always the same ones."""
        return {}

    def epoch(self, training: "Training", folder: RunFolder) -> None:
        """After an epoch, number `training.epoch`, before its row stands in metrics.csv, which says that all is there.

        What is written here may be written again: after a kill before the row, the epoch is trained once more.
        """


class LayerRows(Recorder):
    """A file of its own with a row per epoch and layer, made from the epoch's last batch before its update.

    Attributes:
        file: its name in the run's folder.
        rows: of the epoch that is trained, once they are made.
    """

    file: str

    def __init__(self):
        self.rows: list[dict[str, float | str | None]] = []

    def epoch(self, training: "Training", folder: RunFolder) -> None:
        if self.rows:
            with writing(folder.path):
                append_rows(folder.path / self.file, self.rows)
            self.rows = []  # the next epoch may have none


class Angles(LayerRows):
    """angles.csv, in degrees.

    degrees_to_backprop is the angle between the rule's gradient of the layer's weight and backprop's;
    degrees_feedback_to_weight that between the weight that errors go back through and the current one. Empty where
    undefined.
    """

    file = "angles.csv"

    def gradients(self, training: "Training", inputs: Tensor, targets: Tensor) -> None:
        def loss(outputs: Tensor) -> Tensor:
            return training.task.loss(training.seen(outputs, inputs), targets)

        with training.autocast():
            degrees = gradient_angles(training.rule, loss, inputs)
        feedback = feedback_angles(training.rule)
        self.rows = [
            {
                "epoch": training.epoch + 1,
                "layer": name.removesuffix(".weight"),
                "degrees_to_backprop": angle,
                "degrees_feedback_to_weight": feedback.get(name),
            }
            for name, angle in degrees.items()
        ]


class Changes(LayerRows):
    """changes.csv, for the same network and batch as in angles.csv.

    relative_weight_change is ||W - W0|| / ||W0|| (Frobenius), relative_activity_change the same of the activity that
    the layer reads, against that of the initial network for the same batch; it is empty where a layer reads the
    inputs themselves, or is not called as a module.
    """

    file = "changes.csv"

    def gradients(self, training: "Training", inputs: Tensor, targets: Tensor) -> None:
        with torch.random.fork_rng():  # making a network draws from torch's generator
            initial = training.task.rule(training.run).network
        network = training.rule.network
        with training.autocast():
            read, read_at_first = layer_inputs(network, inputs), layer_inputs(initial, inputs)
        before = layer_weights(initial)
        self.rows = [
            {
                "epoch": training.epoch + 1,
                "layer": (layer := name.removesuffix(".weight")),
                "relative_weight_change": relative_change(weight, before[name]),
                "relative_activity_change": relative_change(read.get(layer), read_at_first.get(layer)),
            }
            for name, weight in layer_weights(network).items()
        ]


@torch.no_grad()
def layer_inputs(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The activity that each layer reads, by the layer's name, for a batch; not where it is the batch itself."""
    names = [name.rpartition(".")[0] for name in layer_weights(network)]
    found = {}
    with contextlib.ExitStack() as stack:
        for name in names:

            def keep(module, arguments, name=name):
                found[name] = arguments[0]

            stack.callback(network.get_submodule(name).register_forward_pre_hook(keep).remove)
        network(inputs)
    return {name: activity for name, activity in found.items() if activity.data_ptr() != inputs.data_ptr()}


def relative_change(now: Tensor | None, before: Tensor | None) -> float | None:
    """The norm of the difference as a share of that of `before`; None without them, or where that is zero."""
    if now is None or before is None or not before.any():
        return None
    now, before = now.detach().double(), before.detach().double()
    return float((now - before).norm() / before.norm())


class Gaps(Recorder):
    """gaps.csv: how far outputs are from those of backprop's network, from the same start on the same batches.

    mean_squared_gap is over the outputs for the test images that the run uses. That network is trained beside, as
    far as these epochs need it, and after an interruption from its start again.
    """

    file = "gaps.csv"

    def __init__(self, epochs: Iterable[int]):
        self.epochs = frozenset(epochs)
        self.other: Training | None = None

    def epoch(self, training: "Training", folder: RunFolder) -> None:
        if training.epoch not in self.epochs:
            return
        if self.other is None:
            run = dataclasses.replace(training.run, rule="backprop", decay=0.0, rule_variant=None)
            self.other = type(training)(training.task, run)
        while self.other.epoch < training.epoch:
            self.other.train_epoch(evaluate=False)
        gap = (training.outputs("test") - self.other.outputs("test")).square().mean()
        updates = training.epoch * (training.task.size(training.run, "train") // training.run.batch_size)
        with writing(folder.path):
            row = {"epoch": training.epoch, "updates": updates, "mean_squared_gap": gap.item()}
            append_rows(folder.path / self.file, [row])


class KeptParameters(Recorder):
    """parameters/epoch_<k>.pt: the parameters that learn, by name in the rule, after these epochs (0: the initial)."""

    def __init__(self, epochs: Iterable[int]):
        self.epochs = frozenset(epochs)

    def start(self, training: "Training", folder: RunFolder) -> None:
        self.keep(training, folder)

    def epoch(self, training: "Training", folder: RunFolder) -> None:
        self.keep(training, folder)

    def keep(self, training: "Training", folder: RunFolder) -> None:
        if training.epoch in self.epochs:
            folder.save_parameters(training.epoch, training.parameters())
