"""How the scripts here find dataprep from any folder: the checkout goes first on Python's path, in this file alone."""

import runpy
import sys
from pathlib import Path


def run(module: str) -> None:
    """What `python -m MODULE` does, with the words of this process's command line."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
