"""Several processes that train one network together, on one machine or on many, as torchrun starts them.

The first process, the leader, decides what is trained and writes what is kept; the others are its workers. All hold the
whole network, with the same initial parameters and feedback weights, which follow from the seed. Gradients are summed
over processes after every backward pass, whatever the learning rule.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as distributed
from torch import Tensor

from wide import UserError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}  # by the kind of device
TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets in the environment beside WORLD_SIZE


class Processes:
    """This process among those that train together.

    Attributes:
        rank: 0 for the first.
        count: how many there are; 1 without torchrun.
        working_now: whether the first is in `working`, or an error has ended it there.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self.working_now = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def send(self, message: object) -> None:
        """From the first process, to all others."""
        if self.count > 1:
            distributed.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    @contextlib.contextmanager
    def working(self, message: object):
        """Send a message, and do what it asks of the other processes together with them."""
        self.send(message)
        self.working_now = self.count > 1
        yield
        self.working_now = False

    def dismiss(self) -> None:
        """End the workers, where they listen: those that an error left at work torchrun stops."""
        if self.working_now:
            return
        with contextlib.suppress(RuntimeError):  # one has ended already, with an error of its own
            self.send(None)
            self.gather(None)  # none leaves before all have heard

    def receive(self) -> object:
        """What the first process sends next."""
        place = [None]
        distributed.broadcast_object_list(place, src=0, device=torch.device("cpu"))
        return place[0]

    def gather(self, value: object) -> list:
        """The values of all processes, in all processes."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same in each; its gradient is summed over them too."""
        return _sum(tensor) if self.count > 1 else tensor

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Processes()


@torch.library.custom_op("wide::sum_over_processes", mutates_args=())  # one operator, so that rules can write it down
def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


_sum.register_fake(lambda tensor: torch.empty_like(tensor, memory_format=torch.contiguous_format))
_sum.register_autograd(lambda context, gradient: _sum(gradient))


def join(device: torch.device) -> Processes:
    """The processes that torchrun has started, connected until they `leave`; else this one alone.

    Raises:
        UserError: the environment speaks of several processes, but torchrun has not started them; or they cannot work
            together on this device.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return ALONE
    if not count.isdigit() or any(name not in os.environ for name in TORCHRUN):
        others = ", ".join(TORCHRUN)
        raise UserError(f"WORLD_SIZE is {count} here without {others}; start with torchrun, or unset WORLD_SIZE")
    if device.type not in BACKENDS:
        raise UserError(f"several processes cannot train together on {device.type}; use --device cpu")
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)
    distributed.init_process_group(BACKENDS[device.type])
    return Processes(int(os.environ["RANK"]), int(count))


def leave(status: int) -> int:
    """The exit status; but where several processes train together, end this one with it at once.

    What is left to do at exit, in threads of the connection, has been seen to abort the process when all was done.
    """
    if distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def local_rank() -> int:
    """The number of this process on its machine, as torchrun numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))
