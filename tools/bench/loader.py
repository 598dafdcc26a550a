"""JPEG files to uint8 800x800 batches with boxes: our loader against Pillow and DALI, on the CPU and on a GPU.

Each makes training batches of the same generated 1024x768 files, all in this process, alternately; the number is
images per second of CPU time, children and threads included. "pillow" takes the steps of the reference recipe: decode,
mirror, to float tensor, normalise, bilinear resize of that tensor. "pillow, uint8" resizes with Pillow instead and
delivers what ours does. Where torch sees a GPU, the loaders that decode there come last, one batch ahead as in
training; for them images/s counts, and nothing trains beside them here.
Usage: python -m tools.bench.loader [--images 128] [--rounds 5] [--json PATH]
"""

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detcore import UserError
from detcore.data import dali, nvjpeg, torch_loader
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.plan import TrainPlan
from detcore.data.recipes import stretch
from detcore.data.torch_loader import Options
from detcore.device.select import select_backend

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make(folder: Path, images: int) -> CocoIndex:
    """Photograph-like noise: coarse, middle and fine grain; about 180 KB a file."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "thing"}]}
    for number in range(images):
        pixels = np.zeros((768, 1024, 3))
        for grain, weight in ((64, 0.6), (8, 0.3), (2, 0.1)):
            small = Image.fromarray(rng.integers(0, 256, (768 // grain, 1024 // grain, 3), np.uint8))
            pixels += weight * np.asarray(small.resize((1024, 768), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=90)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 768, "width": 1024})
        for _ in range(12):
            x, y, w, h = rng.uniform(10, 300, 4)
            box = {"id": len(content["annotations"]), "image_id": number, "category_id": 0, "bbox": [x, y, w, h]}
            content["annotations"].append(box)
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoIndex.open(folder / "annotations.json", folder / "images")


def pillow_batch(plan: TrainPlan, step: int, size: tuple[int, int], uint8: bool) -> Batch:
    """One batch as a loader on Pillow makes it; float32 and normalised unless uint8."""
    choice = plan.choose(0, step)
    images, flips = choice.images, choice.view.mirrored
    pixels = []
    for i, flip in zip(images.tolist(), flips.tolist()):
        image = Image.open(plan.index.path(i)).convert("RGB")
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if uint8:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            continue
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        tensor = (tensor - MEAN) / DEVIATION
        pixels.append(torch.nn.functional.interpolate(tensor[None], size=size, mode="bilinear")[0])
    return Batch(images=torch.stack(pixels), **plan.targets(choice))


def on_gpu(plan: TrainPlan, with_dali: bool) -> dict[str, Callable]:
    """The loaders that decode on the GPU, with four threads."""
    gpu = select_backend("cuda", "bf16")
    modules = {"nvjpeg": nvjpeg} | ({"DALI GPU": dali} if with_dali else {})
    options = Options(workers=4, device=gpu.device)
    streams = {name: lambda by=by: by.batches(plan, plan.keys(0, 0), options) for name, by in modules.items()}
    return {name: lambda stream=stream: gpu.prefetch(stream()) for name, stream in streams.items()}


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 800))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, steps = tuple(args.size), args.images // args.batch_size
    with tempfile.TemporaryDirectory(prefix="bench_loader_") as folder:
        index = make(Path(folder), args.images)
        plan = TrainPlan(index, stretch(size), args.batch_size, max_boxes=20, seed=0)
        pillow, pillow_uint8 = (
            (lambda uint8=uint8: (pillow_batch(plan, step, size, uint8) for step in itertools.cycle(range(steps))))
            for uint8 in (False, True)
        )
        loaders: dict[str, Callable] = {
            "ours": lambda: torch_loader.batches(plan, plan.keys(0, 0), Options()),
            "ours, antialias": lambda: torch_loader.batches(plan, plan.keys(0, 0), Options(antialias=True)),
            "pillow": pillow,
            "pillow, uint8": pillow_uint8,
            "DALI CPU": lambda: dali.batches(plan, plan.keys(0, 0), Options(workers=1)),
        }
        try:
            loaders["DALI CPU"]()
        except UserError as error:
            print(f"without DALI: {error}")
            del loaders["DALI CPU"]
        if torch.cuda.is_available():
            loaders |= on_gpu(plan, with_dali="DALI CPU" in loaders)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, start in loaders.items():
                batches = iter(start())
                next(batches)
                begin, wall = cpu_seconds(), time.perf_counter()
                for _ in itertools.islice(batches, steps):
                    pass
                count = steps * args.batch_size
                results[name].append((count / (cpu_seconds() - begin), count / (time.perf_counter() - wall)))
                batches.close()
    rows = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
    print(f"{'':18}{'images/CPU-s':>14}{'images/s':>10}{'ours is':>9}   1024x768 -> {size[1]}x{size[0]}")
    for name, (per_cpu, per_second) in rows.items():
        print(f"{name:18}{per_cpu:14.1f}{per_second:10.1f}{rows['ours'][0] / per_cpu:8.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"median": rows, "rounds": results}, indent=1))


if __name__ == "__main__":
    main()
