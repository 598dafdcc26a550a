"""SSD300's decoding and suppression against the original's loop over images and classes: batch 32, 81 classes.

    python -m tools.bench.ssd_postprocess [--images 32] [--classes 80] [--rounds 5] [--ops auto] [--json PATH]

Three cases: "trained" logits are sure of the background but near 8 objects an image; "early" ones have 20 objects and
are unsure; "random" ones are independent normal numbers, like those of a network that has learnt nothing. The baseline
writes plainly what the original does: softmax and decoding of everything, then for each image and class a mask, a
sort, and suppression box by box. The two run alternately in one process; the table gives the medians. Their results
are compared as well.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from detcore.boxes import iou
from detcore.device import native
from ssd300.anchors import corners, decode, encode, priors
from ssd300.postprocess import postprocess

CASES = {"trained": (8, 6.0, 0.7), "early": (20, 4.0, 1.5), "random": (0, 0.0, 0.6)}
"""Objects an image, how fast the response falls with the distance from an object, and noise of the logits."""


def outputs(images: int, classes: int, case: str, seed: int) -> tuple[Tensor, Tensor]:
    """(deltas, logits) of a case; in each image the priors near an object fire for its class and point to it."""
    objects, fall, noise = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    table = priors()
    logits = torch.randn(images, len(table), classes + 1, generator=generator) * noise
    deltas = torch.randn(images, len(table), 4, generator=generator) * 0.5
    logits[..., 0] += 7 if objects else 0
    for image in range(images):
        for _ in range(objects):
            size = 0.07 * 13 ** torch.rand(2, generator=generator)
            box = torch.cat((torch.rand(2, generator=generator), size))
            far = ((table[:, :2] - box[:2]) / size).norm(dim=1) + (table[:, 2:] / size).log().norm(dim=1)
            label = 1 + int(torch.randint(classes, (1,), generator=generator))
            logits[image, :, label] += (10 - fall * far).clamp(min=0)
            deltas[image] = torch.where(far[:, None] < 1, encode(box, table) + 0.2 * deltas[image], deltas[image])
    return deltas, logits


def loop_over_image(boxes: Tensor, scores: Tensor, nms_thresh: float, detections: int, per_class: int = 200) -> tuple:
    """One image, class by class and box by box: boxes [P, 4] and scores [P, K + 1] -> (boxes, scores, labels)."""
    kept_boxes, kept_scores, kept_labels = [], [], []
    for label in range(1, scores.shape[1]):
        score = scores[:, label]
        mask = score > 0.05
        candidates, score = boxes[mask], score[mask]
        if len(score) == 0:
            continue
        order = score.sort(0).indices[-per_class:]
        chosen = []
        while len(order):
            best = int(order[-1])
            chosen.append(best)
            overlap = iou(candidates[order], candidates[best : best + 1])[:, 0]
            order = order[overlap < nms_thresh]
        kept_boxes.append(candidates[chosen])
        kept_scores.append(score[chosen])
        kept_labels += [label - 1] * len(chosen)
    if not kept_boxes:
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    every, labels = torch.cat(kept_scores), torch.tensor(kept_labels)
    best = every.sort(0, descending=True).indices[:detections]
    return torch.cat(kept_boxes)[best], every[best], labels[best]


def baseline(deltas: Tensor, logits: Tensor, nms_thresh: float = 0.5, detections: int = 200) -> list[tuple]:
    """(boxes in pixels, scores, labels) of every image."""
    boxes = corners(decode(deltas, priors()))
    scores = logits.softmax(2)
    results = []
    for image in range(len(boxes)):
        found, *others = loop_over_image(boxes[image], scores[image], nms_thresh, detections)
        results.append((found * 300, *others))
    return results


def differences(ours: tuple[Tensor, Tensor, Tensor], theirs: list[tuple]) -> tuple[int, float]:
    """How many detections only one side has, and the largest difference between boxes of the others, in pixels.

    Detections are the same if label, score and box are, to within 0.01; those of equal score may change places.
    """
    alone, worst = 0, 0.0
    for boxes, scores, labels, (their_boxes, their_scores, their_labels) in zip(*ours, theirs, strict=True):
        count = int((labels >= 0).sum())
        own = torch.cat((labels[:count, None], 100 * scores[:count, None], boxes[:count]), 1)
        other = torch.cat((their_labels[:, None], 100 * their_scores[:, None], their_boxes), 1)
        distance = (own[:, None] - other[None]).abs().amax(2)
        same = distance <= 0.01
        alone += int((~same.any(1)).sum() + (~same.any(0)).sum())
        worst = max([worst, *distance[same].tolist()])
    return alone, worst


def measure(images: int, classes: int, case: str, rounds: int) -> dict:
    deltas, logits = outputs(images, classes, case, seed=1)
    table = priors()
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for turn in range(rounds + 1):  # the first turn warms up
        start = time.perf_counter()
        ours = postprocess((deltas, logits), table)
        middle = time.perf_counter()
        theirs = baseline(deltas, logits)
        end = time.perf_counter()
        if turn:
            times["ours"].append(middle - start)
            times["loop"].append(end - middle)
    row = {name: statistics.median(values) for name, values in times.items()} | {"case": case}
    row["pairs"] = float((logits.softmax(2)[..., 1:] > 0.05).sum() / images)
    row["kept"] = float((ours[2] >= 0).sum() / images)
    row["alone"], row["difference"] = differences(ours, theirs)
    return row | {"speedup": row["loop"] / row["ours"]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ops", choices=native.POLICIES, default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    native.choose(options.ops)
    rows = []
    settings = f"{options.images} images, {options.classes} classes, ops {options.ops}"
    print(f"{settings}; median of {options.rounds}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'case':8} {'pairs > .05':>11} {'kept':>5} {'ours ms':>9} {'loop ms':>9} {'speed-up':>9}  differences")
    for case in options.cases:
        rows.append(row := measure(options.images, options.classes, case, options.rounds))
        print(
            f"{row['case']:8} {row['pairs']:11.0f} {row['kept']:5.0f} {1000 * row['ours']:9.1f} "
            f"{1000 * row['loop']:9.1f} {row['speedup']:8.1f}x  {row['alone']} alone, {row['difference']:.1g} pixels",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
