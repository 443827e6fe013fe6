"""The optimisers of the paper: SGD, and Adam as the released code ran it."""

import math

import torch
from torch import nn

from wide.runs.run import Run


class PublishedAdam(torch.optim.Adam):
    """Adam as TensorFlow 1 has it: epsilon is added before the second moment's bias is corrected, not after.

    lr * sqrt(1 - b2^t)/(1 - b1^t) * m / (sqrt(v) + epsilon) (Kingma & Ba, 2015, end of section 2), which is torch's
    update with epsilon/sqrt(1 - b2^t).
    """

    epsilon = 1e-8
    derived = ("eps",)  # settings that follow from the number of steps, and are made anew at each

    def step(self, closure=None):
        for group in self.param_groups:
            taken = max((int(self.state[p]["step"]) for p in group["params"] if self.state[p]), default=0)
            group["eps"] = self.epsilon / math.sqrt(1 - group["betas"][1] ** (taken + 1))
        return super().step(closure)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": PublishedAdam}


def make_optimizer(run: Run, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The run's. SGD takes its step in one kernel on a GPU; Adam's number of steps would be waited for there."""
    fused = run.optimizer == "sgd" and parameters[0].is_cuda
    return OPTIMIZERS[run.optimizer](parameters, lr=run.learning_rate, weight_decay=run.decay, fused=fused or None)
