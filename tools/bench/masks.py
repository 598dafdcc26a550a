"""Masks: targets of regions, pasting and encoding of detections, and AP of masks, each against what others do.

    python -m tools.bench.masks [--rounds 5] [--threads 1] [--device cpu] [--images 200] [--json PATH]

Targets: 128 regions in each of 4 images of 16 objects (polygons of 30 points), 28 x 28 pixels. Baselines: the
original's steps for each region (crop, resize, pycocotools' frPyObjects, merge and decode), and torchvision's
project_masks_on_boxes, which takes bitmaps and crops them. Pasting: 100 detections in an image of 480 x 640, against
the original's loop (interpolate, draw, encode). AP: both kinds of --images images with 7 objects and 100 detections
each, hotcoco against pycocotools, which sums the areas of the masks, too: ours come with them from pasting. --threads
holds for all that can use several, torch and hotcoco. Ours and the baselines run alternately; the table gives medians.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from detcore.device import native
from detcore.evaluation.coco import METRICS, SEGM_METRICS, GroundTruth, evaluate
from detcore.evaluation.rle import Rles
from detcore.ops.mask_targets import mask_targets
from detcore.ops.paste import paste, paste_reference

IMAGES, OBJECTS, REGIONS, SIDE = 4, 16, 128, 28
HEIGHT, WIDTH = 480, 640
SPAN = 0.1  # seconds


def scene(seed: int) -> tuple[list[list[np.ndarray]], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Polygons [30, 2] of each image's objects, and the arguments of `mask_targets`: regions near their boxes."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 31)[:-1]
    polygons, edges, regions, of = [], [], [], []
    for _ in range(IMAGES):
        radius = rng.uniform(10, 90, (OBJECTS, 1)) * rng.uniform(0.8, 1.2, (OBJECTS, len(angles)))
        centre = rng.uniform(0, 1, (OBJECTS, 1, 2)) * [WIDTH, HEIGHT]
        points = (centre + radius[..., None] * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32)
        owner = rng.integers(0, OBJECTS, REGIONS)
        box = np.concatenate([points.min(1), points.max(1)], 1)[owner]
        regions.append(box + rng.normal(0, 0.1, box.shape) * np.tile(box[:, 2:] - box[:, :2], 2))
        edges.append(np.concatenate([points, np.roll(points, -1, 1)], 2).reshape(-1, 4))
        polygons.append(list(points))
        of.append(owner)
    edge_of = np.stack([np.repeat(np.arange(OBJECTS), len(angles)), np.zeros(OBJECTS * len(angles), int)], 1)
    given = np.stack(edges), np.tile(edge_of, (IMAGES, 1, 1)), np.stack(regions).astype(np.float32), np.stack(of)
    return polygons, tuple(torch.from_numpy(part) for part in given)


def targets_of_coco(polygons: list[list[np.ndarray]], regions: Tensor, box_of: Tensor) -> np.ndarray:
    """The original's steps: for each region crop, resize, then pycocotools."""
    found = []
    for own, places, owners in zip(polygons, regions.numpy(), box_of.tolist(), strict=True):
        for region, k in zip(places, owners, strict=True):
            ratio = SIDE / np.maximum(region[2:] - region[:2], 1)
            moved = ((own[k] - region[:2]) * ratio).astype(np.float64)
            rles = coco_mask.frPyObjects([moved.ravel().tolist()], SIDE, SIDE)
            found.append(coco_mask.decode(coco_mask.merge(rles)))
    return np.stack(found)


def blobs(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities [count, side, side] with a soft rim, and boxes [count, 4] in an image."""
    random = torch.Generator().manual_seed(seed)
    at = torch.linspace(-1, 1, side)
    radius = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=random)
    masks = torch.sigmoid((radius - (at**2 + at[:, None] ** 2).sqrt()) * 12)
    size = torch.rand(count, 2, generator=random) ** 2 * 250 + 15
    corner = torch.rand(count, 2, generator=random) * (torch.tensor([WIDTH, HEIGHT]) - size).clamp(min=0)
    return masks, torch.cat([corner, corner + size], 1)


def annotated(images: int) -> tuple[GroundTruth, np.ndarray, tuple[Rles, Rles]]:
    """Ground truth of 7 objects an image and 100 detections, half of them close to one, of 20 classes; their masks."""
    rng = np.random.default_rng(0)
    true, found = 7 * images, 100 * images
    masks, boxes = blobs(true, SIDE, 1)
    source = np.repeat(np.arange(images) * 7, 100) + rng.integers(0, 7, found)
    close = rng.random(found) < 0.5
    other, places = blobs(found, SIDE, 2)
    places[close] = boxes[source[close]] + torch.from_numpy(rng.normal(0, 3, (int(close.sum()), 4))).float()
    size = torch.tensor([[HEIGHT, WIDTH]])
    rles = paste(masks, boxes, size.repeat(true, 1)), paste(other, places, size.repeat(found, 1))
    category = rng.integers(1, 21, true)
    area = np.array([coco_mask.area(one) for one in rles[0].dictionaries()], float)
    corners = boxes.double().numpy()
    bbox = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    crowd = (rng.random(true) < 0.02).astype(np.uint8)
    truth = GroundTruth(np.arange(images), np.arange(1, 21), np.arange(true) // 7, category, bbox, area, crowd)
    place = places.double().numpy()
    columns = np.arange(found) // 100, place[:, :2], place[:, 2:] - place[:, :2], rng.random(found), category[source]
    return truth, np.column_stack(columns), rles


def race(rounds: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds of each, run in turn; a turn is at least SPAN long, or a disturbance would be all of it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds = time.perf_counter() - start
            if turn:
                times[name].append(1e3 * seconds / calls[name])
            else:  # the first warms up
                calls[name] = max(1, math.ceil(SPAN / seconds))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the targets")
    parser.add_argument("--images", type=int, default=200, help="of the AP")
    parser.add_argument("--json", type=Path, help="write the measurements there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # hotcoco's, read at its first call
    print(f"{native.describe('detcore', torch.device(options.device))}; threads: {options.threads}")

    polygons, given = scene(0)
    there = tuple(part.to(options.device) for part in given)
    bitmaps = [
        torch.from_numpy(np.stack([coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(
            [one.ravel().tolist()], HEIGHT, WIDTH))) for one in own]))
        for own in polygons
    ]  # fmt: skip
    assert np.array_equal(mask_targets(*there, SIDE).cpu().flatten(0, 1).numpy(), targets_of_coco(polygons, *given[2:]))
    results = {
        "targets of 512 regions": race(
            options.rounds,
            ours=lambda: mask_targets(*there, SIDE).cpu(),
            pycocotools=lambda: targets_of_coco(polygons, *given[2:]),
            torchvision=lambda: [project_masks_on_boxes(*own, SIDE) for own in zip(bitmaps, *given[2:], strict=True)],
        )
    }
    masks, boxes = blobs(100, SIDE, 0)
    sizes = torch.tensor([[HEIGHT, WIDTH]]).repeat(100, 1)
    assert paste(masks, boxes, sizes).dictionaries() == paste_reference(masks, boxes, sizes).dictionaries()
    results["100 masks pasted and encoded"] = race(
        options.rounds,
        ours=lambda: paste(masks, boxes, sizes).dictionaries(),
        original=lambda: paste_reference(masks, boxes, sizes).dictionaries(),
    )
    truth, rows, rles = annotated(options.images)
    ours, theirs = (evaluate(truth, rows, backend=name, masks=rles) for name in ("hotcoco", "pycocotools"))
    assert max(abs(ours[name] - theirs[name]) for name in (*METRICS, *SEGM_METRICS)) < 1e-9
    results[f"AP of boxes and masks, {options.images} images"] = race(
        1,
        ours=lambda: evaluate(truth, rows, backend="hotcoco", masks=rles),
        pycocotools=lambda: evaluate(truth, rows, backend="pycocotools", masks=rles),
    )
    print(f"segm AP {ours['segm_AP']:.4f}, the same from both to 1e-9\n\n{'median ms':44}")
    for name, found in results.items():
        print(f"{name:40}" + "".join(f"  {who} {ms:.2f} ({ms / found['ours']:.1f}x)" for who, ms in found.items()))
    if options.json:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": None}, "ms": results}, indent=1))


if __name__ == "__main__":
    main()
