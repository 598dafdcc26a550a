"""How the older names of commands, files in this folder, find their packages from any other: `python -m` does it."""

import os
import sys
from pathlib import Path
from typing import NoReturn


def run(module: str) -> NoReturn:
    """`python -m MODULE` in place of this process, with its command line; the checkout is on the path."""
    places = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
