"""EfficientDet on the CPU beside PyPI's effdet: labels, loader, training step and inference with post-processing.

    build/effdet/bin/python -m tools.bench.efficientdet [--parts labels loader training inference] [--model
        efficientdet_d0] [--size 512] [--batch 8] [--rounds 3] [--json PATH]

It wants an environment with both; tests/efficientdet/test_effdet.py makes it, build/effdet. All parts have the same
640x480 JPEG files of COCO's mean size and number of boxes; both networks have the same weights. The programs run
alternately in one process, data in the same process too: the table has the medians of the rounds, in wall seconds and
in CPU seconds of all threads.
labels: which box each anchor is to find, and its deltas. loader: JPEG files to uint8 training batches with random
scales. training: forward, labels, losses, backward, clipping, SGD with momentum; theirs gets a float batch, as its own
loader makes it on a GPU from uint8. inference: uint8 batch to 100 detections an image. "from JPEG" decodes as well.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detcore import UserError
from detcore.cli import run_main
from detcore.data import torch_loader
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.torch_loader import Options
from detcore.device import native
from detcore.nn import optim
from detcore.ops.match import match
from efficientdet import data
from efficientdet.config import Config
from efficientdet.loss import MATCH, losses
from efficientdet.model import EfficientDet
from efficientdet.ops.wanted_deltas import wanted_deltas
from efficientdet.weights import load_original_state
from tools.bench.ssd_augment import make

PARTS = ("labels", "loader", "training", "inference")
IMAGES = 64
Run = Callable[[], object]


class Setting:
    """What all parts share: files, configs, both networks, and a batch of each program from the same files."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        torch.manual_seed(0)
        self.batch, self.size = options.batch, (options.size, options.size)
        self.index = make(folder, IMAGES)
        self.config = Config(model=options.model, input_size=options.size, dataset="custom", max_boxes=100)
        self.ours, self.theirs = networks(options.model, self.size)
        self.recipe = data.recipe(self.config)
        self.seen: Batch = next(self.own_training())
        self.seen_by_them = next(self.their_training())

    def own_training(self) -> Iterator[Batch]:
        plan = TrainPlan(self.index, self.recipe, self.batch, self.config.max_boxes, 0)
        return torch_loader.batches(plan, plan.keys(0, 0), Options(antialias=True))

    def own_evaluation(self) -> Iterator[Batch]:
        while True:
            plan = EvalPlan(self.index, self.recipe, self.batch)
            yield from torch_loader.batches(plan, plan.keys(), Options(antialias=True))

    def their_training(self) -> Iterator[tuple[Tensor, dict]]:
        from effdet.data.transforms import transforms_coco_train

        return self._theirs(transforms_coco_train)

    def their_evaluation(self) -> Iterator[tuple[Tensor, dict]]:
        from effdet.data.transforms import transforms_coco_eval

        return self._theirs(transforms_coco_eval)

    def _theirs(self, transforms: Callable) -> Iterator[tuple[Tensor, dict]]:
        from effdet.data.loader import DetectionFastCollate

        how = {"interpolation": "bilinear", "use_prefetcher": True, "fill_color": "mean"}
        images = PillowImages(self.index, transforms(self.size, **how))
        more = {"shuffle": True, "drop_last": True, "collate_fn": DetectionFastCollate()}
        loader = torch.utils.data.DataLoader(images, self.batch, **more)
        while True:
            yield from loader


class PillowImages(torch.utils.data.Dataset):
    """The images as effdet's data set hands them to its transforms."""

    def __init__(self, index: CocoIndex, transform: Callable):
        self.index, self.transform = index, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict]:
        image = Image.open(self.index.path(i)).convert("RGB")
        boxes, labels, _ = self.index.boxes(i)
        truth = {"bbox": np.ascontiguousarray(boxes[:, [1, 0, 3, 2]]), "cls": labels.astype(np.float32) + 1}
        return self.transform(image, {**truth, "img_size": image.size})


def networks(name: str, size: tuple[int, int]) -> tuple[EfficientDet, nn.Module]:
    """Ours and effdet's with the same random weights."""
    from effdet import EfficientDet as Original
    from effdet import get_efficientdet_config

    config = get_efficientdet_config(name)
    config.image_size = list(size)
    theirs = Original(config, pretrained_backbone=False)
    ours = EfficientDet(name, image_size=size)
    load_original_state(ours, {f"model.{key}": value.clone() for key, value in theirs.state_dict().items()})
    return ours, theirs


def normalised(images: Tensor, model: EfficientDet) -> Tensor:
    """As effdet's loader does it on its device."""
    scale = model.pixel_scale.view(1, 3, 1, 1)
    return images.float().sub_(-model.pixel_shift.view(1, 3, 1, 1) / scale).mul_(scale)


def labels(s: Setting) -> dict[str, dict[str, Run]]:
    from effdet.anchors import AnchorLabeler, Anchors

    labeler = AnchorLabeler(Anchors.from_config(s.theirs.config), s.theirs.config.num_classes, match_threshold=0.5)
    boxes, classes = s.seen.boxes, s.seen.labels
    theirs = [row[known >= 0][:, [1, 0, 3, 2]] for row, known in zip(boxes, classes, strict=True)]
    wanted = [row[row >= 0] + 1 for row in classes]

    def ours() -> Tensor:
        matched = match(s.ours.anchors, boxes, classes, **MATCH)
        return wanted_deltas(s.ours.anchors, boxes, matched)

    positives = [int((match(s.ours.anchors, boxes, classes, **MATCH) >= 0).sum())]
    positives.append(int(labeler.batch_label_anchors(theirs, wanted)[2].sum()))
    print(f"labels: {positives[0]} positive anchors of ours, {positives[1]} of effdet's")
    return {"labels": {"ours": ours, "effdet": lambda: labeler.batch_label_anchors(theirs, wanted)}}


def loader(s: Setting) -> dict[str, dict[str, Run]]:
    ours, theirs = s.own_training(), s.their_training()
    return {"loader": {"ours": lambda: next(ours), "effdet": lambda: next(theirs)}}


def training(s: Setting) -> dict[str, dict[str, Run]]:
    from effdet import DetBenchTrain

    bench = DetBenchTrain(s.theirs)

    def their_losses(images: Tensor, target: dict) -> Tensor:
        return bench(normalised(images, s.ours), target)["loss"]

    def our_losses(batch: Batch) -> Tensor:
        return sum(losses(s.ours(batch.images), s.ours.anchors, batch.boxes, batch.labels).values())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable, get: Callable) -> Tensor:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        value = loss(*get())
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return value

    sides = {"ours": (s.ours, our_losses), "effdet": (s.theirs, their_losses)}
    steps = {
        name: partial(step, model, optim.sgd(model, 1e-5, 0.9, 4e-5, fused=False), loss)
        for name, (model, loss) in sides.items()
    }
    ours, theirs = s.own_training(), s.their_training()
    images, target = s.seen_by_them
    fixed = {"ours": lambda: (s.seen,), "effdet": lambda: (images, target)}
    decoded = {"ours": lambda: (next(ours),), "effdet": lambda: next(theirs)}
    return {
        "training": {name: partial(steps[name], get) for name, get in fixed.items()},
        "training from JPEG": {name: partial(steps[name], get) for name, get in decoded.items()},
    }


def inference(s: Setting) -> dict[str, dict[str, Run]]:
    from effdet import DetBenchPredict

    bench = DetBenchPredict(s.theirs)

    @torch.inference_mode()
    def ours(get: Callable[[], Batch]) -> Tensor:
        return data.infer(s.ours.eval(), get(), lambda: torch.autocast("cpu", enabled=False))[1]

    @torch.inference_mode()
    def theirs(get: Callable[[], tuple[Tensor, dict]]) -> Tensor:
        images, target = get()
        sizes = {"img_scale": target["img_scale"], "img_size": target["img_size"]}
        return bench.eval()(normalised(images, s.ours), sizes)[..., 4]

    own, other = s.own_evaluation(), s.their_evaluation()
    batch, images = next(own), next(other)
    return {
        "inference": {"ours": lambda: ours(lambda: batch), "effdet": lambda: theirs(lambda: images)},
        "inference from JPEG": {"ours": lambda: ours(lambda: next(own)), "effdet": lambda: theirs(lambda: next(other))},
    }


def measure(runs: dict[str, Run], rounds: int, least_s: float = 0.5) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of a call, by program; each round takes as many calls as fill least_s."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            start, cpu, calls = time.perf_counter(), time.process_time(), 0
            while not calls or (turn and time.perf_counter() - start < least_s):
                run()
                calls += 1
            spent = time.perf_counter() - start, time.process_time() - cpu
            if turn:
                found[name].append((spent[0] / calls, spent[1] / calls))
    return {
        name: {"wall_s": statistics.median(w for w, _ in times), "cpu_s": statistics.median(c for _, c in times)}
        for name, times in found.items()
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="efficientdet_d0")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not find_spec("effdet"):
        raise UserError(
            "effdet is not in this environment: run tests/efficientdet/test_effdet.py once (make test-slow), then this "
            "with build/effdet/bin/python"
        )
    rows = []
    computed_by = native.describe("efficientdet", torch.device("cpu"))
    print(f"{options.model}, {options.size} pixels, batch {options.batch}, {torch.get_num_threads()} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {computed_by}")
    with tempfile.TemporaryDirectory(prefix="bench_efficientdet_") as folder:
        setting = Setting(options, Path(folder))
        made = {"labels": labels, "loader": loader, "training": training, "inference": inference}
        parts = itertools.chain.from_iterable(made[name](setting).items() for name in options.parts)
        print(f"{'':20} {'ours ms':>9} {'effdet ms':>10} {'speed-up':>9} {'in CPU time':>12} {'ours images/CPU-s':>18}")
        for what, runs in parts:
            row = measure(runs, options.rounds)
            wall, cpu = (row["effdet"][key] / row["ours"][key] for key in ("wall_s", "cpu_s"))
            rate = options.batch / row["ours"]["cpu_s"]
            print(
                f"{what:20} {1e3 * row['ours']['wall_s']:9.1f} {1e3 * row['effdet']['wall_s']:10.1f} {wall:8.2f}x "
                f"{cpu:11.2f}x {rate:18.1f}",
                flush=True,
            )
            rows.append({"what": what, **row, "speedup": wall, "speedup_cpu": cpu})
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
