"""What the paper trained on CIFAR-10: networks of seven convolutional blocks at widths 8 to 512.

Strides 1, 1, 1, 2, 1, 2, 1; SGD, batch 100, 150 epochs. Tables give validation / test accuracy after the last epoch, at
the learning rate with the best validation accuracy; the validation split is the first 5000 training images.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from setup_cifar import CIFAR
from wide.command_line import main
from wide.grids.experiments import Experiment, Subject
from wide.reports.tables import ACCURACY, EPOCH_TIME, View
from wide.training.tasks import ImageTask

RULES = ("backprop", "align_ada", "dfa", "align_zero", "fa", "last_layer")
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
LEARNING_RATES = (5, 2, 1)
SEEDS = (100, 101, 102, 103, 104)
STRIDES = (1, 1, 1, 2, 1, 2, 1)
# 200 updates at width 32, five minutes of processor time for all six rules; narrower networks part later.
QUICK = {"widths": (32,), "learning_rates": (5,), "data_limits": (2000,), "batch_size": 50, "epochs": 5}

EXPERIMENTS = {
    1: Experiment(
        title="accuracy against width",
        rules=RULES,
        widths=WIDTHS,
        learning_rates=LEARNING_RATES,
        epochs=150,
        quick=QUICK,
    ),
    2: Experiment(
        title="accuracy against learning rate",
        rules=RULES,
        widths=(8, 256),
        learning_rates=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20),
        epochs=150,
        view=View(against="learning_rate", best_over=()),
        quick=QUICK | {"widths": (8,), "learning_rates": (0.2, 1, 5, 20)},
    ),
    3: Experiment(
        title="accuracy against width in standard parameterisation, with Adam",
        rules=("backprop", "align_ada", "align_zero"),
        widths=WIDTHS,
        learning_rates=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        epochs=150,
        optimizer="adam",
        parameterisation="standard",
        beside=(1, ("backprop", "align_ada", "align_zero")),
        quick=QUICK | {"learning_rates": (0.002, 0.01)},
    ),
    4: Experiment(
        title="accuracy against number of training images, at the best width",
        rules=("backprop", "align_ada", "align_zero", "fa", "dfa"),
        widths=WIDTHS,
        learning_rates=LEARNING_RATES,
        epochs=150,
        data_limits=(45, 150, 450, 1500, 4500, 15000, 45000),
        view=View(against="data_limit", best_over=("learning_rate", "width"), figure="gap"),
        quick=QUICK | {"widths": (16,), "data_limits": (45, 150, 450), "epochs": 20},
    ),
    5: Experiment(
        title="accuracy of Align-prop against width",
        rules=("align_prop",),
        widths=WIDTHS,
        learning_rates=LEARNING_RATES,
        epochs=150,
        beside=(1, RULES),
        quick=QUICK,
    ),
    6: Experiment(
        title="accuracy over seeds",
        rules=("backprop", "align_ada", "dfa", "align_zero", "fa"),
        widths=(256,),
        learning_rates=LEARNING_RATES,
        epochs=150,
        seeds=SEEDS,
        view=View(figure="seeds"),
        quick=QUICK | {"widths": (16,), "seeds": SEEDS[:3]},
    ),
    7: Experiment(
        title="training time of an epoch against width",
        rules=("backprop", "align_ada", "align_zero"),
        widths=WIDTHS,
        learning_rates=LEARNING_RATES,
        epochs=1,
        seeds=SEEDS,
        view=View(best_over=(), averaged=("seed", "learning_rate"), figure="timing"),
        metrics=EPOCH_TIME,
        timed=True,
        quick={"widths": (8, 16, 32), "learning_rates": (5,), "data_limits": (1000,), "seeds": SEEDS[:2], "epochs": 1},
    ),
}

SUBJECT = Subject(
    dataset="cifar",
    title="CIFAR-10",
    task=lambda data, device: ImageTask(CIFAR(data.folder), STRIDES, device),
    image_size=CIFAR.image_shape[1:],
    strides=STRIDES,
    networks=("cnn", "mlp"),
    batch_size=100,
    metrics=ACCURACY,
    examples=45000,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, SUBJECT, EXPERIMENTS))
