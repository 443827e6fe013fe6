"""Parameters of the paper's networks in files: those that runs kept in outputs/, and state_dicts from elsewhere."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wide import UserError
from wide.alignment.pairs import PairParameters
from wide.models.networks import ConvolutionalNetwork, FullyConnectedNetwork, RecurrentNetwork
from wide.runs.checkpoints import DIGEST, Unusable, read_sealed
from wide.runs.folder import RunFolder
from wide.runs.run import differences

KINDS = {ConvolutionalNetwork: "cnn", FullyConnectedNetwork: "mlp", RecurrentNetwork: "rnn"}


class Parameters(NamedTuple):
    """The tensors of a file, by name; and where a run kept it, whose they are, and after which epoch."""

    tensors: dict[str, Tensor]
    run: Mapping[str, object] | None = None
    epoch: int | None = None


def load(path: Path) -> Parameters:
    """What a state_dict holds, or a file of parameters/, on the CPU. No code in the file is run.

    Raises:
        UserError: there is no such file, or it holds something else, or has changed since a run wrote it.
    """
    try:
        content = read_sealed(path)
    except Unusable as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    kept = content.pop(DIGEST) is not None
    tensors = content.get("parameters") if kept else content
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no state_dict: name the file of torch.save(network.state_dict(), ...)")
    return Parameters(dict(tensors), content.get("run"), content.get("epoch")) if kept else Parameters(dict(tensors))


def load_pair(initial: Path, trained: Path, align: Path, strides: tuple[int, ...]) -> tuple[nn.Module, PairParameters]:
    """A pair of networks from three files, and a network of their geometry.

    A file may hold a pair itself, as parameters/epoch_<k>.pt does: then N's parameters, or A's, are taken from it.

    Args:
        strides: of the blocks, should the network be convolutional.

    Raises:
        UserError: a file cannot be read, or holds other parameters than one of the paper's networks, or of other shapes
            than the first.
    """
    return _pair((initial, trained, align), [load(path).tensors for path in (initial, trained, align)], strides)


def _pair(
    paths: tuple[Path, Path, Path], tensors: Sequence[dict[str, Tensor]], strides: tuple[int, ...]
) -> tuple[nn.Module, PairParameters]:
    """See `load_pair`."""
    found = [_part(part, prefix) for part, prefix in zip(tensors, ("network.", "network.", "align."), strict=True)]
    try:
        network = network_like(found[0], strides)
    except ValueError as error:
        raise UserError(f"{paths[0]} holds no network of the paper's: {error}") from error
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
    """A pair after an epoch, from what its run kept in outputs/.

    Raises:
        UserError: as for `load_pair`; or a file is of another run or epoch.
    """
    initial, after = kept_parameters(folder, 0), kept_parameters(folder, epoch)
    paths = folder.parameters_path(0), folder.parameters_path(epoch), folder.parameters_path(epoch)
    if initial.run and after.run and (was := differences(initial.run, after.run)):
        raise UserError(f"{paths[1]} was trained with {was}, as {paths[0]} has it; put back what belongs together")
    return _pair(paths, [initial.tensors, after.tensors, after.tensors], strides)


def kept_parameters(folder: RunFolder, epoch: int) -> Parameters:
    """What a run kept after an epoch. Files of earlier versions do not say whose they are."""
    path = folder.parameters_path(epoch)
    found = load(path)
    if found.run is None:
        return found
    data = folder.config().get("run", found.run).get("data", "")  # parameters may be all that there is of a run
    if was := differences(folder.identity(data), found.run):
        raise UserError(f"{path} belongs to another run, with {was}; put its own back or delete {folder.path}")
    if found.epoch != epoch:
        raise UserError(f"{path} is of epoch {found.epoch}; put its own back or delete {folder.path}")
    return found
