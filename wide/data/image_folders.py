"""Images in folders, one per class, read from files while a network trains (torchvision's ImageFolder layout)."""

import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from wide import UserError
from wide.runs.folder import Run
from wide.training.devices import usable_cores
from wide.training.processes import Processes
from wide.training.tasks import ClassificationTask, Evaluation

SIZE = 224  # pixels
FOLDERS = {"train": "train", "validation": "val"}
TRANSFORMS = {
    "train": v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]),
    "validation": v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(SIZE)]),
}
# Of ImageNet's red, green and blue, as fractions of 255.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What Pillow raises for files that are missing, damaged or no images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Modes of Pillow with more than 8 bits a channel: whole numbers of 16 and of 32, and floating-point ones.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds no more than 16
TOLERATED = 1000  # one unreadable image among so many


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


class FolderTask(ClassificationTask):
    """Classification of the images below data_dir/train and data_dir/val, onto one-hot vectors.

    Images that cannot be read are named and left out of their batch, and counted in the column `unreadable`.

    Args:
        data_dir: holds train/ and val/, each with the same folders of images, one per class.
        strides: of the network's blocks.
        workers: processes that load images; None for one per core that this process has for itself.

    Raises:
        UserError: folders are missing, or empty, or those of train/ and val/ differ; while reading, more than one image
            in a thousand is unreadable.
    """

    columns = (
        "train_loss", "train_accuracy", "train_top_5_accuracy", "validation_accuracy", "validation_top_5_accuracy",
    )  # fmt: skip
    evaluations = (Evaluation("validation", streamed=False),)
    offset = 0.0
    pooled_feedback = True
    image_shape = (3, SIZE, SIZE)

    def __init__(self, data_dir: Path, strides: tuple[int, ...], device: torch.device, workers: int | None = None):
        splits = {split: Images(Path(data_dir) / folder, split) for split, folder in FOLDERS.items()}
        train, validation = (splits[split].classes for split in FOLDERS)
        if differing := sorted(set(train) ^ set(validation)):
            raise UserError(
                f"{data_dir}/train and {data_dir}/val must hold folders of the same names, the classes, but only one "
                f"of them has {', '.join(differing[:5])}{' and others' if len(differing) > 5 else ''}"
            )
        super().__init__(splits, _fingerprint(splits, Path(data_dir)), device)
        self.classes, self.strides = len(train), strides
        self.workers = _cores() if workers is None else workers
        self.scale = [torch.tensor(values, device=device).view(-1, 1, 1) for values in (MEAN, DEVIATION)]
        self.unreadable: set[str] = set()  # in this epoch
        self.named: set[str] = set()  # ever

    def loader(self, run: Run, split: str, indices: list[np.ndarray], epoch: int) -> DataLoader:
        """Loads these examples, a batch for every array, as `collate` returns them."""
        return DataLoader(
            self.splits[split],
            batch_sampler=Keys(indices, f"{run.seed} {epoch} {split}"),
            collate_fn=collate,
            num_workers=min(self.workers, len(indices)),
            pin_memory=self.device.type == "cuda",
        )

    def batches(self, run: Run, split: str, indices: list[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in self.loader(run, split, indices, epoch):
            if unreadable:
                self.notice(unreadable)
                if len(images) == 1:  # which cannot be normalised over the batch
                    images, labels = images[:0], labels[:0]
            on_device = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield self.prepared(on_device[0]), on_device[1]

    def prepared(self, inputs: Tensor) -> Tensor:
        mean, deviation = self.scale
        return (inputs / 255 - mean) / deviation

    def notice(self, paths: list[str]) -> None:
        """Name images that cannot be read; UserError where they are too many."""
        self.unreadable |= set(paths)
        for path in sorted(set(paths) - self.named):
            tqdm.write(f"{path} cannot be read; it is left out", file=sys.stderr)
        self.named |= set(paths)
        self._tolerate(self.unreadable)

    def noticed(self, processes: Processes) -> dict[str, int]:
        everywhere = set().union(*processes.gather(self.unreadable))
        self.unreadable = set()
        self._tolerate(everywhere)
        return {"unreadable": len(everywhere)}

    def _tolerate(self, paths: set[str]) -> None:
        images = sum(map(len, self.splits.values()))
        if len(paths) * TOLERATED > images:
            raise UserError(
                f"{len(paths)} of {images} images cannot be read ({min(paths)} for one), more than one in {TOLERATED}; "
                "mend or delete them"
            )

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        best = outputs.topk(min(5, self.classes)).indices
        among = (best == targets[:, None]).any(1).float().mean()
        return super().measures(outputs, targets) | {"top_5_accuracy": among}


def _cores() -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(usable_cores() // processes, 1)


def _fingerprint(splits: dict[str, Images], data_dir: Path) -> str:
    """Numbers of images, and a CRC32 of their paths."""
    start = len(os.fsencode(data_dir))
    checksum = 0
    for images in splits.values():
        for path in images.paths:
            checksum = zlib.crc32(path[start:], checksum)
    return "-".join([*(str(len(images)) for images in splits.values()), f"{checksum:08x}"])
