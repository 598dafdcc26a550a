"""RoIAlign over all levels in one op against torchvision's MultiScaleRoIAlign: forward and backward.

    python -m tools.bench.roi_align [--images 1] [--regions 512] [--rounds 5] [--json PATH]

The pyramid of 800 x 1088 pixels, 256 channels, float32, P2 to P5; regions of 16 to 500 pixels; bins of 7 x 7 as the box
head has them, 2 x 2 samples. The two run alternately in one process; the table gives the medians of processor seconds,
and how far their results are apart.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from detcore.ops.roi_align import roi_align
from maskrcnn.roi_heads import levels_of

SIZE, STRIDES, CHANNELS, BINS = (800, 1088), (4, 8, 16, 32), 256, 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def scene(images: int, regions: int, layout: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(images, CHANNELS, SIZE[0] // s, SIZE[1] // s, generator=generator) for s in STRIDES]
    low = torch.rand(images, regions, 2, generator=generator) * torch.tensor(SIZE).flip(0) * 0.7
    side = 16 + torch.rand(images, regions, 2, generator=generator) ** 3 * 484
    return [x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for x in maps], torch.cat((low, low + side), 2)


def ours(maps: list[Tensor], boxes: Tensor) -> Tensor:
    return roi_align(maps, boxes, levels_of(boxes, 2, 5), [1 / s for s in STRIDES], BINS, 2).flatten(0, 1)


def theirs(maps: list[Tensor], boxes: Tensor, pooler: MultiScaleRoIAlign) -> Tensor:
    return pooler(dict(zip("0123", maps, strict=True)), list(boxes), [SIZE] * len(boxes))


def timed(pool: Callable[[list[Tensor], Tensor], Tensor], maps: list[Tensor], boxes: Tensor) -> tuple:
    """(seconds forward, seconds backward, result, gradients)."""
    start = time.process_time()
    out = pool(maps, boxes)
    middle = time.process_time()
    gradients = torch.autograd.grad(out, maps, torch.ones_like(out))
    return middle - start, time.process_time() - middle, out, gradients


def measure(images: int, regions: int, layout: str, rounds: int) -> dict:
    maps, boxes = scene(images, regions, layout)
    pools = {"ours": ours, "torchvision": partial(theirs, pooler=MultiScaleRoIAlign(list("0123"), BINS, 2))}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pools}
    for turn in range(rounds + 1):  # the first turn warms up
        results = {name: timed(pool, maps, boxes) for name, pool in pools.items()}
        for name, (forward, backward, *_) in results.items():
            times[name] += [(forward, backward)] if turn else []
    pairs = zip(*((found, *gradients) for _, _, found, gradients in results.values()), strict=True)
    row = {"layout": layout, "difference": max(float((a - b).abs().max().detach()) for a, b in pairs)}
    for name, values in times.items():
        row[name] = [statistics.median(part) for part in zip(*values, strict=True)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--regions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = f"{options.images} images, {options.regions} regions"
    print(f"{settings}; median of {options.rounds}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'layout':14} {'':8} {'ours ms':>9} {'torchvision ms':>15} {'speed-up':>9}  largest difference")
    rows = []
    for layout in LAYOUTS:
        rows.append(row := measure(options.images, options.regions, layout, options.rounds))
        for name, mine, other in zip(("forward", "backward"), row["ours"], row["torchvision"], strict=True):
            print(
                f"{layout:14} {name:8} {1000 * mine:9.1f} {1000 * other:15.1f} {other / mine:8.1f}x  "
                f"{row['difference']:.1g}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
