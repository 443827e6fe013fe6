"""How well trained weight changes align with error-weighted input correlations, on CIFAR-10.

Pairs of networks ("normal" by backprop, "align" by what Align-zero would write with its error) train for 300 epochs at
learning rate 5, from one initialisation. 1 trains them, 2 scores every layer against width after 150 epochs, 3 against
training time at width 512, with shuffled weights as control. Scores are computed while the pairs train, or
from the parameters that they kept.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from train_cifar import SUBJECT, WIDTHS
from wide.command_line import main
from wide.grids.alignment_experiments import alignment_experiments, pairs, scored

EXPERIMENTS = alignment_experiments(
    pairs(widths=WIDTHS, learning_rate=5, epochs=300, quick={"widths": (8, 16), "data_limits": (500,), "epochs": 4}),
    scored_after=150,
    timed_width=512,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, scored(SUBJECT), EXPERIMENTS))
