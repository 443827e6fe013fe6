"""What the paper trained on the Add task: recurrent networks that add two earlier inputs of a binary sequence.

Recurrent networks of width n, T = 100 steps, 300 training and 100 test sequences; SGD, learning rate 0.001, batch 50.
The table gives the best (lowest) training / test loss over the epochs, beside the loss of guessing 0.5.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from wide.command_line import main
from wide.grids.experiments import Experiment, Subject
from wide.options import DataOptions
from wide.reports.tables import BEST_LOSS
from wide.training.tasks import AddTask

EXPERIMENTS = {
    1: Experiment(
        title="loss against width (the paper's recurrent networks)",
        rules=("backprop", "align_ada", "align_zero", "last_layer"),
        widths=(8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        learning_rates=(0.001,),
        epochs=200,
        quick={"widths": (32, 128), "epochs": 60},  # half a minute; the rules end in the order that 200 epochs give
    ),
}


def guessing(data: DataOptions) -> dict[str, dict[str, float]]:
    task = AddTask(data.variant, "cpu")
    return {"guessing 0.5": {"train_loss": task.chance("train"), "test_loss": task.chance("test")}}


SUBJECT = Subject(
    dataset="add",
    title="Add task",
    task=lambda data, device: AddTask(data.variant, device),
    networks=("rnn",),
    variants=("published", "corrected"),
    batch_size=50,
    examples=300,
    axes=("rules", "widths", "learning_rates", "seeds"),
    metrics=BEST_LOSS,
    references=guessing,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, SUBJECT, EXPERIMENTS))
