"""Learning from images that are read from files while a network trains: ImageNet."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from wide import UserError
from wide.data.image_folders import FOLDERS, SIZE, Images, Keys, collate, fingerprint
from wide.runs.run import Run
from wide.training.devices import usable_cores
from wide.training.processes import Processes
from wide.training.tasks import ClassificationTask, Evaluation

# Of ImageNet's red, green and blue, as fractions of 255.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERATED = 1000  # one unreadable image among so many


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
        super().__init__(splits, fingerprint(splits, Path(data_dir)), device)
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
