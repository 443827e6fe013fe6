"""Running the scripts as their users do, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def command(name, *arguments, processes=1):
    """The command line of a script, under torchrun where several processes train together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, arguments)]


def script(name, *arguments, processes=1, variables=None, **keywords):
    """The finished process of a script, with its output as text; `variables` of the environment replace ours."""
    environment = {**os.environ, **NO_NETWORK, **(variables or {})}
    line = command(name, *arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, **keywords)
