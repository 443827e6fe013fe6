"""Get and read KMNIST: 70000 handwritten cursive Japanese characters of 10 kinds.

    python3 setup_kmnist.py [--data-dir data] [--url BASE] [--split-test-images FOLDER]

Clanuwat et al., "Deep Learning for Classical Japanese Literature", 2018, arXiv 1812.01718; data by the Center for Open
Data in the Humanities, CC BY-SA 4.0. Four gzip files in IDX format: two zero bytes, a type (8: unsigned bytes), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the bytes, the last dimension running fastest.

With --split-test-images the 10000 official test images alone are split into 8000 and 2000 that do not overlap, and
written to FOLDER/kmnist as training and test files: the data of the runs in results/ (--data-dir FOLDER).
"""

import gzip
import math
import struct
import sys
from pathlib import Path
from typing import ClassVar

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

import numpy as np

from wide import UserError
from wide.command_line import setup
from wide.data.datasets import ImageDataset
from wide.runs.files import replace, writing

MOST_UNPACKED = 1032  # bytes that deflate makes of one, at most (zlib's technical details)


class KMNIST(ImageDataset):
    """60000 training and 10000 test images, 28x28 in grey; see `ImageDataset`."""

    name = "kmnist"
    title = "KMNIST"
    image_shape = (1, 28, 28)
    directory = "kmnist"
    train_files = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    test_files = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    url = "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"
    md5: ClassVar = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }

    def read(self, paths: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.read_idx(paths[0], self.image_shape[1:]), self.read_idx(paths[1], ())
        self.check_labels(labels, paths[1])
        if len(images) != len(labels):
            raise self.damaged(f"do not belong together: {len(images)} images, {len(labels)} labels", *paths)
        return images[:, None], labels

    def read_idx(self, path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
        """The uint8 array (n, *item_shape) in an IDX gzip file.

        Raises:
            UserError: the file does not hold that.
        """
        dimensions = 1 + len(item_shape)
        start = 4 + 4 * dimensions
        with self.reading(path), gzip.open(path) as file:
            header = file.read(start)
            if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
                raise self.damaged(f"is no IDX file of bytes in {dimensions} dimensions", path)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if shape[1:] != item_shape:
                raise self.damaged(f"holds images of {shape[1:]} pixels, not {item_shape}", path)
            announced = math.prod(shape)
            if announced > MOST_UNPACKED * path.stat().st_size:
                raise self.damaged(f"is too small for the {announced} bytes of data that its header announces", path)
            # No more than announced, whatever the file unpacks to.
            array = np.empty(announced, np.uint8)
            size = file.readinto(array)
            if size != announced or file.read(1):
                holds = size if size < announced else "more"
                raise self.damaged(f"holds {holds} bytes of data, not {announced} as its header says", path)
        return array.reshape(shape)


class OfficialTestImages(KMNIST):
    """The official test images alone; the training files are not needed."""

    train_files = KMNIST.test_files


def split_test_images(data_dir: str | Path, url: str, target: Path) -> str:
    """Write the official test images, in the order of RandomState(0), as 80 % training and 20 % test to target/kmnist.

    Returns:
        The folder to name with --data-dir.

    Raises:
        UserError: the images cannot be had, or files are there already, or cannot be written.
    """
    folder = target / KMNIST.directory
    if present := [file for file in KMNIST.train_files + KMNIST.test_files if (folder / file).exists()]:
        raise UserError(f"{folder} holds {', '.join(present)} already; choose another folder for --split-test-images")
    data = OfficialTestImages(data_dir, url)
    order = np.random.RandomState(0).permutation(len(data.test))
    images, labels = data.test.inputs.numpy()[order, 0], data.test.targets.numpy()[order]
    held_out = len(order) // 5
    with writing(folder):
        for files, part in (
            (KMNIST.train_files, slice(None, -held_out)),
            (KMNIST.test_files, slice(-held_out, None)),
        ):
            for file, array in zip(files, (images[part], labels[part]), strict=True):
                write_idx(folder / file, array)
    return str(target)


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes as an IDX gzip file; the same array gives the same file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)
    replace(path, lambda file: file.write(content))


if __name__ == "__main__":
    sys.exit(setup(KMNIST, split=split_test_images))
