"""What a trained detector is for: `--mode evaluate`, `predict` and the gallery of the report.

A benchmark brings its `Detector` and build_model(config, number of classes) -> model on the CPU.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.io import encode_jpeg

from detcore import UserError, cli
from detcore.data import files, torch_loader, transforms
from detcore.data.batch import whole_images
from detcore.data.classes import differing_classes, some
from detcore.data.coco import CocoIndex
from detcore.data.image_names import IMAGE_SUFFIXES
from detcore.data.recipes import Recipe
from detcore.detection import detector as detection
from detcore.detection import speed
from detcore.detection.config import DetectionConfig
from detcore.detection.detections import Detections, Detector, finished, gathered
from detcore.detection.detector import class_names, classes_of_data, open_index, open_val
from detcore.detection.drawing import draw
from detcore.device import native
from detcore.device.base import Backend
from detcore.evaluation.coco import evaluate as coco_metrics
from detcore.evaluation.rle import Rles
from detcore.processes import launcher
from detcore.processes.launcher import World
from detcore.training import engine
from detcore.training.checkpoint import load_checkpoint
from detcore.training.progress import Meter

BuildModel = Callable[[Any, int], nn.Module]


def evaluate(
    config: DetectionConfig, detector: Detector, build_model: BuildModel, results: Path | None = None,
    score: bool = True, batches: int = 0, report: Callable[[dict[str, float]], None] = lambda speed: None,
    processes: tuple[World, Backend] | None = None,
) -> int:  # fmt: skip
    """The COCO numbers of a checkpoint on the validation images, of proposals their average recall; all processes of
    the job share the work.

    Writes evaluation.json into the output folder and prints a table, with the AP of every class. results: file that
    gets all detections as COCO results; without a suffix a folder, with bbox.json and, of masks, segm.json. score:
    False spares the numbers, and measures the latency of a batch. batches: of each process at most, for a look at part
    of the images, which spares the numbers too; 0: all. report: gets on rank 0 what was measured: images, seconds and
    images_per_s of all processes; without numbers also those of `speed.latencies`, of rank 0's batches but the first
    --benchmark-warmup ones. processes: as `engine.joined` has them, for one evaluation after another.
    """
    if processes is None:
        with engine.joined(config) as processes:
            return evaluate(config, detector, build_model, results, score, batches, report, processes)
    world, device = processes
    score = score and not batches
    times: list[float] | None = None if score else []
    index = open_val(detector, config)
    _same_classes(config, index)
    model = device.place(build_model(config, index.num_classes)).eval()
    start = time.perf_counter()
    images = detection.eval_batch_size(detector, config, model, index, world, device)
    infer = detection.compiled_detect(detector, model, index.category_ids.tolist(), device)
    stream = detection.eval_stream(detector, config, index, world, device, images)
    share = min(-(-len(index) // world.size), batches * images or len(index))
    source = config.checkpoint or config.weights
    with _Watched(f"{index.annotation_file.name}, with {source}", share, images, world.rank == 0) as watched:
        found = detection.detect_all(infer, islice(stream, batches or None), device, watched.beat, times)
    everyone = gathered(found, detector.masks(config), device.collective_device)
    if everyone is None:
        return cli.OK
    seconds = time.perf_counter() - start
    result = _scored(detector, config, index, everyone) if score else None
    if results and results.suffix:
        write_json(results, coco_results(everyone))
    elif results:
        write_json(results / "bbox.json", coco_results(everyone._replace(masks=None)))
        if everyone.masks:
            write_json(
                results / "segm.json", [{k: v for k, v in one.items() if k != "bbox"} for one in coco_results(everyone)]
            )
    count = len(everyone.rows)
    seen = min(len(index), batches * images * world.size) if batches else len(index)
    measured = {"images": seen, "seconds": seconds, "images_per_s": seen / seconds}
    if not score:
        print(f"{seen} images, {count} detections, {seen / seconds:.1f} images/s")
        found = speed.latencies(times[min(config.benchmark_warmup, len(times) - 1) :])
        print(f"a batch of {images} a process, without decoding:\n{speed.HEADER}\n{speed.row(found)}")
        report(measured | found)
        return cli.OK
    result = detection.metrics_of(detector, config, result, class_names(index))
    print(native.describe(config.program, device.device))
    print(f"{seen} images, {count} detections, {seen / seconds:.1f} images/s")
    print("  ".join(f"{key} {value:.4f}" for key, value in result.items() if key != "per_class"))
    for name, value in sorted(result["per_class"].items(), key=lambda item: -item[1]):
        print(f"  {value:7.4f}  {name}" if value >= 0 else f"        -  {name} (no boxes in the validation set)")
    write_json(config.output_dir / "evaluation.json", {"checkpoint": str(source), **result})
    report(measured)
    return cli.OK


class _Watched:
    """A `Beat` that shows on rank 0's console how far the evaluation is. share: images of this process."""

    def __init__(self, what: str, share: int, batch: int, shown: bool):
        self.share, self.batch = share, batch
        self.meter = Meter(f"evaluating {what}, images", share) if shown else None
        if shown:
            print(f"evaluating {what}: {share:,} images a process, {batch} at a time", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.meter and kind is None:
            self.meter.add(self.share - self.meter.done)
            self.meter.close()

    def beat(self, phase: str, count: int) -> None:
        if self.meter:
            self.meter.add(min(count * self.batch, self.share) - self.meter.done)


def _scored(detector: Detector, config: DetectionConfig, index: CocoIndex, found: Detections) -> dict[str, Any]:
    """The numbers of `detcore.evaluation.coco.evaluate`: with masks where the detector has them, or of proposals."""
    rows, masks = detection.counted(detector, config, index, found)
    pair = (index.masks(), masks) if masks else None
    return coco_metrics(
        index.ground_truth(), rows.numpy(), per_class=True, masks=pair, proposals=detector.proposals(config)
    )


def coco_results(found: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's format of results: those of boxes, with a segmentation where there are masks."""
    results: list[dict[str, Any]] = [
        {"image_id": int(image), "category_id": int(category), "bbox": [x, y, w, h], "score": score}
        for image, x, y, w, h, score, category in found.rows.tolist()
    ]
    for result, mask in zip(results, _segmentations(found.masks), strict=False):
        result["segmentation"] = mask
    return results


def _segmentations(masks: Rles | None) -> list[dict[str, Any]]:
    """COCO's RLE as JSON has it, with text for letters; none without masks."""
    return [{**one, "counts": one["counts"].decode()} for one in masks.dictionaries()] if masks else []


def _same_classes(config: DetectionConfig, index: CocoIndex) -> None:
    """UserError if the checkpoint, where there is one, knows other classes than the annotation file."""
    path = config.checkpoint
    known = (path and load_checkpoint(path).get("classes")) or []
    differ = differing_classes(known, list(class_names(index).items()))
    if differ and config.num_classes not in (0, len(known)):
        raise UserError(f"--num-classes {config.num_classes}: {path} knows {len(known)} classes; leave the option out")
    if differ:
        raise UserError(
            f"{path} was trained on other classes than {index.annotation_file} lists: {some(differ)}. Evaluate it on "
            "its own data set, or put the names right in the annotation file"
        )


def predict(
    config: DetectionConfig,
    detector: Detector,
    build_model: BuildModel,
    known: Callable[[dict[str, Any]], list[tuple[int, str]]] = lambda saved: [],
) -> int:
    """Detections on images that need no annotations.

    known: (category id, name) of the classes of a checkpoint that does not list them as this program's do; empty if it
    can't tell, then the validation annotations are read.

    Writes predictions/detections.json (COCO format: images, categories, annotations with a score) and a drawn copy of
    each image below the output folder. Images that can't be read are left out, listed at the end, and make the exit
    code BAD_INPUT; if none can be read, UserError, and what an earlier call wrote stays.
    """
    if launcher.discover(os.environ)[0].size > 1:
        raise UserError("--mode predict runs in one process; start it without torchrun or srun")
    device = engine.open_device(config, launcher.World())
    saved = load_checkpoint(config.checkpoint, config.program) if config.checkpoint else {}
    classes = saved.get("classes") or known(saved)
    if not classes:
        classes = classes_of_data(config, config.checkpoint or config.weights)
    model = device.place(build_model(config, len(classes))).eval()
    folder = config.output_dir / "predictions"
    paths, others = image_paths(config.images, folder)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list] = {
        "images": [],
        "categories": [{"id": i, "name": name} for i, name in classes],
        "annotations": [],
    }
    skipped: list[str] = []
    turned: dict[Path, str] = {}

    def read(number: int) -> Tensor:
        path = paths[number]
        data = files.read_bytes(path, None)
        image = transforms.decode(data, path=path, image_id=None, turn=config.exif)
        if orientation := transforms.orientation_of(data):
            done = "turned upright, as" if config.exif != "ignore" else "as stored, not turned as"
            turned[path] = f" ({done} its EXIF orientation {orientation} says)"
        return image

    detected = _detect_files(config, detector, model, paths, device, classes, read, skipped)
    top = config.images if config.images.is_dir() else config.images.parent
    for number, (path, image, found) in enumerate(detected, 1):
        if number == 1:
            for old in folder.glob("*.jpg"):  # pictures of an earlier call
                old.unlink()
        height, width = image.shape[-2:]
        content["images"].append(
            {"id": number, "file_name": str(path.relative_to(top)), "width": width, "height": height}
        )
        for one in coco_results(found):
            w, h = one["bbox"][2:]
            area = int(coco_mask.area(one["segmentation"])) if found.masks else w * h
            more = {"id": len(content["annotations"]) + 1, "image_id": number, "area": area, "iscrowd": 0}
            content["annotations"].append(one | more)
        drawn = encode_jpeg(draw(image, found.rows[:, 1:], dict(classes), found.masks, zoom=None), quality=92)
        (folder / f"{number:05}_{path.stem[:60]}.jpg").write_bytes(drawn.numpy().tobytes())
        print(f"{path}: {len(found.rows)} objects{turned.get(path, '')}")
    if not content["images"]:
        raise UserError("\n".join(skipped))
    write_json(folder / "detections.json", content)
    total = len(content["annotations"])
    print(f"{len(content['images'])} images, {total} objects of score {config.score_threshold:g} or more: {folder}")
    if others:
        print(f"{others} other files in {config.images} are no images by their names ({', '.join(IMAGE_SUFFIXES)})")
    if skipped:
        print(f"error: {len(skipped)} of {len(paths)} images left out:\n" + "\n".join(skipped), file=sys.stderr)
        return cli.BAD_INPUT
    return cli.OK


@torch.no_grad()
def _detect_files(
    config: DetectionConfig,
    detector: Detector,
    model: nn.Module,
    paths: list[Path],
    device: Backend,
    classes: list,
    read: Callable[[int], Tensor],
    skipped: list[str] | None = None,
) -> Iterator[tuple[Path, Tensor, Detections]]:
    """(path, uint8 image [3, h, w], what is found of at least --score-threshold, as `look`) of each file.

    read(n): the image of paths[n]. Where it raises UserError, that goes to `skipped`; without it, further up.
    """
    ids = torch.tensor([i for i, _ in classes], device=device.device)
    for number, path in enumerate(paths):
        try:
            image = read(number)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        yield path, image, look(config, detector, model, image, device, ids, config.score_threshold)


@torch.no_grad()  # not every device can make views of tensors of inference mode
def look(
    config: DetectionConfig,
    detector: Detector,
    model: nn.Module,
    image: Tensor,
    device: Backend,
    category_ids: Tensor,
    least: float = 0.0,
) -> Detections:
    """What the model finds in a uint8 image [3, h, w]: by falling score, in pixels of the image.

    least: the lowest score of what counts. ValueError for a recipe's view that can't be scaled back: `View.scorable`.
    """
    recipe, size = detector.recipe(config).of_evaluation, np.array([image.shape[-2:]])
    view = (recipe.predict_view or recipe.eval_view)(size, _canvas(recipe, size)).scorable()
    left, top, right, bottom = view.windows[0].tolist()
    batch = whole_images(
        images=torch_loader.render(image, view, 0, config.antialias).permute(2, 0, 1)[None],
        boxes=torch.zeros(1, 1, 4),
        labels=torch.full((1, 1), -1),
        image_id=torch.tensor([0]),
        size=torch.tensor([[bottom - top, right - left]]),
    )._replace(extent=torch.from_numpy(view.extents))
    found = detection.detect(detector, model, device.to_device(batch), device, category_ids)
    moved = torch.tensor([0, left, top, 0, 0, 0, 0], dtype=torch.float64)
    if not isinstance(found, Tensor):  # masks lie in the whole image, also where only a part of it is looked at
        corner = torch.tensor([left, top] * 2, dtype=torch.float32, device=device.device)
        whole = torch.tensor(image.shape[-2:], device=device.device).expand_as(found["sizes"])
        found |= {"boxes": found["boxes"] + corner, "sizes": whole}
    rows, masks = finished(found, np.nextafter(least, -1) if least else 0.0)
    return Detections(rows + moved, masks)


def _canvas(recipe: Recipe, size: np.ndarray) -> tuple[int, int]:
    """The canvas of one image of int64 [1, 2] height and width."""
    return recipe.canvases[int(recipe.canvas_of(size)[0]) if recipe.canvas_of else 0]


def image_paths(source: Path, without: Path) -> tuple[list[Path], int]:
    """The images that --images means: a file, or all in a folder and the folders in it; and how many other files lie
    there.

    without: a folder that is left out, where pictures are written. Hidden files and folders are left out, too. Raises
    UserError where there are none.
    """
    if not source.is_dir():
        if not source.is_file():
            raise UserError(f"--images {source}: no such file or folder")
        return [source], 0
    files = []
    for place, folders, names in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _same(Path(place, f), without))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(f"--images {source}: the folder and those in it hold no {', '.join(IMAGE_SUFFIXES)} file")
    return paths, len(files) - len(paths)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def gallery(config: DetectionConfig, detector: Detector, build_model: BuildModel) -> None:
    """Writes gallery.json and gallery/*.jpg: validation images, their true boxes and what best.pt finds in them."""
    index: CocoIndex = open_index(config, "val")
    classes = list(class_names(index).items())
    device = engine.open_device(config, launcher.World())
    found = config.output_dir / "best.pt"
    best = dataclasses.replace(config, checkpoint=found, resume=False, overwrite=False)
    model = device.place(build_model(best, len(classes))).eval()
    chosen = np.unique(np.linspace(0, len(index) - 1, min(config.gallery, len(index))).round().astype(int)).tolist()
    folder = config.output_dir / "gallery"
    folder.mkdir(exist_ok=True)
    entries = []
    paths = [index.path(i) for i in chosen]

    def read(number: int) -> Tensor:
        i = chosen[number]
        about = {"path": paths[number], "image_id": int(index.image_ids[i]), "turn": config.exif}
        return transforms.decode(index.read(i), size=(int(index.heights[i]), int(index.widths[i])), **about)

    detected = _detect_files(best, detector, model, paths, device, classes, read)
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
                    for _, x, y, w, h, score, category in found.rows.tolist()
                ],
            }
        )
    write_json(config.output_dir / "gallery.json", entries)


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)
