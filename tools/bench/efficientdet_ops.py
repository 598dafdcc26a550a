"""EfficientDet's own ops on the CPU beside the PyTorch they replace, at the sizes of a training step of D0.

    python -m tools.bench.efficientdet_ops [--size 512] [--batch 2] [--dtype float32] [--rounds 5] [--json PATH]

Both run alternately in one process; the table has medians of the rounds, in CPU time. nodes: the eight nodes of a cell
of the feature pyramid, up to their activation, forward, and forward with backward. norms: batch normalisation in
training with SiLU, of a map of each kind that the backbone has and of the maps of a cell; the same two. deltas: what
the positive anchors of a batch with 7 boxes an image are to predict.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from detcore.cli import run_main
from detcore.device import native
from detcore.ops.match import match
from detcore.ops.norm_act import norm_act
from efficientdet.anchors import anchors
from efficientdet.bifpn import nodes
from efficientdet.loss import MATCH
from efficientdet.ops.fuse import fuse
from efficientdet.ops.wanted_deltas import wanted_deltas

CHANNELS, LEVELS = 64, 5
BACKBONE = ((32, 2), (96, 2), (96, 4), (144, 4), (144, 8), (240, 8), (240, 16), (480, 16), (672, 16), (1152, 32))
"""Channels and stride of the maps of EfficientNet-B0 that a normalisation and SiLU follow, each kind once."""
Run = Callable[[], object]


def gradients(function: Callable[..., Tensor], given: Sequence[Tensor]) -> Run:
    """A call of it with the gradients of all that it is given."""
    given = [t.detach().requires_grad_() for t in given]
    upstream = torch.ones_like(function(*given))
    return lambda: torch.autograd.grad(function(*given), given, upstream)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def pyramid(size: int, batch: int, dtype: torch.dtype) -> tuple[list[Run], list[Run]]:
    """The nodes of a cell: forward, and with the gradients."""
    sides = [size // 2**level for level in range(3, 3 + LEVELS)]
    level_of, forward, both = list(range(LEVELS)), [], []
    for level, places in nodes(LEVELS):
        steps = [level_of[place] - level for place in places]
        maps = [drawn((batch, CHANNELS, *[sides[level_of[place]]] * 2), dtype) for place in places]
        level_of.append(level)

        def run(weights: Tensor, *maps: Tensor, steps: Sequence[int] = steps) -> Tensor:
            return fuse(maps, steps, weights, True, "silu")

        given = torch.rand(len(maps)), *maps
        forward.append(lambda run=run, given=given: run(*given))
        both.append(gradients(run, given))
    return forward, both


def norms(size: int, batch: int, dtype: torch.dtype) -> tuple[list[Run], list[Run]]:
    """The normalisations: forward, and with the gradients."""
    shapes = [(channels, size // stride) for channels, stride in BACKBONE]
    shapes += [(CHANNELS, size // 2**level) for level in range(3, 3 + LEVELS)]
    forward, both = [], []
    for channels, side in shapes:
        given = drawn((batch, channels, side, side), dtype), torch.rand(channels) + 0.5, torch.randn(channels)
        running = torch.zeros(channels), torch.ones(channels)

        def run(x: Tensor, weight: Tensor, bias: Tensor, running: Sequence[Tensor] = running) -> Tensor:
            return norm_act(x, weight, bias, *running, 0.01, 1e-3, "silu")

        forward.append(lambda run=run, given=given: run(*given))
        both.append(gradients(run, given))
    return forward, both


def wanted(size: int, batch: int) -> list[Run]:
    """The deltas of a batch, always float32."""
    grid, low = anchors((size, size)), 0.7 * size * torch.rand(batch, 100, 2)
    boxes = torch.cat((low, low + size * (0.02 + 0.28 * torch.rand(batch, 100, 2))), 2)
    matched = match(grid, boxes, torch.where(torch.arange(100) < 7, 0, -1).expand(batch, 100), **MATCH)
    return [lambda: wanted_deltas(grid, boxes, matched)]


def measure(runs: Sequence[Run], rounds: int) -> dict[str, float]:
    """Median CPU seconds of all of them, by the references and by the ops."""
    spent: dict[str, list[float]] = {"reference": [], "auto": []}
    for turn in range(rounds + 1):  # the first one warms up
        for policy, seconds in spent.items():
            with native.using(policy):
                start = time.process_time()
                for run in runs:
                    run()
                if turn:
                    seconds.append(time.process_time() - start)
    return {policy: statistics.median(seconds) for policy, seconds in spent.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = options.size, options.batch, getattr(torch, options.dtype)
    print(
        f"{options.size} pixels, batch {options.batch}, {options.dtype}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{native.describe('efficientdet', torch.device('cpu'))}"
    )
    print(f"{'CPU ms':28} {'PyTorch':>9} {'op':>9} {'speed-up':>9}")
    rows = []
    groups = {"deltas": wanted(*sizes[:2])}
    for what, made in (("nodes", pyramid), ("norms", norms)):
        groups |= zip((f"{what} forward", f"{what} and backward"), made(*sizes), strict=True)
    for name, runs in groups.items():
        found = measure(runs, options.rounds)
        speedup = found["reference"] / found["auto"]
        print(f"{name:28} {1e3 * found['reference']:9.1f} {1e3 * found['auto']:9.1f} {speedup:8.2f}x", flush=True)
        rows.append({"what": name, **found, "speedup": speedup})
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
