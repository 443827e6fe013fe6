"""The runs of the published code that are kept in tests/golden, and the made-up data that they were trained on."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from train_cifar import STRIDES as CIFAR_STRIDES
from train_kmnist import STRIDES as KMNIST_STRIDES
from wide.data.datasets import Split
from wide.training.tasks import ImageTask

GOLDEN = Path(__file__).parent / "golden"
RULES = {
    "normal": "backprop",
    "lastlayer": "last_layer",
    "readout": "last_layer",
    "alignada": "align_ada",
    "alignzero": "align_zero",
    "alignprop": "align_prop",
    "fa": "fa",
    "dfa": "dfa",
}
SEEDS = {"cifar": 0, "kmnist": 1}  # of the made-up data
BATCH, EPOCHS = 50, 4


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def made_up(seed, count, size, channels):
    stream = np.random.RandomState(seed)
    templates = stream.rand(10, size, size, channels)
    labels = stream.randint(0, 10, count)
    images = (0.6 * templates[labels] + 0.4 * stream.rand(count, size, size, channels)).astype(np.float32)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def image_task(dataset, dtype, seed):
    size, channels, strides = {"cifar": (32, 3, CIFAR_STRIDES), "kmnist": (28, 1, KMNIST_STRIDES)}[dataset]
    images, labels = made_up(seed, 300, size, channels)
    images = images.to(dtype)
    train, held_out = Split(images[:200], labels[:200]), Split(images[200:], labels[200:])
    shape = (channels, size, size)
    data = SimpleNamespace(
        train=train, validation=held_out, test=held_out, classes=10, image_shape=shape, fingerprint=""
    )
    return ImageTask(data, strides, torch.device("cpu"))
