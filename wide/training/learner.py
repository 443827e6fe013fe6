"""A run's network as it learns: in its rule, with its optimiser and the stream of its batches."""

import contextlib
import copy

import numpy as np
import torch
from torch import Tensor

from wide.runs.checkpoints import Unusable, pack_stream, require_same_optimizer, require_same_tensors, unpack_stream
from wide.runs.run import Run
from wide.training.optimizers import make_optimizer
from wide.training.tasks import Task


class Learner:
    """What a run has become after an epoch, and all that it needs to go on. How it goes on: wide/training/loop.py.

    Attributes:
        rule: the network in its rule; `optimizer` steps the parameters that learn.
        initial: of a centred run the network as it began, with the same normalisation; else None.
        stream: the generator of the orders of batches, seeded with the run's seed when training starts.
        epoch: the number of epochs trained.
    """

    def __init__(self, task: Task, run: Run):
        self.task, self.run = task, run
        self.rule = task.rule(run)
        self.initial = copy.deepcopy(self.rule.network) if run.centred else None
        learning = [parameter for parameter in self.rule.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(run, learning)
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

    def seen(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """What loss and measures see of the rule's outputs for this batch, in at least single precision.

        Of a centred run that is f - f0: less what the initial network gives for the same batch, which has no gradient.
        """
        if self.initial is None:
            return _full(outputs)
        with torch.no_grad(), self.autocast():
            start = self.initial(inputs)
        return _full(outputs) - _full(start)

    def autocast(self):
        """A context in which forward passes run, in the run's precision."""
        if self.run.precision == "bf16":
            return torch.autocast(self.task.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def _full(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs
