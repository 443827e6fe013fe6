"""Images in folders, one per class, read from files while a network trains (torchvision's ImageFolder layout)."""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from wide import UserError

SIZE = 224  # pixels
FOLDERS = {"train": "train", "validation": "val"}
TRANSFORMS = {
    "train": v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]),
    "validation": v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(SIZE)]),
}
# What Pillow raises for files that are missing, damaged or no images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Modes of Pillow with more than 8 bits a channel: whole numbers of 16 and of 32, and floating-point ones.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds no more than 16


class Images(Dataset):
    """The images of a split: `images[index, seed]` is (uint8 image (3, 224, 224), label), or a path that is unreadable.

    The seed decides what is random in the transform, so that it does not matter which process reads the image.

    Raises:
        UserError: there is no such folder, or it or one of its classes is empty.
    """

    def __init__(self, folder: Path, split: str):
        self.transform = TRANSFORMS[split]
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder}; put the images there, a folder per class ({folder}/n01440764/*.JPEG), "
                "or name the folder that holds train/ and val/ with --data-dir; --quick needs no images"
            )
        try:
            found = ImageFolder(str(folder), allow_empty=True)
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no folders; put the images there, a folder per class") from error
        self.classes = found.classes
        # As arrays: a list of a million strings would be copied into every worker, bit by bit, as it is read.
        self.paths = np.array([os.fsencode(path) for path, _ in found.samples])
        self.labels = np.array([label for _, label in found.samples])
        if absent := set(range(len(self.classes))) - set(self.labels.tolist()):
            empty, endings = folder / self.classes[min(absent)], ", ".join(IMG_EXTENSIONS)
            raise UserError(f"{empty} holds no images ({endings}); put them there or delete the folder, in val/ too")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        index, seed = key
        path = os.fsdecode(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image = self.transform(read_image(path))
            except UNREADABLE:
                return path
        return image, int(self.labels[index])


def read_image(path: str) -> Tensor:
    """An image in RGB, uint8 (3, h, w), as torchvision reads it; of 16 bits a pixel, scaled to 8.

    Raises:
        UNREADABLE: it is missing or damaged, or has no range that black and white are known of.
    """
    with Image.open(path) as image:
        if image.mode not in DEEP:
            return pil_to_tensor(image.convert("RGB"))
        if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
            raise ValueError(f"pixels of mode {image.mode} have no defined range")
        # Pillow would cut off at 255 instead.
        levels = torch.from_numpy(np.asarray(image).astype(np.int64))
    return ((levels + 128) // 257).clamp(0, 255).to(torch.uint8).expand(3, -1, -1).clone()


class Keys(Sampler):
    """For every batch of indices the keys of its images; their seeds differ between images, and follow from `seed`."""

    def __init__(self, indices: list[np.ndarray], seed: str):
        self.indices, self.seed = indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.indices:
            yield [(int(index), self.drawn(index)) for index in part]

    def drawn(self, index: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {index}".encode(), digest_size=4).digest(), "little")


def collate(examples: list) -> tuple[Tensor, Tensor, list[str]]:
    """Images (n, 3, 224, 224), labels (n), and the paths that could not be read."""
    read = [example for example in examples if not isinstance(example, str)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return images, labels, [example for example in examples if isinstance(example, str)]


def fingerprint(splits: dict[str, Images], data_dir: Path) -> str:
    """Numbers of images, and a CRC32 of their paths."""
    start = len(os.fsencode(data_dir))
    checksum = 0
    for images in splits.values():
        for path in images.paths:
            checksum = zlib.crc32(path[start:], checksum)
    return "-".join([*(str(len(images)) for images in splits.values()), f"{checksum:08x}"])
