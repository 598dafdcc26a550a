"""What a trained detector is for: `--mode evaluate`, `predict` and `benchmark`, and the gallery of the report."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.io import encode_jpeg
from torchvision.utils import draw_bounding_boxes

from detcore import UserError, backend, checkpoint, cli, distributed, engine, launcher, native, optim
from detcore.data import Batch, synthetic, transforms
from detcore.data.coco import CocoIndex
from detcore.evaluation.coco import evaluate as coco_metrics
from detcore.state import State
from detcore.task import Context, Task
from single_stage_detector.config import Config
from single_stage_detector.data import (
    class_count,
    class_names,
    detect,
    detect_all,
    detector,
    eval_stream,
    open_index,
    train_stream,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
BuildModel = Callable[[Config, int], nn.Module]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program, or of another one that saved a state dictionary.

    Raises UserError for a file that is none, and for weights that are not finite numbers: a model with a NaN in it
    finds nothing, which looks like a result.
    """
    saved = checkpoint.load(path, require_hash=False)
    for name, kind in (("config", dict), ("ema", dict), ("classes", list)):
        if not isinstance(saved.get(name), kind | None):
            raise UserError(f"{path} holds {type(saved[name]).__name__} under {name!r}, not a {kind.__name__}")
    for entry in saved.get("classes") or []:
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str]):
            raise UserError(f"{path} holds {entry!r} among its classes, not the id and the name of a category")
    for source in (saved.get("model", saved), saved.get("ema")):
        for name, value in source.items() if isinstance(source, dict) else ():
            if not isinstance(value, Tensor) or str(name).endswith("num_batches_tracked"):
                continue
            if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
                raise UserError(f"{path}: {name} is of {value.dtype}, {value.layout}: no plain floating point weights")
            if not value.isfinite().all():
                raise UserError(f"{path}: {name} holds NaN or infinite numbers; use the checkpoint of an older epoch")
    return saved


def _no_beat(phase: str, count: int) -> None:
    """For programs that no watchdog looks at."""


def evaluate(config: Config, build_model: BuildModel) -> int:
    """The twelve COCO numbers of a checkpoint on the validation images; all processes of the job share the work.

    Writes evaluation.json into the output folder and prints a table, with the AP of every class.
    """
    world, _ = launcher.discover(os.environ)
    device = engine.open_device(config, world)
    distributed.init(device.collectives, config.hang_timeout or 7 * 24 * 3600, device=device.own)
    try:
        index = open_index(config, "val")
        _same_classes(config.checkpoint, index)
        model = device.place(build_model(config, index.num_classes)).eval()
        start = time.perf_counter()
        find = detector(model, index, device)
        found = detect_all(find, eval_stream(config, index, world, device), device, _no_beat)
        everyone = distributed.gather_rows(found.to(device.exchange))
        if everyone is None:
            return cli.OK
        seconds = time.perf_counter() - start
        result = coco_metrics(index.ground_truth(), everyone.cpu().numpy(), per_class=True)
    finally:
        device.close()
        distributed.shutdown()
    names = class_names(index)
    result["per_class"] = {names[i]: ap for i, ap in result["per_class"].items()}
    print(native.describe(config.program, device.device))
    print(f"{len(index)} images, {len(everyone)} detections, {len(index) / seconds:.1f} images/s")
    print("  ".join(f"{key} {value:.4f}" for key, value in result.items() if key != "per_class"))
    for name, value in sorted(result["per_class"].items(), key=lambda item: -item[1]):
        print(f"  {value:7.4f}  {name}" if value >= 0 else f"        -  {name} (no boxes in the validation set)")
    _write_json(config.output_dir / "evaluation.json", {"checkpoint": str(config.checkpoint), **result})
    return cli.OK


def _same_classes(path: Path, index: CocoIndex) -> None:
    """UserError if the checkpoint knows its classes by other names than the annotation file.

    Ids may differ, as those of one data set do that counts from 0 or from 1.
    """
    then = load_checkpoint(path).get("classes") or []
    now = class_names(index).items()
    for (old_id, old), (new_id, new) in zip(then, now, strict=False):
        if old.removesuffix(f" ({old_id})") != new.removesuffix(f" ({new_id})"):
            raise UserError(
                f"{path} was trained on other classes than {index.annotation_file} lists: {old!r} where this file has "
                f"{new!r}; evaluate it on its own data set"
            )


def predict(config: Config, build_model: BuildModel) -> int:
    """Detections on images that need no annotations.

    Writes predictions/detections.json (COCO format: images, categories, annotations with a score) and a drawn copy of
    each image below the output folder. Images that can't be read are left out, listed at the end, and make the exit
    code BAD_INPUT; if none can be read, UserError, and what an earlier call wrote stays.
    """
    if launcher.discover(os.environ)[0].size > 1:
        raise UserError("--mode predict runs in one process; start it without torchrun or srun")
    device = engine.open_device(config, launcher.World())
    classes = load_checkpoint(config.checkpoint).get("classes")
    if not classes:
        index = open_index(config, "val")  # a checkpoint of another program does not know its classes
        classes = list(class_names(index).items())
    model = device.place(build_model(config, len(classes))).eval()
    paths = _image_paths(config.images)
    folder = config.output_dir / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list] = {
        "images": [],
        "categories": [{"id": i, "name": name} for i, name in classes],
        "annotations": [],
    }
    skipped: list[str] = []
    detected = _detect_files(config, model, paths, device, classes, skipped)
    for number, (path, image, found) in enumerate(detected, 1):
        if number == 1:
            for old in folder.glob("*.jpg"):  # pictures of an earlier call
                old.unlink()
        height, width = image.shape[-2:]
        content["images"].append({"id": number, "file_name": path.name, "width": width, "height": height})
        for x, y, w, h, score, category in found.tolist():
            box = {"image_id": number, "category_id": int(category), "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **box, "score": score})
        drawn = encode_jpeg(draw(image, found, dict(classes)), quality=92)
        (folder / f"{number:05}_{path.stem[:60]}.jpg").write_bytes(drawn.numpy().tobytes())
        print(f"{path}: {len(found)} objects")
    if not content["images"]:
        raise UserError("\n".join(skipped))
    _write_json(folder / "detections.json", content)
    total = len(content["annotations"])
    print(f"{len(content['images'])} images, {total} objects of score {config.score_threshold:g} or more: {folder}")
    if skipped:
        print(f"error: {len(skipped)} of {len(paths)} images left out:\n" + "\n".join(skipped), file=sys.stderr)
        return cli.BAD_INPUT
    return cli.OK


@torch.inference_mode()
def _detect_files(
    config: Config,
    model: nn.Module,
    paths: list[Path],
    device: backend.Backend,
    classes: list,
    skipped: list[str] | None = None,
    read: Callable[[int], np.ndarray] | None = None,
) -> Iterator[tuple[Path, Tensor, Tensor]]:
    """(path, uint8 image [3, h, w], float64 [d, 6] x, y, w, h, score, category_id by falling score) of each file.

    Files that do not decode go to `skipped`; without it they raise UserError. read(n): the bytes of paths[n], where
    they are not those of the file.
    """
    ids = torch.tensor([i for i, _ in classes], device=device.device)
    for number, path in enumerate(paths):
        try:
            data = read(number) if read else transforms.read_bytes(path, number)
            image = transforms.decode(data, path=path, image_id=number)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        resized = transforms.resize(image, config.image_size, flip=False, antialias=config.antialias)
        batch = Batch(
            images=resized.permute(2, 0, 1)[None],
            boxes=torch.zeros(1, 1, 4),
            labels=torch.full((1, 1), -1),
            image_id=torch.tensor([number]),
            size=torch.tensor([image.shape[-2:]]),
        )
        rows = detect(model, device.to_device(batch), device, ids).cpu()
        yield path, image, rows[rows[:, 5] >= max(config.score_threshold, 1e-9)][:, 1:]


def _image_paths(source: Path) -> list[Path]:
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UserError(f"--images {source}: the folder holds no {', '.join(IMAGE_SUFFIXES)} file")
        return paths
    if not source.is_file():
        raise UserError(f"--images {source}: no such file or folder")
    return [source]


def draw(image: Tensor, found: Tensor, names: dict[int, str]) -> Tensor:
    """A copy of a uint8 image [3, h, w] with boxes, class names and scores; found: [d, 6] as `_detect_files` has it."""
    if not len(found):
        return image.clone()
    boxes = torch.cat([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
    order = list(names)
    labels = [f"{names[int(row[5])]} {row[4]:.2f}" for row in found]
    colours = [COLOURS[order.index(int(row[5])) % len(COLOURS)] for row in found]
    return draw_bounding_boxes(image, boxes, labels, colours, width=max(1, image.shape[-1] // 300))


def gallery(config: Config, build_model: BuildModel) -> None:
    """Writes gallery.json and gallery/*.jpg: validation images, their true boxes and what best.pt finds in them."""
    index: CocoIndex = open_index(config, "val")
    classes = list(class_names(index).items())
    device = engine.open_device(config, launcher.World())
    best = Config(**{**vars(config), "checkpoint": config.output_dir / "best.pt", "resume": False, "overwrite": False})
    model = device.place(build_model(best, len(classes))).eval()
    chosen = np.unique(np.linspace(0, len(index) - 1, min(config.gallery, len(index))).round().astype(int)).tolist()
    folder = config.output_dir / "gallery"
    folder.mkdir(exist_ok=True)
    entries = []
    paths = [index.path(i) for i in chosen]
    detected = _detect_files(best, model, paths, device, classes, read=lambda number: index.read(chosen[number]))
    for i, (_, image, found) in zip(chosen, detected):
        name = f"gallery/{len(entries):03}.jpg"
        (config.output_dir / name).write_bytes(encode_jpeg(image, quality=90).numpy().tobytes())
        boxes, labels, _ = index.boxes(i)
        entries.append(
            {
                "image": name,
                "width": image.shape[2],
                "height": image.shape[1],
                "truth": [
                    {"box": box, "label": classes[label][1]}
                    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
                ],
                "detections": [
                    {"box": [x, y, x + w, y + h], "label": dict(classes)[int(category)], "score": score}
                    for x, y, w, h, score, category in found.tolist()
                ],
            }
        )
    _write_json(config.output_dir / "gallery.json", entries)


def benchmark(config: Config, build_task: Callable[[Config, Context], Task]) -> int:
    """Speed of training steps and of inference with post-processing, without and with the data set.

    Prints images/s (all processes together) and the milliseconds of an iteration: median, p90, p95, p99 as percentiles
    of the measured iterations (linear between neighbours), and peak memory. Writes benchmark.json. Each iteration ends
    with a wait for the device.
    """
    world, _ = launcher.discover(os.environ)
    device = engine.open_device(config, world)
    distributed.init(device.collectives, config.hang_timeout or 7 * 24 * 3600, device=device.own)
    try:
        context = Context(device, world, distributed.choose_seed(config.seed, device.exchange))
        torch.manual_seed(context.seed)
        task = build_task(config, context)
        state = State(task.model, task.optimizer, device.scaler(), None)
        parallel = device.parallel(task.model, world.size)
        step = engine.make_train_step(task, state, parallel, config, device)
        optim.set_lr(task.optimizer, config.lr)
        category_ids = torch.arange(class_count(config), device=device.device)
        find = device.compile_inference(lambda batch: detect(task.model, batch, device, category_ids))

        def train(batch: Batch) -> None:
            parallel.train()
            step([device.to_device(batch)])

        @torch.inference_mode()
        def infer(batch: Batch) -> None:
            task.model.eval()
            find(device.to_device(batch))

        shape = (config.image_size, config.batch_size, config.max_boxes)
        fake = device.to_device(next(synthetic.synthetic_batches(class_count(config), *shape, context.seed)))
        results = [
            _measure("training, synthetic", train, _forever(fake), config, config.batch_size, context),
            _measure("inference, synthetic", infer, _forever(fake), config, config.batch_size, context),
        ]
        if not config.synthetic:
            stream = train_stream(config, open_index(config, "train"), context, 0, 0)
            results.append(_measure("training, with data", train, stream, config, config.batch_size, context))
            val = open_index(config, "val")
            images = config.eval_batch_size or config.batch_size
            again = (batch for _ in iter(int, 1) for batch in eval_stream(config, val, world, device))
            results.append(_measure("inference, with data", infer, again, config, images, context))
    finally:
        device.close()
        distributed.shutdown()
    if world.rank == 0:
        print(native.describe(config.program, device.device), f"steps: {device.steps}", sep="\n")
        print(f"{'':22} images/s   median ms      p90      p95      p99   peak GiB")
        for r in results:
            times = "".join(f"{r[key]:9.1f}" for key in ("p90_ms", "p95_ms", "p99_ms"))
            print(f"{r['name']:22} {r['images_per_s']:8.1f}   {r['median_ms']:9.1f}{times}   {r['peak_gib']:8.2f}")
        about = {"environment": device.describe() | {"processes": world.size}}
        _write_json(config.output_dir / "benchmark.json", {**about, "results": results})
    return cli.OK


def _forever(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def _measure(
    name: str,
    run: Callable[[Batch], None],
    batches: Iterator[Batch],
    config: Config,
    images: int,
    context: Context,
) -> dict[str, Any]:
    for _ in range(config.benchmark_warmup):
        run(next(batches))
    context.backend.synchronize()
    times = []
    for _ in range(config.benchmark_iterations):
        start = time.perf_counter()
        run(next(batches))
        context.backend.synchronize()
        times.append(time.perf_counter() - start)
    p90, p95, p99 = (float(p) * 1e3 for p in np.percentile(times, (90, 95, 99)))
    return {
        "name": name,
        "images_per_s": len(times) * images * context.world.size / sum(times),
        "median_ms": statistics.median(times) * 1e3,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99,
        "peak_gib": context.backend.peak_memory_gib(),
        "iterations": len(times),
    }


def _write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)
