"""RetinaNet's post-processing against torchvision's, on the same logits: 8 images, 800x800, 264 classes.

    python -m tools.bench.postprocess [--images 8] [--image-size 800] [--classes 264] [--rounds 5] [--json PATH]
                                      [--dtype float32|bfloat16|float16] [--device cpu|cuda]

Two cases: "busy" logits have thousands of pairs above the score threshold in every image (an early epoch);
"calm" ones have a few hundred (a trained model). The native ops, their PyTorch references and torchvision run
alternately in one process; the table gives the medians. Their results are compared as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from detcore.device import native
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.postprocess import postprocess


def outputs(images: int, a: Tensor, classes: int, objects: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits around the prior bias with noise, and `objects` regions an image whose anchors fire for one class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, len(a), classes, generator=generator).mul_(0.6).sub_(6.0)
    deltas = torch.randn(images, len(a), 4, generator=generator) * 0.1
    side = float(a[:, 2:].max())
    for image in range(images):
        for _ in range(objects):
            centre = torch.rand(2, generator=generator) * side
            size = 16 * 2 ** (5 * torch.rand(1, generator=generator))
            middle = (a[:, :2] + a[:, 2:]) / 2
            scale = ((a[:, 2:] - a[:, :2]).prod(1).sqrt() / size).log().abs()
            far = ((middle - centre) / size).norm(dim=1) + scale
            hot = (7.0 - spread * far).clamp(min=0)
            label = int(torch.randint(classes, (1,), generator=generator))
            logits[image, :, label] += hot
    return logits, deltas


def split(image_size: tuple[int, int], *wholes: Tensor) -> list[list[Tensor]]:
    """Each of the tensors [N, A, ...] as a list over the levels."""
    lengths = [9 * rows * columns for rows, columns in grids(image_size)]
    return [[level.contiguous() for level in whole.split(lengths, 1)] for whole in wholes]


def baseline(image_size: tuple[int, int], classes: int):
    """torchvision's own post-processing, without the network around it."""
    model = TorchvisionRetinaNet.__new__(TorchvisionRetinaNet)
    nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates = 0.05, 0.5, 300, 1000
    from torchvision.models.detection._utils import BoxCoder

    model.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def run(logits: list[Tensor], deltas: list[Tensor], a: Tensor):
        images = len(logits[0])
        levels = [a[0] for a in split(image_size, a[None])[0]]
        heads = {"cls_logits": logits, "bbox_regression": deltas}
        return model.postprocess_detections(heads, [levels] * images, [image_size] * images)

    return run


def differences(ours: tuple[Tensor, Tensor, Tensor], theirs: list[dict[str, Tensor]]) -> float:
    """Largest difference between the sorted scores of the two results."""
    worst = 0.0
    for scores, result in zip(ours[1], theirs, strict=True):
        padded = nn.functional.pad(result["scores"], (0, len(scores) - len(result["scores"])))
        worst = max(worst, float((scores - padded).abs().max()))
    return worst


def seconds(run: Callable, device: str) -> tuple[float, Any]:
    """Time of one call, and its result."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def measure(options: argparse.Namespace, case: str, objects: int, spread: float) -> dict[str, Any]:
    """One row of the table: the medians, and how far the results are apart."""
    size = (options.image_size, options.image_size)
    a = anchors(size, grids(size))
    logits, deltas = outputs(options.images, a, options.classes, objects, spread, seed=1)
    candidates = (logits.sigmoid() > 0.05).sum(dim=(1, 2)).float().mean()
    dtype = getattr(torch, options.dtype)
    logits, deltas = split(size, logits.to(options.device, dtype), deltas.to(options.device, dtype))
    a = a.to(options.device)

    def ours(policy: str) -> tuple[Tensor, Tensor, Tensor]:
        with native.using(policy):
            return postprocess(logits, deltas, a, size)

    torchvision_run = baseline(size, options.classes)
    runs: dict[str, Callable] = {
        "native": lambda: ours("native"),
        "reference": lambda: ours("reference"),
        "torchvision": lambda: torchvision_run(logits, deltas, a),
    }
    if missing := native.load("single_stage_detector"):
        print(missing)
        del runs["native"]
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for turn in range(options.rounds + 1):  # the first turn warms up
        for name, run in runs.items():
            taken, results[name] = seconds(run, options.device)
            times[name] += [taken] * (turn > 0)
    row: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    best = next(iter(runs))
    row |= {"case": case, "candidates": float(candidates), "speedup": row["torchvision"] / row[best]}
    row["difference"] = max(
        differences(results[name], results["torchvision"]) for name in runs if name != "torchvision"
    )
    row["detections"] = float((results[best][2] >= 0).sum() / options.images)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=800)
    parser.add_argument("--classes", type=int, default=264)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(options, *case) for case in (("busy", 60, 4.0), ("calm", 8, 16.0))]
    shape = f"{options.images} images, {options.image_size} pixels, {options.classes} classes, {options.dtype}"
    print(f"{shape}; median of {options.rounds}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    names = [name for name in ("native", "reference", "torchvision") if name in rows[0]]
    heads = "".join(f"{name + ' ms':>15}" for name in names)
    print(f"{'case':6} {'pairs > .05':>11} {'kept':>6}{heads} {'speed-up':>9} {'diff':>8}")
    for row in rows:
        times = "".join(f"{1000 * row[name]:15.1f}" for name in names)
        print(
            f"{row['case']:6} {row['candidates']:11.0f} {row['detections']:6.0f}{times} "
            f"{row['speedup']:8.1f}x {row['difference']:8.1g}"
        )
    if options.json:
        options.json.write_text(json.dumps({"settings": shape, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
