"""The training loop: one for all tasks, networks and rules."""

import contextlib
import itertools
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wide import UserError
from wide.datasets import Split
from wide.runs import Run, RunFolder, Thrift, pack_stream, unpack_stream
from wide.tasks import Task

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


class PublishedAdam(torch.optim.Adam):
    """Adam as TensorFlow 1 has it: epsilon is added before the second moment's bias is corrected, not after.

    lr * sqrt(1 - b2^t)/(1 - b1^t) * m / (sqrt(v) + epsilon) (Kingma & Ba, 2015, end of section 2), which is torch's
    update with epsilon/sqrt(1 - b2^t).
    """

    epsilon = 1e-8

    def step(self, closure=None):
        for group in self.param_groups:
            taken = max((int(self.state[p]["step"]) for p in group["params"] if self.state[p]), default=0)
            group["eps"] = self.epsilon / math.sqrt(1 - group["betas"][1] ** (taken + 1))
        return super().step(closure)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": PublishedAdam}


def choose_device(name: str) -> torch.device:
    """
    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu, or install torch with CUDA")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, tf32 or bf16; set for the whole process. `auto` is tf32 on a GPU that has it (as TensorFlow's), else fp32.

    Raises:
        UserError: tf32 without a GPU that has it.
    """
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "tf32" and not has_tf32:
        raise UserError("--precision tf32 needs an NVIDIA GPU of compute capability 8 or more; use fp32")
    precision = ("tf32" if has_tf32 else "fp32") if name == "auto" else name
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


class Training:
    """A run in progress.

    Attributes:
        rule: the network in its rule; `optimizer` steps the parameters that learn.
        stream: the generator of the orders of batches, seeded with the run's seed when training starts.
        epoch: the number of epochs trained.
    """

    def __init__(self, task: Task, run: Run):
        self.task, self.run = task, run
        self.rule = task.rule(run)
        learning = [parameter for parameter in self.rule.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[run.optimizer](learning, lr=run.learning_rate)
        self.stream = np.random.RandomState(run.seed)
        self.epoch = 0

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
        self.rule.load_state_dict(state["rule"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream = unpack_stream(state["stream"])
        self.epoch = state["epoch"]

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Train for an epoch; after each update yield the outputs, targets and loss that it was made from."""
        self.rule.train()
        split = self.task.data(self.run, "train")
        for inputs, targets in self._batches(split, self.stream.permutation(len(split.inputs))):
            with self._autocast():
                outputs = self.rule(inputs)
            outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
            loss = self.task.loss(outputs, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            yield outputs.detach(), targets, loss.detach()
        self.epoch += 1

    @torch.no_grad()
    def evaluate(self, split: Split, order: np.ndarray) -> dict[str, float]:
        """Measures of the network as it stands, averaged over batches in this order."""
        self.rule.eval()
        measured = Averages()
        for inputs, targets in self._batches(split, order):
            with self._autocast():
                outputs = self.rule(inputs)
            measured.add(self.task.measures(outputs.float(), targets))
        return measured.values()

    def train_epoch(self) -> dict[str, float]:
        """Train for an epoch and evaluate.

        Returns:
            A row of metrics.csv. `seconds` is the time of the training pass alone.
        """
        start = self._clock()
        measured = Averages()
        total = len(self.task.data(self.run, "train").inputs) // self.run.batch_size
        for outputs, targets, _ in tqdm(
            self.steps(), f"epoch {self.epoch + 1}", total, leave=False, disable=None, position=2
        ):
            measured.add(self.task.measures(outputs, targets))
        seconds = self._clock() - start
        metrics = {f"train_{name}": value for name, value in measured.values().items()}
        for evaluation in self.task.evaluations:
            split = self.task.data(self.run, evaluation.split)
            stream = self.stream if evaluation.streamed else np.random.RandomState(self.run.seed)
            values = self.evaluate(split, stream.permutation(len(split.inputs)))
            metrics |= {f"{evaluation.split}_{name}": value for name, value in values.items()}
        columns = {name: metrics[name] for name in self.task.columns}
        observed = self.task.observe(self.rule, self.epoch) if self.task.observe else {}
        return {"epoch": self.epoch, **columns, "seconds": round(seconds, 4), **observed}

    def _batches(self, split: Split, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches in this order; what is left over is dropped. A split smaller than a batch is one batch."""
        order = torch.from_numpy(order).to(self.task.device)
        size = min(self.run.batch_size, len(order))
        for start in range(0, len(order) - size + 1, size):
            yield self.task.batch(split, order[start : start + size])

    def _autocast(self):
        if self.run.precision == "bf16":
            return torch.autocast(self.task.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _clock(self) -> float:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()


class Averages:
    """Means over batches, kept on the device so that no step waits for them."""

    def __init__(self):
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.batches = 0

    def add(self, measures: dict[str, Tensor]) -> None:
        for name, value in measures.items():
            self.sums[name] = self.sums[name].to(value.device) + value
        self.batches += 1

    def values(self) -> dict[str, float]:
        return {name: float(total) / self.batches for name, total in self.sums.items()}


def train(
    task: Task,
    folder: RunFolder,
    epochs: int,
    keep: Iterable[int] = (),
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train a run up to `epochs` epochs, from its checkpoint where it has one; keep a row and a checkpoint of each.

    Stops early at a loss that is not finite: the run's status is then "diverged".

    Args:
        keep: the epochs, 0 among them perhaps, whose parameters are kept as parameters/epoch_<k>.pt.

    Raises:
        UserError: the folder cannot be used (see RunFolder).
        Busy: another process trains this run.
    """
    with folder.locked():
        folder.check(task.fingerprint)
        training, thrift = Training(task, folder.run), Thrift()
        if (checkpoint := folder.load(task.device)) is not None:
            try:
                training.restore(checkpoint)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise folder.damaged(folder.checkpoint_path, error) from error
        folder.keep(training.epoch)
        folder.begin_session(task.fingerprint, device_name(task.device), training.epoch)
        if checkpoint is None:
            # Before the checkpoint: a run killed between the two would not come back here.
            if 0 in keep:
                folder.save_parameters(0, training.parameters())
            folder.save(training.state())
        name, first = folder.run.name, training.epoch
        with tqdm(None, name, epochs, initial=first, unit="epoch", leave=False, disable=None, position=1) as bar:
            while training.epoch < epochs:
                row = training.train_epoch()
                finite = math.isfinite(row["train_loss"])
                folder.append(row)
                if training.epoch in keep:
                    folder.save_parameters(training.epoch, training.parameters())
                if thrift.due() or training.epoch == epochs or not finite:
                    with thrift.saving():
                        folder.save(training.state())
                bar.update()
                after_epoch()
                if not finite:
                    break


def warm_up(task: Task, run: Run, steps: int = 10) -> None:
    """Some steps of a training that is thrown away, so that a timed one does not pay for what happens only once."""
    for _ in itertools.islice(Training(task, run).steps(), steps):
        pass


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, and on how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")  # platform.processor() says less, where it says anything
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or "CPU"
    return f"{model}, {torch.get_num_threads()} threads"
