"""What the tests of tools.gpu_check share."""

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tools.gpu_check import __main__ as check
from tools.gpu_check import state

FILES = ["gpu_check.json", "gpu_check.log", "table.txt"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU part is that of a machine without a GPU")


def context(out: Path, gpu: bool = False, budget: float = 300.0, **more) -> state.Context:
    return state.Context(out, gpu, not gpu, None, budget, time.monotonic(), **{"work": out / "work"} | more)


def options(out: Path, *words: str) -> Namespace:
    return check.arguments(["--out", str(out), "--work", str(out.parent / "work"), *words])


def keep(out: Path, part: str, rows: dict) -> None:
    """Leaves rows of a part in the JSON of a folder."""
    found = state.load(out)
    found["parts"].setdefault(part, {}).setdefault("rows", {}).update(rows)
    state.save(out, found)
