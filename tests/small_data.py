"""Small datasets in the official file formats, for tests."""

import gzip
import struct
from pathlib import Path

import numpy as np


def made_up(count: int, image_shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images (count, *image_shape) and labels (count) of 10 classes."""
    stream = np.random.RandomState(seed)
    return stream.randint(0, 256, (count, *image_shape)).astype(np.uint8), stream.randint(0, 10, count).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array as a gzipped IDX file of bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1, mtime=0))


def write_kmnist(folder, images, labels, test_images, test_labels) -> Path:
    """Images (n, 28, 28) and labels (n) as the four files of KMNIST in `folder`/kmnist, which is returned."""
    directory = Path(folder, "kmnist")
    directory.mkdir(parents=True, exist_ok=True)
    for part, part_images, part_labels in (("train", images, labels), ("t10k", test_images, test_labels)):
        write_idx(directory / f"{part}-images-idx3-ubyte.gz", np.asarray(part_images))
        write_idx(directory / f"{part}-labels-idx1-ubyte.gz", np.asarray(part_labels))
    return directory


def write_cifar(folder, images, labels, test_images, test_labels) -> Path:
    """Images (n, 3, 32, 32) and labels (n) as the six files of CIFAR-10 in `folder`/cifar-10-batches-bin, returned.

    Needs at least five training images, so that each of their files holds one.
    """
    directory = Path(folder, "cifar-10-batches-bin")
    directory.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(_records(images, labels), 5), start=1):
        part.tofile(directory / f"data_batch_{number}.bin")
    _records(test_images, test_labels).tofile(directory / "test_batch.bin")
    return directory


def _records(images, labels) -> np.ndarray:
    return np.column_stack([np.asarray(labels), np.asarray(images).reshape(len(images), -1)]).astype(np.uint8)
