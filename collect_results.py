"""Keep finished runs in results/, and make from them its reports and page, docs/claims.md and the README's figure.

    python3 collect_results.py [--from outputs]

Runs of the studies in wide/results/studies.py are copied without their checkpoints, but those of headline runs. Nothing
is trained.
"""

import sys

from wide import install_excepthook

if __name__ == "__main__":
    install_excepthook()

from wide.results.collecting import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
