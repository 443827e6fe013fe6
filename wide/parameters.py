"""Parameters of the paper's networks in files: those that runs kept in outputs/, and state_dicts from elsewhere."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wide import UserError
from wide.alignment import PairParameters
from wide.networks import ConvolutionalNetwork, FullyConnectedNetwork, RecurrentNetwork
from wide.runs import RunFolder

KINDS = {ConvolutionalNetwork: "cnn", FullyConnectedNetwork: "mlp", RecurrentNetwork: "rnn"}


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict, by name, on the CPU. No code in the file is run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        reason = getattr(error, "strerror", None) or "it is no file of torch.save that loads with weights_only=True"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no state_dict: name the file of torch.save(network.state_dict(), ...)")
    return dict(loaded)


def load_pair(initial: Path, trained: Path, align: Path, strides: tuple[int, ...]) -> tuple[nn.Module, PairParameters]:
    """A pair of networks from three files, and a network of their geometry.

    A file may hold a pair itself, as parameters/epoch_<k>.pt does: then N's parameters, or A's, are taken from it.

    Args:
        strides: of the blocks, should the network be convolutional.

    Raises:
        UserError: a file cannot be read, or holds other parameters than one of the paper's networks, or of other shapes
            than the first.
    """
    paths, parts = (initial, trained, align), ("network.", "network.", "align.")
    found = [_part(load(path), part) for path, part in zip(paths, parts, strict=True)]
    try:
        network = network_like(found[0], strides)
    except ValueError as error:
        raise UserError(f"{initial} holds no network of the paper's: {error}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for path, parameters in zip(paths, found, strict=True):
        _require_shapes(path, parameters, expected)
    return network, PairParameters(*found)


def _part(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters whose names begin so, without that; all, where none does."""
    part = {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}
    return part or parameters


def _require_shapes(path: Path, parameters: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    given = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    for name in sorted(expected.keys() | given.keys()):
        if given.get(name) != expected.get(name):
            shape, wanted = given.get(name, "nothing"), expected.get(name, "nothing")
            raise UserError(f"{path} holds {shape} under {name}, but {wanted} is expected there")


def network_like(parameters: Mapping[str, Tensor], strides: tuple[int, ...]) -> nn.Module:
    """A network of the paper's, without values, whose parameters have these names and first shapes.

    Raises:
        ValueError: there is none.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    blocks = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    with torch.device("meta"):
        match shapes:
            case {"hidden.weight": (width, _), "initial_state": (batch, _)}:
                return RecurrentNetwork(width, batch)
            case {"blocks.0.layer.weight": (width, channels, _, _), "readout.weight": (classes, _)}:
                if blocks != len(strides):
                    raise ValueError(f"it has {blocks} convolutional blocks, not {len(strides)}")
                return ConvolutionalNetwork(channels, width, strides, classes)
            case {"blocks.0.layer.weight": (width, inputs), "readout.weight": (classes, _)}:
                return FullyConnectedNetwork(inputs, width, classes, blocks)
    raise ValueError(f"its parameters are {', '.join(sorted(shapes)[:5]) or 'none'}")


def kept_pair(folder: RunFolder, epoch: int, strides: tuple[int, ...]) -> tuple[nn.Module, PairParameters]:
    """A pair after an epoch, from what its run kept in outputs/. Errors as for `load_pair`."""
    after = folder.parameters_path(epoch)
    return load_pair(folder.parameters_path(0), after, after, strides)
