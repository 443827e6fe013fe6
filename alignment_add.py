"""How well trained weight changes align with error-weighted input correlations, on the Add task.

Pairs of recurrent networks ("normal" by backprop, "align" by what Align-zero would write with its error) train for 200
epochs at learning rate 0.001, from one initialisation. 1 trains them, 2 scores W_hh against width after 200 epochs, 3
against training time at width 512, with shuffled weights as control. Scores are computed while the pairs train, or
from the parameters that they kept.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":  # first: importing torch takes seconds
    install_excepthook()

from train_add import EXPERIMENTS as TRAINING
from train_add import SUBJECT
from wide.command_line import main
from wide.grids.alignment_experiments import alignment_experiments, pairs, scored

EXPERIMENTS = alignment_experiments(
    pairs(widths=TRAINING[1].widths, learning_rate=0.001, epochs=200, quick={"widths": (16, 64, 256), "epochs": 10}),
    scored_after=200,
    timed_width=512,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, scored(SUBJECT), EXPERIMENTS))
