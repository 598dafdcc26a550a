"""How tools/trials.py, tools/package_results.py and tools/report.py find their package from any folder."""

import runpy
import sys
from pathlib import Path


def run(module: str) -> None:
    """What `python -m MODULE` does, with this process's command line; the checkout goes first on the path."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
