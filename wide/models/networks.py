"""The networks of the paper, in NTK or standard parameterisation, with the published initial draws.

NTK parameterisation: weights are drawn from N(0, 1) and scaled by 1/sqrt(fan_in) in the forward pass. Standard
parameterisation: the same draw is divided by sqrt(fan_in) once, at the start. Biases start at zero and learn.
(Section 2 of the paper; the draws are those of the code released with it, see `draw`.)
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_rules import recurrence

PARAMETERISATIONS = ("ntk", "standard")
HALVES = (torch.bfloat16, torch.float16)


class Parameterised:
    """What dense and convolutional layers share: how a standard normal weight becomes the one that is used."""

    parameterisation: str
    fan_in: int
    weight: nn.Parameter

    def parameterise(self, parameterisation: str, fan_in: int) -> None:
        if parameterisation not in PARAMETERISATIONS:
            raise ValueError(
                f"parameterisation must be one of {', '.join(PARAMETERISATIONS)}, not {parameterisation!r}"
            )
        self.parameterisation, self.fan_in = parameterisation, fan_in

    def used_weight(self) -> Tensor:
        """The weight that multiplies the input: scaled here in NTK parameterisation, as it is otherwise."""
        return self.weight / math.sqrt(self.fan_in) if self.parameterisation == "ntk" else self.weight

    def stored(self, drawn: Tensor) -> Tensor:
        """A standard normal draw as the parameter stores it."""
        return drawn / math.sqrt(self.fan_in) if self.parameterisation == "standard" else drawn


class Dense(Parameterised, nn.Linear):
    """(batch, ..., inputs) -> (batch, ..., outputs)."""

    def __init__(self, inputs: int, outputs: int, parameterisation: str = "ntk", bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.parameterise(parameterisation, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.used_weight(), self.bias)

    @property
    def draw_shape(self) -> tuple[int, int]:
        """The shape in which the published code draws this weight, before it transposes it."""
        return tuple(self.weight.shape)  # (outputs, inputs)

    def arranged(self, drawn: Tensor) -> Tensor:
        """A published draw in the order of `weight`."""
        return drawn


class Recurrence(Dense):
    """The state's weights, (batch, width) -> (batch, width). Their draw multiplies the state from the right."""

    def __init__(self, width: int):
        super().__init__(width, width)

    def arranged(self, drawn: Tensor) -> Tensor:
        return drawn.T


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `size` pixels, for an output of ceil(size/stride); the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Convolution(Parameterised, nn.Conv2d):
    """3x3 convolution, (batch, inputs, h, w) -> (batch, outputs, ceil(h/stride), ceil(w/stride))."""

    kernel = 3

    def __init__(self, inputs: int, outputs: int, stride: int, parameterisation: str = "ntk"):
        super().__init__(inputs, outputs, self.kernel, stride)
        self.parameterise(parameterisation, self.kernel * self.kernel * inputs)

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (same_padding(size, self.kernel, self.stride[0]) for size in images.shape[2:])
        padding = (rows[0], columns[0])
        if rows != (rows[0], rows[0]) or columns != (columns[0], columns[0]):
            images, padding = F.pad(images, (*columns, *rows)), (0, 0)
        return F.conv2d(images, self.used_weight(), self.bias, self.stride, padding)

    @property
    def draw_shape(self) -> tuple[int, int]:
        return self.out_channels, self.fan_in

    def arranged(self, drawn: Tensor) -> Tensor:
        # The published columns run over (row, column, input channel).
        return drawn.unflatten(1, (self.kernel, self.kernel, self.in_channels)).permute(0, 3, 1, 2)


class BatchNormalisation(nn.Module):
    """Mean 0 and variance 1 over the batch, for every entry of an activity by itself.

    No learned scale or shift; the statistics of the batch at hand are used in evaluation too, and are in single
    precision at least.

    `sum` adds up a tensor over processes that hold parts of one batch, differentiably; None where the batch is here.

    Raises:
        ValueError: for a batch of one, whose every entry would become zero.
    """

    epsilon = 1e-6
    sum: Callable[[Tensor], Tensor] | None = None

    def forward(self, activity: Tensor) -> Tensor:
        # Channels last, as convolutions return them, so that flattening copies nothing.
        last = activity.movedim(1, -1)
        flat = last.flatten(1)
        if self.sum is not None:
            flat = self._over_processes(flat)
        elif len(flat) < 2:
            raise ValueError("a batch of one cannot be normalised over the batch; use a batch size of at least 2")
        else:
            # Of half precision torch keeps the statistics in half, unless a scale in single precision tells it not to.
            scale = flat.new_ones(flat.shape[1], dtype=torch.float32) if flat.dtype in HALVES else None
            flat = F.batch_norm(flat, None, None, scale, training=True, eps=self.epsilon)
        return flat.view(last.shape).movedim(-1, 1)

    def _over_processes(self, flat: Tensor) -> Tensor:
        full = flat.to(torch.promote_types(flat.dtype, torch.float32))
        *sums, count = self.sum(torch.cat([full.sum(0), full.new_tensor([float(len(full))])])).tensor_split([-1])
        centred = full - sums[0] / count
        variance = self.sum(centred.square().sum(0)) / count
        return (centred * (variance + self.epsilon).rsqrt()).to(flat.dtype)


def synchronise_normalisation(network: nn.Module, sum: Callable[[Tensor], Tensor]) -> None:
    """Normalise over batches whose parts lie in several processes; see `BatchNormalisation`."""
    for module in network.modules():
        if isinstance(module, BatchNormalisation):
            module.sum = sum


class Block(nn.Sequential):
    """A layer, normalised over the batch, then ReLU."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.normalisation, self.activation = layer, BatchNormalisation(), nn.ReLU()


class ConvolutionalNetwork(nn.Module):
    """3x3 convolutions of equal width, each normalised and rectified; global average pooling; dense readout.

    Args:
        channels: of the images, (batch, channels, h, w).
        width: channels of every block.
        strides: one per block.
        classes: outputs, (batch, classes).
        parameterisation: "ntk" or "standard".
    """

    def __init__(
        self, channels: int, width: int, strides: tuple[int, ...], classes: int, parameterisation: str = "ntk"
    ):
        super().__init__()
        inputs = (channels, *[width] * (len(strides) - 1))
        self.blocks = nn.Sequential(
            *(Block(Convolution(n, width, stride, parameterisation)) for n, stride in zip(inputs, strides, strict=True))
        )
        self.readout = Dense(width, classes, parameterisation)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return self.readout(self.blocks(images).mean((2, 3)))


class FullyConnectedNetwork(nn.Module):
    """Dense layers of equal width, each normalised and rectified; dense readout.

    Takes (batch, ...) and flattens what follows the batch to `inputs` entries; gives (batch, classes).
    """

    def __init__(self, inputs: int, width: int, classes: int, hidden: int = 3, parameterisation: str = "ntk"):
        super().__init__()
        sizes = (inputs, *[width] * (hidden - 1))
        self.blocks = nn.Sequential(*(Block(Dense(n, width, parameterisation)) for n in sizes))
        self.readout = Dense(width, classes, parameterisation)

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.blocks(images.flatten(1)))


class RecurrentNetwork(nn.Module):
    """s_t = relu(x_t W_ih + s_{t-1} W_hh/sqrt(n) + b_h), y_t = s_t W_ho/sqrt(n) + b_o, with a learned initial state.

    Takes (batch, time) and gives (batch, time). `batch` fixes the batch size, since every sequence of a batch has an
    initial state of its own (batch, width), which starts at zero. Several batches one after the other are computed as
    if each were alone.
    """

    def __init__(self, width: int, batch: int):
        super().__init__()
        self.input = Dense(1, width, bias=False)
        self.hidden = Recurrence(width)
        self.readout = Dense(width, 1)
        self.initial_state = nn.Parameter(torch.zeros(batch, width))

    def forward(self, sequences: Tensor) -> Tensor:
        # Time first, so that what a time step reads and writes lies together: (time, batch, width).
        driven = F.linear(sequences.T.unsqueeze(-1), self.input.used_weight(), self.hidden.bias)
        state = self.initial_state.expand(driven.shape[1] // len(self.initial_state), -1, -1).flatten(0, 1)
        states = recurrence(state, self.hidden.used_weight(), driven)
        return self.readout(states).squeeze(-1).T


def draw(network: nn.Module, seed: int, feedback: str | None = None, image_shape: tuple[int, ...] = ()):
    """Give the network the published initial parameters for this seed; return the feedback weights drawn beside them.

    The stream is NumPy's legacy generator. Layer by layer: the weight; with `feedback="layers"` then a feedback weight
    like it; with `feedback="blocks"` or "pooled", for every layer but the readout, then one from the outputs to the
    block's activities (normal, standard deviation 1/sqrt(entries)), whose sizes follow from `image_shape`
    (channels, h, w), or to the block's channels.

    Returns:
        None, or a dict by weight name ("layers"), or a list in the order of the blocks ("blocks", "pooled").
    """
    if feedback not in (None, "layers", "blocks", "pooled"):
        raise ValueError(f"feedback must be None, 'layers', 'blocks' or 'pooled', not {feedback!r}")
    stream = np.random.RandomState(seed)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Parameterised)}
    readout = layers["readout"]
    shapes = activity_shapes(network, image_shape) if feedback == "blocks" else {}
    by_name, by_block = {}, []
    for name, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(_drawn(stream, layer))
            for parameter in layer.parameters():
                if parameter is not layer.weight:
                    parameter.zero_()
        if feedback == "layers":
            by_name[f"{name}.weight"] = _drawn(stream, layer)
        elif feedback and layer is not readout:
            shape = shapes.get(name, (layer.weight.shape[0],))
            by_block.append(_direct(stream, readout.out_features, shape))
    return {None: None, "layers": by_name}.get(feedback, by_block)


def _drawn(stream: np.random.RandomState, layer: Parameterised) -> Tensor:
    drawn = torch.from_numpy(stream.normal(size=layer.draw_shape)).to(layer.weight.dtype)
    return layer.stored(layer.arranged(drawn))


def _direct(stream: np.random.RandomState, outputs: int, shape: tuple[int, ...]) -> Tensor:
    """Feedback onto activities of `shape` (channels, ...): the published columns run with the channel last."""
    entries = math.prod(shape)
    drawn = torch.from_numpy(stream.normal(0, 1 / math.sqrt(entries), (outputs, entries))).to(torch.get_default_dtype())
    return drawn.unflatten(1, (*shape[1:], shape[0])).movedim(-1, 1)


def activity_shapes(network: nn.Module, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """(channels, h, w) or (width,) of every block's activity, by the name of its layer."""
    shapes, size = {}, image_shape[1:]
    for name, module in network.named_modules():
        if isinstance(module, Convolution):
            size = tuple(-(-n // stride) for n, stride in zip(size, module.stride, strict=True))
            shapes[name] = (module.out_channels, *size)
        elif isinstance(module, Dense):
            shapes[name] = (module.out_features,)
    return shapes
