"""Files of tensors that say what they belong to, with a digest of what they hold; what is checked in reading them.

Nothing in them is run: they load with weights_only=True.
"""

import contextlib
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGEST = "digest"
ESSENTIAL = {"params", "lr", "weight_decay"}  # of an optimiser's group, in every version of torch


class Unusable(Exception):
    """Why a file is not used, as a clause about it."""


def sealed(content: Mapping[str, object]) -> dict:
    """With a digest of what it holds."""
    return {**content, DIGEST: digest(content)}


def read_sealed(path: Path, device: torch.device | str = "cpu") -> dict:
    """What a file of torch.save holds, a dict by name; where it has a digest, without it, and checked against it.

    Raises:
        Unusable: it cannot be read, or holds something else, or has changed since it was written.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Unusable(reason_of(error)) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Unusable("it holds nothing by name")
    written = content.pop(DIGEST, None)
    if written is not None and not _has_digest(content, written):
        raise Unusable("its content is not what was written")
    content[DIGEST] = written
    return content


def _has_digest(content: Mapping[str, object], expected: object) -> bool:
    try:
        return digest(content) == expected
    except Exception:  # tensors of kinds and strides that were never written
        return False


def reason_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no file of torch.save that loads with weights_only=True"


def digest(content: object) -> str:
    """SHA-256 of tensors, numbers and texts, in dicts and lists: types, shapes and every bit."""
    checksum = hashlib.sha256()
    _feed(checksum, content)
    return checksum.hexdigest()


def _feed(checksum, value: object) -> None:
    if isinstance(value, Tensor):
        checksum.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        checksum.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        checksum.update(f"dict {len(value)};".encode())
        for item in value.items():
            _feed(checksum, item)
    elif isinstance(value, list | tuple):
        checksum.update(f"list {len(value)};".encode())
        for item in value:
            _feed(checksum, item)
    else:
        text = repr(value)
        checksum.update(f"{type(value).__name__} {len(text)} {text};".encode())


# ------------------------------------------------------------------------------------------------- what is held in them


def require_same_tensors(given: object, expected: Mapping[str, object], what: str) -> None:
    """Raise Unusable unless tensors have these names, shapes and types."""
    if not isinstance(given, Mapping) or given.keys() != expected.keys():
        raise Unusable(f"the names in its {what} are not those of this run")
    for name, tensor in expected.items():
        other = given[name]
        if not isinstance(other, Tensor):
            raise Unusable(f"{name} in its {what} is no tensor")
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            shapes = f"{tuple(other.shape)} {other.dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
            raise Unusable(f"{name} in its {what} is {shapes}")


def require_same_optimizer(given: object, optimizer: torch.optim.Optimizer) -> None:
    """Raise Unusable unless an optimiser's state fits this one: its settings and the shapes of what it remembers.

    Settings that only one version of torch knows are not compared, nor those that the optimiser derives.
    """
    derived = getattr(optimizer, "derived", ())
    expected = optimizer.state_dict()
    with _understood(given, "its optimiser is not this run's"):
        groups, state = given["param_groups"], given["state"]
        for group, mine in zip(groups, expected["param_groups"], strict=True):
            if lacking := ESSENTIAL - group.keys():
                raise Unusable(f"its optimiser lacks {', '.join(sorted(lacking))}")
            for name in (group.keys() & mine.keys()).difference(derived):
                if group[name] != mine[name]:
                    raise Unusable(f"its optimiser has {name} {group[name]!r}, not {mine[name]!r}")
        learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, memory in state.items():
            for tensor in memory.values():
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape != learning[index].shape:
                    raise Unusable(f"its optimiser remembers {tuple(tensor.shape)} for {tuple(learning[index].shape)}")


@contextlib.contextmanager
def _understood(given: object, otherwise: str):
    """Raise Unusable with this reason where `given`, from a file, is not made up as what happens within supposes."""
    if not isinstance(given, Mapping):
        raise Unusable(otherwise)
    try:
        yield
    except Unusable:
        raise
    except Exception as error:  # of whatever stands there
        raise Unusable(otherwise) from error


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise Unusable for numbers that are not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Unusable(f"{name} is not finite")


def pack_stream(stream: np.random.RandomState) -> dict:
    """The state of a NumPy generator, in types that torch.load takes with weights_only=True."""
    kind, keys, position, has_gauss, cached = stream.get_state()
    keys = torch.from_numpy(keys.astype(np.int64))
    return {"kind": kind, "keys": keys, "position": position, "has_gauss": has_gauss, "cached": cached}


def unpack_stream(packed: object) -> np.random.RandomState:
    """
    Raises:
        Unusable: it is no state of a generator. NumPy does not look: a position outside its keys ends the process.
    """
    with _understood(packed, "it holds no state of a generator"):
        kind, keys, position, has_gauss, cached = (
            packed[name] for name in ("kind", "keys", "position", "has_gauss", "cached")
        )
        good = (
            kind == "MT19937"
            and (keys.dtype, tuple(keys.shape)) == (torch.int64, (624,))
            and int(keys.min()) >= 0
            and int(keys.max()) < 2**32
            and bool(keys.any())  # all zeros, it would draw zeros for ever
            and (type(position), type(has_gauss), type(cached)) == (int, int, float)
            and 0 <= position <= 624
            and has_gauss in (0, 1)
            and math.isfinite(cached)
        )
    if not good:
        raise Unusable("the state of its generator is out of range")
    stream = np.random.RandomState()
    stream.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    return stream
