"""The training loop, one for all tasks, networks and rules."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wide.models.networks import synchronise_normalisation
from wide.models.rules import RULES
from wide.runs.run import Run
from wide.training.capture import Captured
from wide.training.devices import exact, finish
from wide.training.learner import Learner
from wide.training.processes import ALONE, Processes
from wide.training.recorders import Recorder
from wide.training.tasks import Task


class Training(Learner):
    """A run in progress.

    Attributes:
        alone: whether a step is one whole batch, in this process.

    Args:
        processes: those that train together. Every step's batches are shared out among them; where a step is one batch,
            each takes a part of it, and the batch is normalised as a whole.
        recorders: what is recorded beside the metrics.
    """

    def __init__(self, task: Task, run: Run, processes: Processes = ALONE, recorders: Sequence[Recorder] = ()):
        super().__init__(task, run)
        self.processes, self.recorders = processes, recorders
        self.alone = run.batches == 1 and processes.count == 1
        self.split_batches = run.batches == 1 and processes.count > 1
        if self.split_batches:
            synchronise_normalisation(self.rule, processes.sum)
            if run.centred:
                synchronise_normalisation(self.initial, processes.sum)
        self.captured = Captured(lambda *batch: self.update([batch]), task.device) if self.can_be_captured() else None
        self.aside_seconds = 0.0  # of this epoch, on recorders

    def can_be_captured(self) -> bool:
        """Whether a step is the same work on the same memory every time, on a GPU.

        Adam's bias correction is a number of Python's, the noise of a mirror step comes from the CPU, and a step of
        several batches or processes is made of parts.
        """
        plain = RULES[self.run.rule].between_steps is None and type(self.optimizer) is torch.optim.SGD
        return self.task.device.type == "cuda" and self.alone and plain

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Train for an epoch; after each update yield the outputs, targets and loss that it was made from.

        With several processes, those of this one.
        """
        self.rule.train()
        self.aside_seconds = 0.0
        steps = self.shares(self.stream.permutation(self.task.size(self.run, "train")))
        loaded = self.task.batches(self.run, "train", [part for step in steps for part in step], self.epoch)
        for number, step in enumerate(steps, start=1):
            yield self.step(itertools.islice(loaded, len(step)), last=number == len(steps))
        self.epoch += 1

    def shares(self, order: np.ndarray) -> list[list[np.ndarray]]:
        """For every step of an epoch in this order, the batches, or parts of them, that are this process' share."""
        batches = self._batches(order)
        whole = len(batches) // self.run.batches * self.run.batches
        return [self._mine(step) for step in batches[:whole].reshape(-1, self.run.batches, batches.shape[1])]

    def step(self, batches: Iterable[tuple[Tensor, Tensor]], last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """An update by the mean of the loss over all examples of this process' share of a step, and of the others'.

        Args:
            last: of an epoch; recorders see its gradients.

        Returns:
            Outputs, targets and mean loss of this process' examples; the next step may write over them.
        """
        if self.captured is None or (last and self.recorders):
            return self.update(batches, last)
        (batch,) = batches
        return self.captured(*batch)

    def update(self, batches: Iterable[tuple[Tensor, Tensor]], last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """A step, operation by operation."""
        made = []
        self.optimizer.zero_grad(set_to_none=True)
        for inputs, targets in batches:
            if not len(targets) and not self.split_batches:  # none of its images could be read
                continue
            with self.autocast():
                outputs = self.rule(inputs)
            outputs = self.seen(outputs, inputs)
            loss = self.task.loss(outputs, targets)
            (loss if self.alone else loss * len(targets)).backward()
            made.append((outputs.detach(), targets, loss.detach()))
        if not self.alone:
            self._average_gradients(sum(len(targets) for _, targets, _ in made))
        if last and self.recorders and len(targets):
            with self.aside():
                for recorder in self.recorders:
                    recorder.gradients(self, inputs, targets)
        self.optimizer.step()
        if (between := RULES[self.run.rule].between_steps) is not None:
            between(self.rule, inputs.new_zeros(self.run.batch_size, *inputs.shape[1:]))
        return self._joined(made or [(inputs.new_empty(0), targets, inputs.new_empty(()))])

    def _average_gradients(self, examples: int) -> None:
        """Make means over the examples of all processes of gradients that are sums over those of this one."""
        gradients = []
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups):
            if parameter.grad is None:  # all processes must add up the same, also one without readable images
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        total = torch.tensor(float(examples), device=self.task.device)
        self.processes.add_up([*gradients, total])
        for gradient in gradients:
            gradient /= total.clamp(min=1)

    def _joined(self, made: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, targets and mean loss of a step from those of its batches."""
        if len(made) == 1:
            return made[0]
        outputs, targets = (torch.cat([part[k] for part in made]) for k in range(2))
        return outputs, targets, self.task.loss(outputs, targets)

    @torch.no_grad()
    def evaluate(self, split: str, order: np.ndarray) -> dict[str, float]:
        """Measures of the network as it stands, averaged over batches in this order."""
        self.rule.eval()
        averages, batches = Averages(), self._mine(self._batches(order))
        if not self.split_batches:
            together = range(0, len(batches), self.task.evaluated_together)
            batches = [np.concatenate(batches[k : k + self.task.evaluated_together]) for k in together]
        for inputs, targets in self.task.batches(self.run, split, batches, self.epoch):
            with self.autocast():
                outputs = self.rule(inputs)
            if len(targets):
                averages.add(self.task.measures(self.seen(outputs, inputs), targets), len(targets))
        return averages.values(self.processes)

    @torch.no_grad()
    def outputs(self, split: str) -> Tensor:
        """What the loss would see for a split, in its own order, as far as it makes whole batches."""
        self.rule.eval()
        batches = list(self._batches(np.arange(self.task.size(self.run, split))))
        found = []
        for inputs, _ in self.task.batches(self.run, split, batches, self.epoch):
            with self.autocast():
                outputs = self.rule(inputs)
            found.append(self.seen(outputs, inputs))
        return torch.cat(found)

    def train_epoch(self, evaluate: bool = True) -> dict[str, float | None]:
        """Train for an epoch and evaluate.

        Args:
            evaluate: or not, where the loss is finite and no evaluation's; what follows has the same numbers.

        Returns:
            A row of metrics.csv. `seconds` is the time of the training pass alone, without that of recorders.
        """
        start = self.clock()
        averages = Averages()
        total = self.task.size(self.run, "train") // (self.run.batch_size * self.run.batches)
        hidden = None if self.processes.first else True  # None: shown on a terminal
        for outputs, targets, _ in tqdm(
            self.steps(), f"epoch {self.epoch + 1}", total, leave=False, disable=hidden, position=2
        ):
            if len(targets):
                averages.add(self.task.measures(outputs, targets), len(targets))
        seconds = self.clock() - start - self.aside_seconds
        metrics = {f"train_{name}": value for name, value in averages.values(self.processes).items()}
        owed = any(evaluation.split == "train" for evaluation in self.task.evaluations)
        metrics |= self.evaluations(evaluate or owed or not math.isfinite(metrics["train_loss"]))
        columns = {name: metrics.get(name) for name in self.task.columns} | self.task.noticed(self.processes)
        return {"epoch": self.epoch, **columns, "seconds": round(seconds, 4)}

    def evaluations(self, wanted: bool = True) -> dict[str, float]:
        """What is measured of the network as it stands after an epoch, "<split>_<measure>".

        Args:
            wanted: else nothing is measured; the stream goes on as if it were.
        """
        metrics = {}
        for evaluation in self.task.evaluations:
            stream = self.stream if evaluation.streamed else np.random.RandomState(self.run.seed)
            order = stream.permutation(self.task.size(self.run, evaluation.split))
            values = self.evaluate(evaluation.split, order) if wanted else {}
            metrics |= {f"{evaluation.split}_{name}": value for name, value in values.items()}
        return metrics

    def _batches(self, order: np.ndarray) -> np.ndarray:
        """Whole batches in this order, (batches, batch size); what is left over is dropped.

        A split smaller than a batch is one batch.
        """
        size = min(self.run.batch_size, len(order))
        return order[: len(order) // size * size].reshape(-1, size)

    def _mine(self, batches: np.ndarray) -> list[np.ndarray]:
        """This process' share of batches: some of them, or a part of each."""
        rank, count = self.processes.rank, self.processes.count
        if self.split_batches:
            return [np.array_split(batch, count)[rank] for batch in batches]
        return list(batches[rank::count])

    @contextlib.contextmanager
    def aside(self):
        """What happens within is no part of the epoch's seconds."""
        start = self.clock()
        yield
        self.aside_seconds += self.clock() - start

    def clock(self) -> float:
        """Seconds, when all that was queued on the device is done."""
        finish(self.task.device)
        return time.perf_counter()


class Averages:
    """Means over examples, kept on the device so that no step waits for them."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.examples = 0

    def add(self, measures: dict[str, Tensor], examples: int) -> None:
        """Means over so many examples."""
        for name, value in measures.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=exact(value.device), device=value.device)
            self.sums[name] = self.sums[name] + value * examples
        self.examples += examples

    def values(self, processes: Processes) -> dict[str, float]:
        """The means over what all processes have added."""
        parts = processes.gather((self.examples, {name: float(total) for name, total in self.sums.items()}))
        examples = sum(count for count, _ in parts)
        names = next((sums.keys() for _, sums in parts if sums), ())
        return {name: sum(sums.get(name, 0.0) for _, sums in parts) / examples for name in names}
