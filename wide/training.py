"""The training loop, one for all tasks, networks and rules; and a run's life, from its checkpoint on."""

import contextlib
import copy
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wide import UserError
from wide.capture import Captured
from wide.checkpoints import (
    DIGEST,
    Unusable,
    pack_stream,
    require_same_optimizer,
    require_same_tensors,
    unpack_stream,
)
from wide.devices import device_name, exact, finish, memory_for
from wide.networks import synchronise_normalisation
from wide.optimizers import make_optimizer
from wide.processes import ALONE, Processes
from wide.recorders import Recorder
from wide.rules import RULES, nothing_between
from wide.runs import Run, RunFolder, Thrift
from wide.tasks import Task


class Training:
    """A run in progress.

    Attributes:
        rule: the network in its rule; `optimizer` steps the parameters that learn.
        initial: of a centred run the network as it began, with the same normalisation; else None.
        alone: whether a step is one whole batch, in this process.
        stream: the generator of the orders of batches, seeded with the run's seed when training starts.
        epoch: the number of epochs trained.

    Args:
        processes: those that train together. Every step's batches are shared out among them; where a step is one batch,
            each takes a part of it, and the batch is normalised as a whole.
        recorders: what is recorded beside the metrics.
    """

    def __init__(self, task: Task, run: Run, processes: Processes = ALONE, recorders: Sequence[Recorder] = ()):
        self.task, self.run, self.processes, self.recorders = task, run, processes, recorders
        self.rule = task.rule(run)
        self.alone = run.batches == 1 and processes.count == 1
        self.split_batches = run.batches == 1 and processes.count > 1
        if self.split_batches:
            synchronise_normalisation(self.rule, processes.sum)
        self.initial = copy.deepcopy(self.rule.network) if run.centred else None
        learning = [parameter for parameter in self.rule.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(run, learning)
        self.captured = Captured(lambda *batch: self.update([batch]), task.device) if self.can_be_captured() else None
        self.stream = np.random.RandomState(run.seed)
        self.epoch = 0
        self.aside_seconds = 0.0  # of this epoch, on recorders

    def can_be_captured(self) -> bool:
        """Whether a step is the same work on the same memory every time, on a GPU.

        Adam's bias correction is a number of Python's, the noise of a mirror step comes from the CPU, and a step of
        several batches or processes is made of parts.
        """
        plain = RULES[self.run.rule].between_steps is nothing_between and type(self.optimizer) is torch.optim.SGD
        return self.task.device.type == "cuda" and self.alone and plain

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "epoch": self.epoch,
            "rule": self.rule.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": pack_stream(self.stream),
        }

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that learn, by name in the rule."""
        return {name: p.detach() for name, p in self.rule.named_parameters() if p.requires_grad}

    def restore(self, state: dict) -> None:
        """Go on from what `state` gave.

        Raises:
            Unusable: it is none of this run, as far as that shows in names, shapes, types and settings.
        """
        if lacking := self.state().keys() - state.keys():
            raise Unusable(f"it lacks {', '.join(sorted(lacking))}")
        require_same_tensors(state["rule"], self.rule.state_dict(), "rule")
        require_same_optimizer(state["optimizer"], self.optimizer)
        self.stream = unpack_stream(state["stream"])
        self.rule.load_state_dict(state["rule"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]

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
        RULES[self.run.rule].between_steps(self.rule, inputs.new_zeros(self.run.batch_size, *inputs.shape[1:]))
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

    def seen(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """What loss and measures see of the rule's outputs for this batch, in at least single precision.

        Of a centred run that is f - f0: less what the initial network gives for the same batch, which has no gradient.
        """
        if self.initial is None:
            return _full(outputs)
        with torch.no_grad(), self.autocast():
            start = self.initial(inputs)
        return _full(outputs) - _full(start)

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

    def autocast(self):
        """A context in which forward passes run, in the run's precision."""
        if self.run.precision == "bf16":
            return torch.autocast(self.task.device.type, torch.bfloat16)
        return contextlib.nullcontext()

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


def _full(outputs: Tensor) -> Tensor:
    """Outputs in at least single precision."""
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


# --------------------------------------------------------------------------------------------------------- a run's life


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is trained, and when it is evaluated: after every so many epochs, and after the last.

    Where it is not, the row of metrics.csv has no values for what is measured then.
    """

    epochs: int
    evaluate_every: int = 1

    def evaluates(self, epoch: int) -> bool:
        return epoch % self.evaluate_every == 0 or epoch == self.epochs


def train(
    task: Task,
    folder: RunFolder,
    schedule: Schedule | int,
    recorders: Sequence[Recorder] = (),
    processes: Processes = ALONE,
) -> None:
    """Train a run, from its checkpoint where it has one; keep a row and a checkpoint of each epoch.

    Stops early at a loss that is not finite: the run's status is then "diverged".

    Args:
        schedule: or the number of epochs, each of which is evaluated.
        recorders: what is recorded beside the metrics, of every epoch that is trained here.
        processes: those that train together. The first calls `train`, the others are in `train_as_worker`.

    Raises:
        UserError: the folder cannot be used (see RunFolder).
        Busy: another process trains this run.
    """
    schedule = Schedule(schedule) if isinstance(schedule, int) else schedule
    with folder.locked(), memory_for(folder.run, task.device):
        folder.check(task.fingerprint)
        training = Training(task, folder.run, processes, recorders)
        _start(training, folder)
        if folder.progress()[1]:
            several = processes.count > 1
            work = Work(folder.run, task.fingerprint, schedule, _packed(training.state())) if several else None
            with processes.working(work):
                _train_epochs(training, folder, schedule)


def restore(training: Training, folder: RunFolder, checkpoint: dict) -> None:
    """Go on from a folder's checkpoint.

    Raises:
        UserError: it is none of this run.
    """
    try:
        training.restore(checkpoint)
    except (Unusable, ValueError, TypeError) as error:
        raise folder.damaged(folder.checkpoint_path, error) from error


def _start(training: Training, folder: RunFolder) -> None:
    """Go on from the run's checkpoint; without one, write the first."""
    device, count = training.task.device, training.processes.count
    if (checkpoint := folder.load(device)) is not None:
        restore(training, folder, checkpoint)
    folder.keep(training.epoch)
    if checkpoint is not None and checkpoint[DIGEST] is None:
        folder.save(training.state())  # of an earlier version: from now on it says whose it is
    where = device_name(device) + (f", {count} processes" if count > 1 else "")
    folder.begin_session(training.task.fingerprint, where, training.epoch)
    if checkpoint is None:
        # Before the checkpoint: a run killed between the two would not come back here.
        for recorder in training.recorders:
            recorder.start(training, folder)
        folder.save(training.state())


def _train_epochs(training: Training, folder: RunFolder, schedule: Schedule) -> None:
    thrift, first, epochs = Thrift(), training.epoch, schedule.epochs
    with tqdm(None, folder.run.name, epochs, initial=first, unit="epoch", leave=False, disable=None, position=1) as bar:
        while training.epoch < epochs:
            row = training.train_epoch(schedule.evaluates(training.epoch + 1))
            finite = math.isfinite(row["train_loss"])
            for recorder in training.recorders:
                row |= recorder.columns(training)
            folder.require_claim()
            for recorder in training.recorders:
                recorder.epoch(training, folder)
            if thrift.due() or training.epoch == epochs or not finite:
                with thrift.saving():
                    folder.save(training.state(), row)
            folder.append(row)  # last: it says that all else is there
            bar.update()
            if not finite:
                break


@dataclasses.dataclass(frozen=True)
class Work:
    """What the first process has the others train with it: a run from a checkpoint's state.

    Before any, PREPARE has them read the data, while it does so itself.
    """

    run: Run
    fingerprint: str
    schedule: Schedule
    state: bytes


PREPARE = "prepare"


def train_as_worker(processes: Processes, make_task: Callable[[], Task]) -> None:
    """Train with the first process what it trains, until it sends None.

    Raises:
        UserError: the data are missing here, or are others.
    """
    task = None
    while (work := processes.receive()) is not None:
        task = task or make_task()
        if work == PREPARE:
            continue
        if task.fingerprint != work.fingerprint:
            raise UserError(f"process {processes.rank} finds the data {task.fingerprint}, the first {work.fingerprint}")
        training = Training(task, work.run, processes)
        training.restore(torch.load(io.BytesIO(work.state), map_location=task.device, weights_only=True))
        while training.epoch < work.schedule.epochs:
            row = training.train_epoch(work.schedule.evaluates(training.epoch + 1))
            if not math.isfinite(row["train_loss"]):
                break
    processes.gather(None)  # see Processes.dismiss


def _packed(state: dict) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def warm_up(task: Task, run: Run, steps: int = 10) -> None:
    """Some steps of a training that is thrown away, so that a timed one does not pay for what happens only once."""
    with memory_for(run, task.device):
        for _ in itertools.islice(Training(task, run).steps(), steps):
            pass
