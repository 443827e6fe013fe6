"""What the paper trained on ImageNet: networks of seven convolutional blocks of width 512, on images of 224x224.

Strides 4, 2, 1, 2, 1, 2, 1; SGD, batch 100, 300 epochs. Tables give top-1 / top-5 accuracy on the validation images
after the last epoch. Images are read from <data-dir>/train/<class>/ and <data-dir>/val/<class>/.

On several GPUs, here or on other machines too: torchrun --nproc-per-node=8 train_imagenet.py 1. Each process then has
batches of its own, normalised by themselves, and gradients are averaged over all; see --sync-normalisation.
--quick needs no ImageNet: it draws coloured shapes, in <data-dir>/shapes.
"""

import sys
from pathlib import Path

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from wide.command_line import main
from wide.grids.experiments import Experiment, Subject
from wide.options import DataOptions
from wide.reports.tables import TOP_ACCURACY, View

STRIDES = (4, 2, 1, 2, 1, 2, 1)
QUICK = {"widths": (16,), "learning_rates": (2,), "batch_size": 20, "epochs": 8}

EXPERIMENTS = {
    1: Experiment(
        title="accuracy, top-1 and top-5",
        rules=("backprop", "align_ada", "dfa", "fa", "align_zero"),
        widths=(512,),
        learning_rates=(5,),
        epochs=300,
        view=View(figure="curves"),
        quick=QUICK,
    ),
}


def folders(data: DataOptions, device):
    from wide.training.folder_task import FolderTask  # torchvision takes seconds to import

    return FolderTask(data.folder, STRIDES, device, data.workers)


def generated(data: DataOptions, device):
    from wide.data.shapes import shapes
    from wide.training.folder_task import FolderTask

    return FolderTask(shapes(data.folder), STRIDES, device, data.workers)


SUBJECT = Subject(
    dataset="imagenet",
    title="ImageNet",
    task=folders,
    image_size=(224, 224),
    strides=STRIDES,
    networks=("cnn",),
    batch_size=100,
    metrics=TOP_ACCURACY,
    examples=1281167,
    axes=("rules", "widths", "learning_rates", "seeds"),
    data_dir=Path(".."),
    from_files=True,
    distributed=True,
    quick={"dataset": "shapes", "title": "Coloured shapes (not ImageNet)", "task": generated, "data_dir": Path("data")},
)

if __name__ == "__main__":
    sys.exit(main(__doc__, SUBJECT, EXPERIMENTS))
