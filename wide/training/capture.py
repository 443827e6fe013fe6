"""Steps of training captured once as a CUDA graph and replayed, so that Python and launches cost nothing any more."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps before the capture, which torch asks for: they are steps of training like all others

Update = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Captured:
    """An update, called with batches of one shape: the first ones plainly, then captured, from there on replayed.

    What a replay computes is what the update computes: the same kernels on the same memory. A capture that fails is a
    note, and the update goes on plainly.

    Args:
        update: from inputs and targets to tensors, all on the device; it keeps parameters and optimiser state in place
            and waits for nothing. It is captured with the gradients gone, so it makes them new.
        device: whose graph it is.
        record: captures a function, and returns one that replays it and returns its results.
    """

    def __init__(self, update: Update, device: torch.device, record: Callable | None = None):
        self.update, self.device = update, device
        self.record = record or record_cuda_graph
        self.steps = 0
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None
        self.inputs = self.targets = torch.empty(0)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Its results; those of a replay stand in memory that the next one writes over."""
        if self.replay is None and self.steps == WARM_UP:
            self._capture(inputs, targets)
        self.steps += 1
        if self.replay is None or inputs.shape != self.inputs.shape:
            return self._plainly(inputs, targets)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        return self.replay()

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.clone(), targets.clone()
        try:
            self.replay = self.record(lambda: self.update(self.inputs, self.targets), self.device)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"note: steps are not captured as a CUDA graph here ({reason}); they run one by one", file=sys.stderr)

    def _plainly(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if self.device.type != "cuda" or self.steps > WARM_UP:
            return self.update(inputs, targets)
        # Beside the stream of everything else, as a capture runs: nothing may be tied to that one.
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results = self.update(inputs, targets)
        current.wait_stream(stream)
        return results


def record_cuda_graph(function: Callable[[], tuple[Tensor, ...]], device: torch.device):
    """Capture what a function has the device do; nothing is computed before the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        results = function()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay
