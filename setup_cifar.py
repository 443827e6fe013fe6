"""Get and read CIFAR-10: 60000 small photographs of 10 kinds of things.

    python3 setup_cifar.py [--data-dir data] [--url BASE]

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The binary version: six files of records of
3073 bytes, a label and then the red, green and blue plane of the image, each row by row.
"""

import sys
from pathlib import Path
from typing import ClassVar

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

import numpy as np

from wide.command_line import setup
from wide.data.datasets import ImageDataset


class CIFAR(ImageDataset):
    """50000 training and 10000 test images, 32x32 in colour; see `ImageDataset`."""

    name = "cifar"
    title = "CIFAR-10"
    image_shape = (3, 32, 32)
    directory = "cifar-10-batches-bin"
    train_files = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    test_files = ("test_batch.bin",)
    url = "https://www.cs.toronto.edu/~kriz/"
    archive = "cifar-10-binary.tar.gz"
    md5: ClassVar = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
    record = 3073  # bytes: 1 + 3 * 32 * 32

    def read(self, paths: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray]:
        counts = [self.count_records(path) for path in paths]
        images = np.empty((sum(counts), *self.image_shape), np.uint8)
        labels = np.empty(sum(counts), np.uint8)
        start = 0
        # File by file into place, so that all records and all images are never in memory together.
        for path, count in zip(paths, counts, strict=True):
            with self.reading(path):
                content = path.read_bytes()
            if len(content) != count * self.record:
                raise self.damaged("changes while it is read", path)
            records = np.frombuffer(content, np.uint8).reshape(count, self.record)
            part = slice(start, start + count)
            labels[part], images[part] = records[:, 0], records[:, 1:].reshape(count, *self.image_shape)
            self.check_labels(labels[part], path)
            start += count
        return images, labels

    def count_records(self, path: Path) -> int:
        """Records in a file, from its size.

        Raises:
            UserError: there are none, or the last one is not whole.
        """
        count, rest = divmod(path.stat().st_size, self.record)
        if rest or not count:
            raise self.damaged(f"does not hold whole records of {self.record} bytes", path)
        return count


if __name__ == "__main__":
    sys.exit(setup(CIFAR))
