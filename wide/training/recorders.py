"""What is recorded of a run beside its metrics: angles between gradients, changes, alignment scores, parameters.

A run's training is given a list of recorders, and calls each of them when it starts, before the last update of every
epoch, and after every epoch. Each keeps what it records in files of its own in the run's folder, or in columns of its
own. The time that they take is no part of an epoch's seconds.
"""

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from align_rules import feedback_angles, gradient_angles, layer_weights
from wide.alignment.pairs import PairParameters, layer_scores, scored_layers
from wide.models.pair import Pair
from wide.runs.files import append_rows, writing
from wide.runs.folder import RunFolder
from wide.training.learner import Learner


class Recorder:
    """Records nothing. Others override what they need.

    Of several processes that train together the first has recorders, which see its share of the batches.
    """

    def start(self, learner: Learner, folder: RunFolder) -> None:
        """Before the first step of a run, once in its life."""

    def gradients(self, learner: Learner, inputs: Tensor, targets: Tensor) -> None:
        """Before the last update of an epoch, whose gradients stand in .grad; they were made from this batch.

        Where a step has several batches, this is its last one.
        """

    def columns(self, learner: Learner) -> Mapping[str, float | None]:
        """After an epoch, number `learner.epoch`: columns to add to its row of metrics.csv, always the same ones."""
        return {}

    def epoch(self, learner: Learner, folder: RunFolder) -> None:
        """After an epoch, number `learner.epoch`, before its row stands in metrics.csv, which says that all is there.

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

    def epoch(self, learner: Learner, folder: RunFolder) -> None:
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

    def gradients(self, learner: Learner, inputs: Tensor, targets: Tensor) -> None:
        def loss(outputs: Tensor) -> Tensor:
            return learner.task.loss(learner.seen(outputs, inputs), targets)

        with learner.autocast():
            degrees = gradient_angles(learner.rule, loss, inputs)
        feedback = feedback_angles(learner.rule)
        self.rows = [
            {
                "epoch": learner.epoch + 1,
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

    def gradients(self, learner: Learner, inputs: Tensor, targets: Tensor) -> None:
        with torch.random.fork_rng():  # making a network draws from torch's generator
            initial = learner.task.rule(learner.run).network
        network = learner.rule.network
        with learner.autocast():
            read, read_at_first = layer_inputs(network, inputs), layer_inputs(initial, inputs)
        before = layer_weights(initial)
        self.rows = [
            {
                "epoch": learner.epoch + 1,
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


class AlignmentScores(Recorder):
    """The scores of a pair after an epoch, as columns of metrics.csv: score_1, control_1, score_2 and so on.

    Args:
        image_size: (h, w) of the input images; () where there are none.
        epochs: score after these only; None for every epoch. The columns are empty after the others.
    """

    def __init__(self, image_size: tuple[int, ...] = (), epochs: Iterable[int] | None = None):
        self.image_size = image_size
        self.epochs = None if epochs is None else set(epochs)

    def columns(self, learner: Learner) -> dict[str, float | None]:
        return self(learner.rule, learner.epoch)

    def __call__(self, pair: Pair, epoch: int) -> dict[str, float | None]:
        if self.epochs is not None and epoch not in self.epochs:
            numbers = range(1, len(scored_layers(pair.network)) + 1)
            return {f"{kind}_{k}": None for k in numbers for kind in ("score", "control")}
        initial, trained = pair.initial.named().items(), (pair.network, pair.align)
        parameters = PairParameters(_exact(initial), *(_exact(network.named_parameters()) for network in trained))
        return layer_scores(pair.network, parameters, self.image_size)


def _exact(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By name, on a device that has double precision, which scores are computed in."""
    return {name: p.cpu() if p.device.type == "mps" else p for name, p in parameters}


class KeptParameters(Recorder):
    """parameters/epoch_<k>.pt: the parameters that learn, by name in the rule, after these epochs (0: the initial)."""

    def __init__(self, epochs: Iterable[int]):
        self.epochs = frozenset(epochs)

    def start(self, learner: Learner, folder: RunFolder) -> None:
        self.keep(learner, folder)

    def epoch(self, learner: Learner, folder: RunFolder) -> None:
        self.keep(learner, folder)

    def keep(self, learner: Learner, folder: RunFolder) -> None:
        if learner.epoch in self.epochs:
            folder.save_parameters(learner.epoch, learner.parameters())
