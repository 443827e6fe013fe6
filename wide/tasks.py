"""What is learned: for each kind of data the networks that fit it, the loss, and what is measured after an epoch."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import align_rules
from wide import UserError
from wide.alignment import Pair
from wide.datasets import ImageDataset, Split, add_sequences
from wide.networks import ConvolutionalNetwork, FullyConnectedNetwork, RecurrentNetwork, draw
from wide.runs import Run

RULES = {**align_rules.RULES, "pair": Pair}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A pass over a split after each epoch. `streamed`: in an order from the run's stream, as published; else fixed."""

    split: str
    streamed: bool


class Task:
    """Data on a device, and how runs learn them.

    `columns` are the metrics of metrics.csv: "<split>_<measure>", averaged over batches. Those of the training split
    are taken during training unless it is evaluated afterwards. `observe`, called with the rule and the epoch, adds
    metrics of its own.
    """

    columns: tuple[str, ...]
    observe: Callable[[align_rules.Rule, int], dict[str, float | None]] | None = None
    evaluations: tuple[Evaluation, ...]

    def __init__(self, splits: dict[str, Split], fingerprint: str, device: torch.device):
        self.splits = {name: Split(part.inputs.to(device), part.targets.to(device)) for name, part in splits.items()}
        self.fingerprint = fingerprint
        self.device = device

    def check(self, run: Run) -> None:
        """
        Raises:
            UserError: the run does not fit the data.
        """
        examples = len(self.splits["train"])
        if run.data_limit is not None and run.data_limit > examples:
            raise UserError(f"there are {examples} training images; use --data-limits up to {examples}")
        if examples < run.batch_size:
            raise UserError(f"{examples} training images make no batch of {run.batch_size}; use a smaller --batch-size")
        if run.batch_size < 2:
            limited = f", which --data-limits {run.data_limit} leads to" if run.data_limit else ""
            raise UserError(
                f"a batch of one{limited}, cannot be normalised over the batch; choose --batch-size and --data-limits "
                "with a common divisor of at least 2"
            )

    def rule(self, run: Run) -> align_rules.Rule:
        """A fresh network with its published initial parameters, wrapped in the run's rule, on the device."""
        raise NotImplementedError

    def data(self, run: Run, split: str) -> Split:
        """The part of a split that the run uses."""
        return self.splits[split]

    def batch(self, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs as a network takes them, and targets."""
        return split.inputs[indices], split.targets[indices]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(outputs, targets)}


class ImageTask(Task):
    """Classification by regression onto one-hot vectors minus 0.1 (section 2 of the paper's released code)."""

    columns = ("train_loss", "train_accuracy", "validation_accuracy", "test_accuracy")
    evaluations = (Evaluation("validation", streamed=True), Evaluation("test", streamed=False))
    networks = ("cnn", "mlp")

    def __init__(self, dataset: ImageDataset, strides: tuple[int, ...], device: torch.device):
        splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        super().__init__(splits, dataset.fingerprint, device)
        self.classes, self.image_shape, self.strides = dataset.classes, dataset.image_shape, strides

    def rule(self, run: Run) -> align_rules.Rule:
        channels, height, width = self.image_shape
        if run.network == "cnn":
            network = ConvolutionalNetwork(channels, run.width, self.strides, self.classes, run.parameterisation)
        else:
            pixels = channels * height * width
            network = FullyConnectedNetwork(pixels, run.width, self.classes, parameterisation=run.parameterisation)
        kind = {"fa": "layers", "dfa": "blocks"}.get(run.rule)
        feedback = draw(network, run.seed, kind, self.image_shape)
        settings = {"feedback": feedback} if feedback else {}
        return RULES[run.rule](network, **settings).to(self.device)

    def data(self, run: Run, split: str) -> Split:
        """Of limited data the first images of each split, but 1000 for the test or more: all would outlast training."""
        whole, limit = self.splits[split], run.data_limit
        if split == "test" and limit is not None:
            limit = max(limit, 1000)
        return Split(whole.inputs[:limit], whole.targets[:limit])

    def batch(self, split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = super().batch(split, indices)
        return (images / 255 if images.dtype == torch.uint8 else images), labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = F.one_hot(targets, self.classes).to(outputs.dtype) - 0.1
        return F.mse_loss(outputs, wanted)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        accuracy = (outputs.argmax(1) == targets).float().mean()
        return {"loss": self.loss(outputs, targets), "accuracy": accuracy}


class AddTask(Task):
    """Adding two earlier inputs of a binary sequence, with a recurrent network."""

    columns = ("train_loss", "test_loss")
    evaluations = (Evaluation("test", streamed=True), Evaluation("train", streamed=True))
    networks = ("rnn",)

    def __init__(self, variant: str, device: torch.device):
        super().__init__(add_sequences(variant), f"add-{variant}", device)

    def check(self, run: Run) -> None:
        smallest = min(len(split.inputs) for split in self.splits.values())
        if run.batch_size > smallest:
            # Every sequence of a batch has an initial state of its own, so all splits need whole batches.
            raise UserError(f"the Add task has {smallest} test sequences; use --batch-size {smallest} or less")

    def rule(self, run: Run) -> align_rules.Rule:
        network = RecurrentNetwork(run.width, run.batch_size)
        feedback = draw(network, run.seed, "layers" if run.rule == "fa" else None)
        live = ("initial_state",)
        # The published copy's readout reads its own state alone: its input is not coupled.
        uncoupled = ("readout",) if run.variant == "published" else ()
        settings = {
            "last_layer": {"learns": ("readout", *live)},
            "fa": {"feedback": feedback},
            "align_ada": {"coupling": "activity", "live": live, "uncoupled": uncoupled},
            "align_zero": {"live": live},
            "pair": {"live": live},
        }
        return RULES[run.rule](network, **settings.get(run.rule, {})).to(self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over time of the batch mean of the squared error."""
        return (outputs - targets).square().mean(0).sum()

    def chance(self, split: str) -> float:
        """The loss of guessing 0.5 throughout."""
        targets = self.splits[split].targets
        return float(self.loss(torch.full_like(targets, 0.5), targets))
