"""Guessing, ridge regression and the nearest neighbour on KMNIST's pixels: test accuracy, to compare networks with.

    python3 baselines.py [--data-dir data]

Writes results/reports/kmnist_baselines.csv, which the README's figure shows. Takes seconds.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":
    install_excepthook()

from setup_kmnist import KMNIST
from wide.command_line import Parser, carry_out
from wide.results.baselines import PATH, baselines, write


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.strip())
    parser.add_argument("--data-dir", default="data", help="folder that holds kmnist/ (%(default)s)")

    def command(arguments) -> None:
        rows = baselines(KMNIST(arguments.data_dir))
        for row in rows:
            print("{baseline}: {test_accuracy:.2f} % {note}".format(**row))
        write(PATH, rows)

    return carry_out(parser, argv, command)


if __name__ == "__main__":
    sys.exit(main())
