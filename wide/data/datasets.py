"""The data: finding, else downloading, and splitting image datasets; the sequences of the Add task.

What a dataset's files are called, where they come from and how they are read is said in its setup script.
"""

import contextlib
import hashlib
import os
import shlex
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from shutil import copyfileobj
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wide import UserError
from wide.runs.files import sweep, temporary_folder

TIMEOUT = 30  # seconds without a byte before a download counts as failed
CHUNK = 1 << 18  # bytes
VALIDATION_IMAGES = 5000
MINIMUM_IMAGES = 6  # a third of them, two, is the smallest batch that can be normalised
ADD_VARIANTS = ("published", "corrected")


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and targets of a part of a dataset; `len` counts its examples.

    Images: uint8 (n, channels, h, w) and int64 (n). Sequences: float32 (n, time) both.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


class ImageDataset:
    """Labelled images in official files below `data_dir`, which are downloaded where they are missing.

    The first 5000 training images, or a third of them where there are fewer than 15000, are the validation split
    (as in the code released with the paper); the others train. Sizes are read from the files, so a small dataset in
    the same format serves as well. Only what is downloaded is compared with its MD5.

    Args:
        data_dir: the folder that holds `directory`.
        url: where the downloads lie, in place of the official address.

    Attributes:
        train, validation, test: `Split`s of uint8 images (n, *image_shape) and int64 labels (n).
        fingerprint: sizes of the three and a CRC32 of their content, "45000-5000-10000-1a2b3c4d".

    Raises:
        UserError: files are missing and cannot be downloaded, or they are damaged.
    """

    name: str  # in commands and paths: setup_<name>.py
    title: str  # as people write it
    image_shape: tuple[int, int, int]  # (channels, h, w)
    classes = 10
    directory: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    url: str
    archive: str | None = None  # the one download that holds all files; else each is downloaded by itself
    md5: dict[str, str]  # of every download

    def __init__(self, data_dir: str | Path = "data", url: str | None = None):
        self.folder = Path(data_dir) / self.directory
        self.command = f"python3 setup_{self.name}.py"
        if Path(data_dir) != Path("data"):
            self.command += f" --data-dir {shlex.quote(str(data_dir))}"
        self._find(url or self.url)
        images, labels = self._load(self.train_files, MINIMUM_IMAGES, "training")
        held_out = min(VALIDATION_IMAGES, len(images) // 3)
        self.train = Split(images[held_out:], labels[held_out:])
        self.validation = Split(images[:held_out], labels[:held_out])
        self.test = Split(*self._load(self.test_files, 2, "test"))
        self.fingerprint = _fingerprint(self.train, self.validation, self.test)

    def read(self, paths: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The uint8 images (n, *image_shape) and uint8 labels (n) in these files.

        Raises:
            UserError: a file is damaged (see `damaged`).
        """
        raise NotImplementedError

    def damaged(self, problem: str, *paths: Path) -> UserError:
        """The error to raise when something is wrong with these files; "<paths> <problem>" is a clause."""
        files, them = " and ".join(map(str, paths)), "it" if len(paths) == 1 else "them"
        return UserError(f"{files} {problem}; delete {them} and run {self.command}")

    @contextlib.contextmanager
    def reading(self, path: Path):
        """What happens within reads a file, plain or gzip; UserError if it cannot be read."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:  # the last two: cut short or changed within a gzip stream
            raise self.damaged(f"cannot be read ({getattr(error, 'strerror', None) or error})", path) from error

    def check_labels(self, labels: np.ndarray, path: Path) -> None:
        """Raise UserError if one of the labels read from `path` names no class."""
        if labels.size and labels.max() >= self.classes:
            raise self.damaged(f"holds the label {labels.max()}, but labels are 0 to {self.classes - 1}", path)

    def _load(self, files: tuple[str, ...], minimum: int, part: str) -> tuple[Tensor, Tensor]:
        images, labels = self.read(tuple(self.folder / file for file in files))
        if len(images) < minimum:
            raise self.damaged(f"holds {len(images)} {part} images, but at least {minimum} are needed", self.folder)
        return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long()

    def _find(self, url: str) -> None:
        sweep(self.folder)
        files = dict.fromkeys(self.train_files + self.test_files)
        missing = [file for file in files if not os.path.exists(self.folder / file)]
        if not missing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Inside the folder, so that what is whole can be moved into place within one file system.
            with temporary_folder(self.folder, "download") as arrivals:
                self._download(missing, url, arrivals)
                for file in missing:
                    os.replace(arrivals / file, self.folder / file)
        except OSError as error:
            raise UserError(
                f"{self.title} cannot be written to {self.folder} ({error.strerror or error}); "
                f"make room or get permission there, or choose another folder with --data-dir"
            ) from error

    def _download(self, missing: list[str], url: str, arrivals: Path) -> None:
        for file in [self.archive] if self.archive else missing:
            address = f"{url.rstrip('/')}/{file}"
            try:
                download(address, arrivals / file, self.md5[file])
                if self.archive:
                    unpack(arrivals / file, missing)
            except DownloadError as error:
                raise UserError(
                    f"{self.title} is missing {', '.join(missing)} in {self.folder}, and downloading {address} failed "
                    f"({error}); put the files there, or name the folder that holds {self.directory}/ with --data-dir, "
                    f"or run {self.command} --url BASE with the address of a mirror"
                ) from error


class DownloadError(Exception):
    """Why a download failed, in one line."""


def download(url: str, path: Path, md5: str) -> None:
    """Write what lies at `url` to `path`.

    Raises:
        DownloadError: it cannot be had, or not whole, or has another MD5.
        OSError: `path` cannot be written.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "wb") as file:
        for chunk in _received(url):
            file.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise DownloadError(f"what arrived has the MD5 {digest.hexdigest()}, not {md5}")


def _received(url: str) -> Iterator[bytes]:
    """The bytes at a URL. A generator, so that errors of the connection are not mistaken for those of the disk."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            # disable=None: no bar where stderr is not a terminal.
            with tqdm(desc=url.rpartition("/")[2], total=size or None, unit="B", unit_scale=True, disable=None) as bar:
                received = 0
                while chunk := response.read(CHUNK):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
            # A read of limited size does not complain when the connection ends early.
            if received < size:
                raise ConnectionError(f"the connection ended after {received} of {size} bytes")
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        reason = error.reason if type(error) is URLError else error
        raise DownloadError(" ".join(str(reason).split()) or repr(reason)) from error


def unpack(archive: Path, files: list[str]) -> None:
    """Write the regular members of a tar archive that have these names, whatever their folder, beside it.

    Nothing else is extracted, and a member's own path is never used.

    Raises:
        DownloadError: the archive is damaged or lacks one of the files.
        OSError: a file cannot be written.
    """
    lacking = set(files)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = member.name.rpartition("/")[2]
                if file in lacking and member.isfile():
                    with open(archive.parent / file, "wb") as target:
                        copyfileobj(tar.extractfile(member), target)
                    lacking.remove(file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DownloadError(f"the archive is damaged: {error}") from error
    if lacking:
        raise DownloadError(f"the archive lacks {', '.join(sorted(lacking))}")


def _fingerprint(*splits: Split) -> str:
    checksum = 0
    for split in splits:
        for tensor in (split.inputs, split.targets):
            checksum = zlib.crc32(tensor.numpy(), checksum)
    return "-".join([*(str(len(split)) for split in splits), f"{checksum:08x}"])


def add_sequences(variant: str) -> dict[str, Split]:
    """The Add task: 300 training and 100 test sequences of 100 random bits x, from the published seed.

    The target is 0.5 + 0.5 x(t-2) - 0.25 x(t-5). "corrected" takes x as zero before the start. "published" does what
    the released code does: x wraps around in time, and the delayed copies of the first 2 (5) *sequences* are zero.

    Returns:
        {"train": Split, "test": Split} of float32 inputs (n, time) and targets (n, time).

    Raises:
        ValueError: for another variant.
    """
    if variant not in ADD_VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(ADD_VARIANTS)}, not {variant!r}")
    bits = np.random.RandomState(99).binomial(1, 0.5, (400, 100))  # (sequence, time)
    targets = 0.5 + 0.5 * _delayed(bits, 2, variant) - 0.25 * _delayed(bits, 5, variant)
    inputs, targets = (torch.from_numpy(array).float() for array in (bits, targets))
    return {"train": Split(inputs[:300], targets[:300]), "test": Split(inputs[300:], targets[300:])}


def _delayed(bits: np.ndarray, steps: int, variant: str) -> np.ndarray:
    delayed = np.roll(bits, steps, axis=1)
    if variant == "published":
        delayed[:steps] = 0
    else:
        delayed[:, :steps] = 0
    return delayed
