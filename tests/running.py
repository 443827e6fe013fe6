"""Running the scripts as their users do, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def script(name, *arguments, **keywords):
    """The finished process of a script, with its output as text."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    environment = {**os.environ, **NO_NETWORK}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **keywords)
