"""RetinaNet's post-processing against torchvision's, on the same logits: 8 images, 800x800, 264 classes.

    python tools/bench_postprocess.py [--images 8] [--image-size 800] [--classes 264] [--rounds 5] [--json PATH]

Two cases: "busy" logits have thousands of pairs above the score threshold in every image (an early epoch);
"calm" ones have a few hundred (a trained model). The two implementations run alternately in one process; the table
gives the median. Their results are compared as well.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def baseline(image_size: tuple[int, int], classes: int):
    """torchvision's own post-processing, without the network around it."""
    model = TorchvisionRetinaNet.__new__(TorchvisionRetinaNet)
    nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates = 0.05, 0.5, 300, 1000
    from torchvision.models.detection._utils import BoxCoder

    model.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    lengths = [9 * rows * columns for rows, columns in grids(image_size)]

    def run(logits: Tensor, deltas: Tensor, a: Tensor):
        heads = {"cls_logits": list(logits.split(lengths, 1)), "bbox_regression": list(deltas.split(lengths, 1))}
        per_image = [list(a.split(lengths))] * len(logits)
        return model.postprocess_detections(heads, per_image, [image_size] * len(logits))

    return run


def differences(ours: tuple[Tensor, Tensor, Tensor], theirs: list[dict[str, Tensor]]) -> float:
    """Largest difference between the sorted scores of the two results."""
    worst = 0.0
    for scores, result in zip(ours[1], theirs, strict=True):
        padded = nn.functional.pad(result["scores"], (0, len(scores) - len(result["scores"])))
        worst = max(worst, float((scores - padded).abs().max()))
    return worst


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=800)
    parser.add_argument("--classes", type=int, default=264)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = (options.image_size, options.image_size)
    a = anchors(size, grids(size))
    torchvision_run = baseline(size, options.classes)
    rows = []
    for case, objects, spread in (("busy", 60, 4.0), ("calm", 8, 16.0)):
        logits, deltas = outputs(options.images, a, options.classes, objects, spread, seed=1)
        candidates = (logits.sigmoid() > 0.05).sum(dim=(1, 2)).float().mean()
        times: dict[str, list[float]] = {"ours": [], "torchvision": []}
        for turn in range(options.rounds + 1):  # the first turn warms up
            start = time.perf_counter()
            ours = postprocess(logits, deltas, a, size)
            middle = time.perf_counter()
            theirs = torchvision_run(logits, deltas, a)
            end = time.perf_counter()
            if turn:
                times["ours"].append(middle - start)
                times["torchvision"].append(end - middle)
        row = {name: statistics.median(values) for name, values in times.items()}
        row |= {"case": case, "candidates": float(candidates), "difference": differences(ours, theirs)}
        row["detections"] = float((ours[2] >= 0).sum() / options.images)
        rows.append(row | {"speedup": row["torchvision"] / row["ours"]})
    shape = f"{options.images} images, {options.image_size} pixels, {options.classes} classes"
    print(f"{shape}; median of {options.rounds}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{'case':6} {'pairs > .05':>11} {'kept':>6} {'ours ms':>9} {'torchvision ms':>15} {'speed-up':>9} {'diff':>8}"
    )
    for row in rows:
        ours, theirs = 1000 * row["ours"], 1000 * row["torchvision"]
        print(
            f"{row['case']:6} {row['candidates']:11.0f} {row['detections']:6.0f} {ours:9.1f} {theirs:15.1f} "
            f"{row['speedup']:8.1f}x {row['difference']:8.1g}"
        )
    if options.json:
        options.json.write_text(json.dumps({"settings": shape, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
