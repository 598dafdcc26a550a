"""JPEG files to SSD300's augmented 300x300 batches with boxes: our loader against Pillow and DALI on the CPU.

All make training batches of the same generated 640x480 files of COCO's mean size (160 KB) and number of boxes (7), in
this process, alternately; the number is images per second of CPU time, threads included, the median of the rounds.
"Pillow" is the original's description as published, one image after the other: `original_crop`, mirror, resize,
torchvision's ColorJitter, to float tensor, normalise. "Pillow, uint8" leaves out the last two steps, as ours does.
Usage: python -m tools.bench.ssd_augment [--images 128] [--rounds 5] [--json PATH]
"""

import argparse
import itertools
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from detcore import UserError
from detcore.data import dali, torch_loader
from detcore.data.augment import Augment
from detcore.data.coco import CocoIndex
from detcore.data.plan import TrainPlan
from detcore.data.recipes import ssd_crop, stretch
from detcore.data.torch_loader import Options

WIDTH, HEIGHT, SIZE = 640, 480, 300
OPTIONS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
JITTER = transforms.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
TO_TENSOR = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)


def original_crop(boxes: np.ndarray, draw: random.Random) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The SSD crop as the original describes it, try after try.

    boxes: float64 [n, 4] x1, y1, x2, y2 as parts of the image. Returns the window in the same units, the kept boxes
    clipped and as parts of the window, and bool [n] which were kept.
    """
    while True:
        option = draw.choice(OPTIONS)
        if option is None:
            return [0.0, 0.0, 1.0, 1.0], boxes, np.ones(len(boxes), bool)
        w, h = draw.uniform(0.3, 1), draw.uniform(0.3, 1)
        if w / h < 0.5 or w / h > 2:
            continue
        left, top = draw.uniform(0, 1 - w), draw.uniform(0, 1 - h)
        window = np.array([left, top, left + w, top + h])
        shared = (np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])).clip(0).prod(1)
        iou = shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + w * h - shared)
        if not (iou > option).all():
            continue
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centre > window[:2]) & (centre < window[2:])).all(1)
        if not inside.any():
            continue
        kept = np.clip(boxes[inside], window[[0, 1, 0, 1]], window[[2, 3, 2, 3]])
        return window.tolist(), (kept - window[[0, 1, 0, 1]]) / [w, h, w, h], inside


def original_image(image: Image.Image, boxes: np.ndarray, draw: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Crop, mirror, resize and colours in the published order for Pillow; boxes in and out as parts of the image."""
    window, boxes, _ = original_crop(boxes, draw)
    sides = (image.width, image.height) * 2
    image = image.crop([int(edge * side) for edge, side in zip(window, sides)])
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    return JITTER(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)), boxes


def pillow_batches(plan: TrainPlan, uint8: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The plan's images, with draws of their own, float32 and normalised unless uint8."""
    draw = random.Random(0)
    for key in plan.keys(0, 0):
        choice, pixels = plan.choose(*key), []
        boxes = torch.zeros(plan.batch_size, plan.max_boxes, 4)
        for row, i in enumerate(choice.images.tolist()):
            image = Image.open(plan.index.path(i)).convert("RGB")
            truth = plan.index.boxes(i)[0] / [image.width, image.height, image.width, image.height]
            image, kept = original_image(image, truth, draw)
            boxes[row, : len(kept)] = torch.from_numpy(kept)
            pixels.append(torch.from_numpy(np.array(image)) if uint8 else TO_TENSOR(image))
        yield torch.stack(pixels), boxes


def make(folder: Path, images: int) -> CocoIndex:
    """Photograph-like noise: coarse, middle and fine grain; boxes of about COCO's mix of sizes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "thing"}]}
    for number in range(images):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        for grain, weight in ((64, 0.6), (8, 0.3), (2, 0.1)):
            small = Image.fromarray(rng.integers(0, 256, (HEIGHT // grain + 1, WIDTH // grain, 3), np.uint8))
            pixels += weight * np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=96)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        for _ in range(rng.poisson(7)):
            w, h = np.exp(rng.uniform(np.log(0.03), np.log(0.9), 2)) * (WIDTH, HEIGHT)
            x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
            box = {"id": len(content["annotations"]), "image_id": number, "category_id": 0, "bbox": [x, y, w, h]}
            content["annotations"].append(box)
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoIndex.open(folder / "annotations.json", folder / "images")


def cpu_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def measure(loaders: dict[str, Callable[[], Iterator]], steps: int, count: int, rounds: int) -> dict[str, list]:
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, start in loaders.items():
            batches = start()
            next(batches)
            begin, wall = cpu_seconds(), time.perf_counter()
            for _ in itertools.islice(batches, steps):
                pass
            results[name].append((count / (cpu_seconds() - begin), count / (time.perf_counter() - wall)))
            batches.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # ColorJitter's
    steps = args.images // args.batch_size
    with tempfile.TemporaryDirectory(prefix="bench_ssd_augment_") as folder:
        index = make(Path(folder), args.images)
        shared = {"batch_size": args.batch_size, "max_boxes": 40, "seed": 0}
        plan = TrainPlan(index, ssd_crop((SIZE, SIZE), Augment()), **shared)
        plain = TrainPlan(index, stretch((SIZE, SIZE)), **shared)
        options = Options(antialias=True)
        loaders: dict[str, Callable[[], Iterator]] = {
            "ours": lambda: torch_loader.batches(plan, plan.keys(0, 0), options),
            "Pillow": lambda: pillow_batches(plain, uint8=False),
            "Pillow, uint8": lambda: pillow_batches(plain, uint8=True),
            "DALI CPU": lambda: dali.batches(plan, plan.keys(0, 0), options._replace(workers=1)),
        }
        try:
            loaders["DALI CPU"]()
        except UserError as error:
            print(f"without DALI: {error}")
            del loaders["DALI CPU"]
        size = sum(index.path(i).stat().st_size for i in range(len(index))) / len(index)
        results = measure(loaders, steps, steps * args.batch_size, args.rounds)
    rows = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
    print(f"{'':18}{'images/CPU-s':>14}{'images/s':>10}{'ours is':>9}   {WIDTH}x{HEIGHT}, {size / 1000:.0f} KB a file")
    for name, (per_cpu, per_second) in rows.items():
        print(f"{name:18}{per_cpu:14.1f}{per_second:10.1f}{rows['ours'][0] / per_cpu:8.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"median": rows, "rounds": results}, indent=1))


if __name__ == "__main__":
    main()
