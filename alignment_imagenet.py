"""How well trained weight changes align with error-weighted input correlations, on ImageNet.

The paper lists these experiments, but their code was never released; they are built from the definitions, as for
CIFAR-10. Pairs of networks ("normal" by backprop, "align" by what Align-zero would write with its error) train for
300 epochs at learning rate 5, from one initialisation. 1 trains them, 2 scores every layer against width after 150
epochs, 3 against training time at width 512, with shuffled weights as control. Scores are computed while the pairs
train, or from the parameters that they kept.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from train_imagenet import SUBJECT
from wide.command_line import main
from wide.grids.alignment_experiments import alignment_experiments, pairs, scored

EXPERIMENTS = alignment_experiments(
    pairs(
        widths=(8, 16, 32, 64, 128, 256, 512),
        learning_rate=5,
        epochs=300,
        quick={"widths": (8, 16), "learning_rates": (2,), "batch_size": 20, "epochs": 4},
    ),
    scored_after=150,
    timed_width=512,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, scored(SUBJECT), EXPERIMENTS))
