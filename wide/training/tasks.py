"""What is learned: for each kind of data the networks that fit it, the loss, and what is measured after an epoch."""

import dataclasses
import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import align_rules
from wide import UserError
from wide.data.datasets import ImageDataset, Split, add_sequences
from wide.models.networks import ConvolutionalNetwork, FullyConnectedNetwork, RecurrentNetwork
from wide.models.rules import make_rule
from wide.runs.run import Run
from wide.training.processes import Processes


def count_operations() -> FlopCounterMode:
    """Counts floating-point operations of products, those of a recurrence among them, which torch does not know."""

    def of_recurrence(s0, W, drive, *_, **__) -> int:  # shapes
        return 2 * math.prod(drive) * W[0]

    def of_addmm(_, one, other, **__) -> int:
        return 2 * math.prod(one) * other[-1]

    mapping = {align_rules.RECURRENCE.overloadpacket: of_recurrence, torch.ops.aten.addmm_: of_addmm}
    return FlopCounterMode(display=False, custom_mapping=mapping)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A pass over a split after each epoch. `streamed`: in an order from the run's stream, as published; else fixed."""

    split: str
    streamed: bool


class Task:
    """Data, and how runs learn them.

    `columns` are the metrics of metrics.csv: "<split>_<measure>", averaged over batches. Those of the training split
    are taken during training unless it is evaluated afterwards. `evaluated_together`: how many batches are evaluated in
    one call of the network; more than one where no output depends on the other examples of its batch.
    """

    columns: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    input_shape: tuple[int, ...]  # of one example, as networks take it
    evaluated_together = 1

    def __init__(self, splits: dict[str, Sized], fingerprint: str, device: torch.device):
        self.splits = splits
        self.fingerprint = fingerprint
        self.device = device

    def check(self, run: Run) -> None:
        """
        Raises:
            UserError: the run does not fit the data.
        """
        raise NotImplementedError

    def network(self, run: Run) -> nn.Module:
        """A fresh network of the run's kind and width."""
        raise NotImplementedError

    def rule(self, run: Run) -> align_rules.Rule:
        """Such a network with its published initial parameters, wrapped in the run's rule, on the device."""
        return make_rule(run, self.network(run)).to(self.device)

    def products(self, run: Run) -> int:
        """Floating-point operations of the products in a forward pass of the run's network, with a batch."""
        with torch.device("meta"), torch.no_grad():
            network, inputs = self.network(run), torch.empty(run.batch_size, *self.input_shape)
            with count_operations() as counter:
                network(inputs)
        return counter.get_total_flops()

    def size(self, run: Run, split: str) -> int:
        """How many examples of a split the run uses: the first ones."""
        return len(self.splits[split])

    def batches(self, run: Run, split: str, indices: list[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of these examples: inputs as a network takes them, and targets, on the device.

        Args:
            epoch: the number of epochs trained before, for what is random in the inputs.
        """
        data = self.splits[split]
        whole = torch.from_numpy(np.concatenate(indices)).to(self.device)
        for part in whole.split([len(part) for part in indices]):
            yield self.prepared(data.inputs[part]), data.targets[part]

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs as a network takes them."""
        return inputs

    def noticed(self, processes: Processes) -> dict[str, int]:
        """More metrics of the epoch that ends, from what all processes noticed in reading the data."""
        return {}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(outputs, targets)}


class ClassificationTask(Task):
    """Classification of images by regression onto one-hot vectors (section 2 of the paper's released code).

    `offset` is subtracted from the one-hot vectors. `pooled_feedback`: direct feedback reaches an activity's channels,
    averaged over positions, and not every entry.
    """

    offset = 0.1
    pooled_feedback = False
    classes: int
    image_shape: tuple[int, int, int]  # (channels, h, w)
    strides: tuple[int, ...]  # of the blocks

    def check(self, run: Run) -> None:
        examples = len(self.splits["train"])
        if run.data_limit is not None and run.data_limit > examples:
            raise UserError(f"there are {examples} training images; use --data-limits up to {examples}")
        if examples < (step := run.batch_size * run.batches):
            raise UserError(f"{examples} training images make no batch of {step}; use a smaller --batch-size")
        if run.batch_size < 2:
            limited = f", which --data-limits {run.data_limit} leads to" if run.data_limit else ""
            raise UserError(
                f"a batch of one{limited}, cannot be normalised over the batch; choose --batch-size and --data-limits "
                "with a common divisor of at least 2"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def network(self, run: Run) -> nn.Module:
        if run.network == "cnn":
            channels = self.image_shape[0]
            return ConvolutionalNetwork(channels, run.width, self.strides, self.classes, run.parameterisation)
        pixels = math.prod(self.image_shape)
        return FullyConnectedNetwork(pixels, run.width, self.classes, parameterisation=run.parameterisation)

    def rule(self, run: Run) -> align_rules.Rule:
        return make_rule(run, self.network(run), self.image_shape, self.pooled_feedback).to(self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = F.one_hot(targets, self.classes).to(outputs.dtype) - self.offset
        return F.mse_loss(outputs, wanted)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        accuracy = (outputs.argmax(1) == targets).float().mean()
        return {"loss": self.loss(outputs, targets), "accuracy": accuracy}


class ImageTask(ClassificationTask):
    """Classification of a dataset that is small enough to stay on the device."""

    columns = ("train_loss", "train_accuracy", "validation_accuracy", "test_accuracy")
    evaluations = (Evaluation("validation", streamed=True), Evaluation("test", streamed=False))

    def __init__(self, dataset: ImageDataset, strides: tuple[int, ...], device: torch.device):
        splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        super().__init__(_on(device, splits), dataset.fingerprint, device)
        self.classes, self.image_shape, self.strides = dataset.classes, dataset.image_shape, strides

    def size(self, run: Run, split: str) -> int:
        """Of limited data the first images of each split, but 1000 for the test or more: all would outlast training."""
        size, limit = super().size(run, split), run.data_limit
        if split == "test" and limit is not None:
            limit = max(limit, 1000)
        return size if limit is None else min(size, limit)

    def prepared(self, inputs: Tensor) -> Tensor:
        return inputs / 255 if inputs.dtype == torch.uint8 else inputs


class AddTask(Task):
    """Adding two earlier inputs of a binary sequence, with a recurrent network."""

    columns = ("train_loss", "test_loss")
    evaluations = (Evaluation("test", streamed=True), Evaluation("train", streamed=True))
    evaluated_together = 6  # all training sequences in the published batches of 50

    def __init__(self, variant: str, device: torch.device):
        super().__init__(_on(device, add_sequences(variant)), f"add-{variant}", device)

    def check(self, run: Run) -> None:
        smallest = min(len(split.inputs) for split in self.splits.values())
        if run.batch_size > smallest:
            # Every sequence of a batch has an initial state of its own, so all splits need whole batches.
            raise UserError(f"the Add task has {smallest} test sequences; use --batch-size {smallest} or less")

    def network(self, run: Run) -> nn.Module:
        return RecurrentNetwork(run.width, run.batch_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.splits["train"].inputs.shape[1:])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over time of the batch mean of the squared error."""
        return (outputs - targets).square().mean(0).sum()

    def chance(self, split: str) -> float:
        """The loss of guessing 0.5 throughout."""
        targets = self.splits[split].targets
        return float(self.loss(torch.full_like(targets, 0.5), targets))


def _on(device: torch.device, splits: dict[str, Split]) -> dict[str, Split]:
    return {name: Split(part.inputs.to(device), part.targets.to(device)) for name, part in splits.items()}
