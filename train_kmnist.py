"""What the paper trained on KMNIST: networks of three convolutional blocks (strides 1, 2, 2) at widths 8 to 512.

SGD, batch 100, 100 epochs. The table gives validation / test accuracy after the last epoch, at the learning rate with
the best validation accuracy; the validation split is the first 5000 training images, or a third of them where
there are fewer than 15000 (setup_kmnist.py --split-test-images).
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from setup_kmnist import KMNIST
from wide.command_line import main
from wide.grids.experiments import Experiment, Subject
from wide.reports.distance_report import DistanceReport
from wide.reports.tables import ACCURACY, View
from wide.training.tasks import ImageTask

RULES = ("backprop", "align_ada", "dfa", "align_zero", "fa", "last_layer")
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
STRIDES = (1, 2, 2)

EXPERIMENTS = {
    1: Experiment(
        title="accuracy against width",
        rules=RULES,
        widths=WIDTHS,
        learning_rates=(5, 2, 1),
        epochs=100,
        # 600 updates of a narrow network and a wide one, a minute or two: where rules that take errors from the initial
        # network end, beside backprop, and FA and DFA behind it.
        quick={
            "network": "mlp",
            "widths": (32, 512),
            "learning_rates": (5,),
            "data_limits": (3000,),
            "batch_size": 50,
            "epochs": 10,
        },
    ),
    2: Experiment(
        title="accuracy against learning rate",
        rules=RULES,
        widths=(8, 256),
        learning_rates=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20),
        epochs=100,
        view=View(against="learning_rate", best_over=()),
        quick={"widths": (8, 32), "learning_rates": (0.2, 1, 5, 20), "data_limits": (1000,), "epochs": 3},
    ),
    3: Experiment(  # not the paper's; what its theory says of few updates (wide/reports/distance_report.py)
        title="distance from theory against width",
        rules=("backprop", "align_ada", "align_zero", "align_prop", "fa", "dfa"),
        widths=WIDTHS,
        learning_rates=(5,),
        epochs=1,
        data_limits=(500,),
        batch_size=50,
        logged=True,
        report=DistanceReport(),
        quick={"widths": (8, 16, 32)},
    ),
    4: Experiment(  # not the paper's; its theorem: in wide networks the rules compute what backprop's network does
        title="distance of outputs from those of backprop's network against width",
        rules=("align_ada", "align_zero", "align_prop", "fa", "dfa", "last_layer"),
        widths=WIDTHS,
        learning_rates=(5,),
        epochs=1000,  # of one update each
        data_limits=(100,),
        batch_size=100,
        compared=(1, 10, 100, 1000),
        report=DistanceReport(),
        quick={"widths": (8, 16, 32), "epochs": 10},
    ),
}

SUBJECT = Subject(
    dataset="kmnist",
    title="KMNIST",
    task=lambda data, device: ImageTask(KMNIST(data.folder), STRIDES, device),
    image_size=KMNIST.image_shape[1:],
    strides=STRIDES,
    networks=("cnn", "mlp"),
    batch_size=100,
    metrics=ACCURACY,
    examples=55000,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, SUBJECT, EXPERIMENTS))
