"""Guessing, ridge regression and the nearest neighbour on KMNIST's pixels: test accuracy, to compare networks with.

    python3 baselines.py [--data-dir data]

Writes results/reports/kmnist_baselines.csv, which the README's figure shows. Takes seconds.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":
    install_excepthook()

from setup_kmnist import KMNIST
from wide.baselines import PATH, baselines, write
from wide.command_line import Parser, exit_status


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.strip())
    parser.add_argument("--data-dir", default="data", help="folder that holds kmnist/ (%(default)s)")
    folder = parser.parse_args(argv).data_dir

    def command() -> list:
        rows = baselines(KMNIST(folder))
        for row in rows:
            print("{baseline}: {test_accuracy:.2f} % {note}".format(**row))
        write(PATH, rows)
        return []

    return exit_status(parser.prog, command)


if __name__ == "__main__":
    sys.exit(main())
