"""What all detectors do with their data: open it, stream it, and come from a model to its COCO metrics.

A benchmark brings a `Detector`.
"""

import math
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detcore import UserError
from detcore.data import classes, coco_json, nvjpeg, segmentations, signs, synthetic, torch_loader
from detcore.data.batch import Batch, whole_images
from detcore.data.coco import CocoIndex
from detcore.data.joined import JoinedIndex, refuse_other_categories
from detcore.data.pace import Pace
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.shards import ReadAhead
from detcore.detection.config import DetectionConfig
from detcore.detection.detections import Detections, Detector, compiled_detect, detect, detect_all, gathered
from detcore.device.base import MAX_IN_FLIGHT, Backend
from detcore.evaluation.background import BackgroundEvaluator
from detcore.nn.widest import widest
from detcore.processes import distributed
from detcore.processes.distributed import World
from detcore.training.task import Beat, Context, Data, Pending

LARGEST_EVAL_BATCH = 128  # images; a larger one only takes memory
SYNTHETIC_EDGES = 4096  # of an image's masks, where there are no annotations to count them in
LARGEST_TENSOR = 2**31 - 1  # elements; with more a GPU's convolutions may refuse, or take slower ways


def open_index(config: DetectionConfig, split: str, masks: str | None = None) -> CocoIndex | JoinedIndex:
    """The index of "val", or of "train", which may be joined from several sets. masks: as `CocoIndex.open` has it.

    Raises UserError if its classes are not those that the layout must have, or those of the model.
    """
    if split == "val":
        return _open_set(config, *config.split(split), masks)
    sets = [_open_set(config, *places, masks) for places in config.train_sets()]
    return JoinedIndex(sets) if len(sets) > 1 else sets[0]


def open_train(detector: Detector, config: DetectionConfig) -> CocoIndex | JoinedIndex:
    """The index of the training images, with the edges of masks if the detector trains them."""
    return open_index(config, "train", segmentations.EDGES if detector.masks(config) else None)


def open_val(detector: Detector, config: DetectionConfig) -> CocoIndex:
    """The index of the validation images, with masks to score against if the detector finds some."""
    return open_index(config, "val", segmentations.RLE if detector.masks(config) else None)


def _open_set(config: DetectionConfig, annotations: Path, images: Path, masks: str | None) -> CocoIndex:
    layout = config.layout
    exact = layout.classes if layout.contiguous else None
    more = {"cache_dir": config.cache_dir, "expected_classes": exact, "masks": masks}
    index = CocoIndex.open(annotations, images, **more)
    if layout.classes not in (None, index.num_classes):
        raise UserError(
            f"{annotations}: {index.num_classes} categories, but --dataset {config.dataset} has {layout.classes}; "
            "--dataset custom takes any number"
        )
    if config.class_ids:
        return index.with_classes(config.class_ids)
    return index.with_classes(range(config.num_classes)) if config.num_classes > index.num_classes else index


def class_count(detector: Detector, config: DetectionConfig) -> int:
    """Number of classes of the model: its own, the layout's, or counted in the training JSON of a custom data set.

    Raises UserError if --num-classes says a smaller number.
    """
    known = len(config.class_ids or ()) or config.layout.classes
    if config.synthetic:
        return config.num_classes or known or detector.classes
    count = known or open_train(detector, config).num_classes
    fixed = config.class_ids is not None
    if config.num_classes and (config.num_classes < count or (fixed and config.num_classes > count)):
        raise UserError(
            f"--num-classes {config.num_classes}: the data set {config.dataset} has {count} classes; leave the option "
            f"out, or give {'' if fixed else 'at least '}{count}"
        )
    return max(count, config.num_classes)


def examples(detector: Detector, config: DetectionConfig, classes: int, seed: int) -> list[Batch]:
    """A batch of random images, boxes and masks for each canvas of the detector, of the shapes of training."""
    shape = (config.batch_size, config.max_boxes, seed, _edge_places(detector, config))
    canvases = detector.recipe(config).canvases
    return [next(synthetic.synthetic_batches(classes, canvas, *shape)) for canvas in canvases]


def _edge_places(detector: Detector, config: DetectionConfig) -> int:
    """To how many edges the masks of an image are padded in training; 0 without masks."""
    if not detector.masks(config) or config.max_edges:
        return config.max_edges if detector.masks(config) else 0
    return SYNTHETIC_EDGES if config.synthetic else open_train(detector, config).most_edges(config.layout.crowd)


def train_plan(
    detector: Detector, config: DetectionConfig, index: CocoIndex | JoinedIndex, context: Context
) -> TrainPlan:
    """This rank's plan of training batches."""
    world = context.world
    shard = (config.batch_size, config.max_boxes, context.seed, world.rank, world.size, config.drop_last)
    edges = config.max_edges if detector.masks(config) else 0
    return TrainPlan(index, detector.recipe(config), *shard, config.layout.crowd, edges)


def train_stream(
    config: DetectionConfig, plan: TrainPlan, backend: Backend, epoch: int, step: int, pace: Pace | None = None
) -> Iterator[Batch]:
    """The loader's endless stream of training batches from a position on. pace: told how long each part takes."""
    return _loader(config)(plan, plan.keys(epoch, step), _options(config, backend)._replace(pace=pace))


def eval_stream(
    detector: Detector, config: DetectionConfig, index: CocoIndex, world: World, backend: Backend, batch_size: int = 0
) -> Iterator[Batch]:
    """This rank's batches of one pass over an index. batch_size: 0, the config's."""
    size = batch_size or config.eval_batch_size or config.batch_size
    plan = EvalPlan(index, detector.recipe(config).of_evaluation, size, world.rank, world.size)
    return _loader(config)(plan, plan.keys(), _options(config, backend))


def _loader(config: DetectionConfig) -> Callable[..., Iterator[Batch]]:
    """What makes the batches of a plan."""
    if config.loader == "dali":
        from detcore.data import dali

        return dali.batches
    return nvjpeg.batches if config.loader == "nvjpeg" else torch_loader.batches


def _options(config: DetectionConfig, backend: Backend) -> torch_loader.Options:
    return torch_loader.Options(config.workers, backend.loader_device, config.antialias, turn=config.exif)


def eval_batch_size(
    detector: Detector, config: DetectionConfig, model: nn.Module, index: CocoIndex, world: World, backend: Backend
) -> int:
    """Images of an evaluation batch, the same on every rank: those of the config, or as many as a GPU has memory for.

    These are the training batch doubled while it fits, up to 128, to the images that a rank has, and to tensors of 2^31
    elements. All ranks call it.
    """
    limit = min(LARGEST_EVAL_BATCH, -(-len(index) // world.size))
    return _largest_eval_batch(detector, config, model, index.num_classes, limit, backend)


def _largest_eval_batch(
    detector: Detector, config: DetectionConfig, model: nn.Module, classes: int, limit: int, backend: Backend
) -> int:
    if config.eval_batch_size:
        return config.eval_batch_size
    if backend.recorder and not backend.records_steps:
        return config.batch_size  # a recording keeps its memory, and the steps have theirs still to find
    ids = torch.zeros(classes, dtype=torch.int64, device=backend.device)
    largest = max(detector.recipe(config).of_evaluation.canvases, key=math.prod)

    @torch.inference_mode()
    def try_batch(images: int) -> None:
        # As many as are under way at a time: used, fetched, and those that the host is ahead of the device.
        batches = [backend.to_device(_blank_batch(largest, images)) for _ in range(MAX_IN_FLIGHT + 2)]
        detect(detector, model, batches[0], backend, ids)

    if backend.probes_batch_size:
        limit = min(limit, LARGEST_TENSOR // widest(model, largest, backend))
    fits = backend.largest_batch(try_batch, config.batch_size, limit)
    return -distributed.all_reduce_max([-fits], backend.collective_device)[0]


def _blank_batch(canvas: tuple[int, int], images: int) -> Batch:
    """An evaluation batch of zeros."""
    pixels = torch.zeros(images, *canvas, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes, labels = torch.zeros(images, 1, 4), torch.full((images, 1), -1)
    return whole_images(pixels, boxes, labels, torch.arange(images), torch.ones(images, 2, dtype=torch.int64))


def counted(detector: Detector, config: DetectionConfig, index: CocoIndex, found: Detections) -> Detections:
    """The detections that the metrics are made of."""
    if detector.scores_empty(config):
        return found
    kept = np.isin(found.rows[:, 0].numpy(), index.image_ids[index.box_count() > 0])
    return Detections(found.rows[torch.from_numpy(kept)], found.masks and found.masks.take(kept))


class Inference:
    """What the evaluations of a run share: the size of a batch, and the function that finds objects in one.

    `prepare` makes both before RUN_START, without any data; else the first evaluation does.
    """

    def __init__(self, detector: Detector, config: DetectionConfig, context: Context):
        self.detector, self.config, self.context = detector, config, context
        self.images = 0  # of a batch
        self._compiled: dict[nn.Module, tuple[Tensor, Callable[[Batch], Any]]] = {}

    def prepare(self, model: nn.Module, classes: int) -> None:
        """Finds the size and warms inference up, recorded where the device records. Changes nothing of the model."""
        backend = self.context.backend
        if self.config.synthetic or not (backend.warms_up or backend.recorder):
            return
        model.eval()
        with torch.inference_mode():
            limit = LARGEST_EVAL_BATCH
            self.images = _largest_eval_batch(self.detector, self.config, model, classes, limit, backend)
            for canvas in self.detector.recipe(self.config).of_evaluation.canvases:
                self._detect(model, classes)[1](backend.to_device(_blank_batch(canvas, self.images)))
        model.train()

    def evaluate(self, model: nn.Module, val: CocoIndex, beat: Beat) -> Detections:
        """This rank's detections. All ranks call it."""
        world, backend = self.context.world, self.context.backend
        ids, infer = self._detect(model, val.num_classes)
        ids.copy_(torch.tensor(val.category_ids.tolist()))
        share = -(-len(val) // world.size)
        too_large = self.images > max(share, self.config.batch_size) and not self.config.eval_batch_size
        if not self.images or too_large:
            self.images = eval_batch_size(self.detector, self.config, model, val, world, backend)
        stream = eval_stream(self.detector, self.config, val, world, backend, self.images)
        return detect_all(infer, stream, backend, beat)

    def _detect(self, model: nn.Module, classes: int) -> tuple[Tensor, Callable[[Batch], Any]]:
        """The categories' ids, int64 [classes], which a recording reads where they lie, and the function."""
        if model not in self._compiled:
            backend = self.context.backend
            with torch.inference_mode(False):
                ids = torch.zeros(classes, dtype=torch.int64, device=backend.device)
            self._compiled[model] = ids, compiled_detect(self.detector, model, ids, backend)
        return self._compiled[model]


def open_data(
    detector: Detector, config: DetectionConfig, context: Context, inference: Inference | None = None
) -> Data:
    """Opens the data set for training: indexes, loader, and the evaluator's own process on rank 0.

    inference: prepared before, or made here.
    """
    if config.synthetic:
        return _synthetic(detector, config, context)
    world = context.world
    train, val = open_train(detector, config), open_val(detector, config)
    refuse_other_categories(_parts(train)[0], val, "training and validation")
    signs.check_training([(str(part.annotation_file), part.signs) for part in _parts(train)], config.layout.crowd)
    plan = train_plan(detector, config, train, context)
    per_rank = plan.steps
    steps = -(-per_rank // config.accumulate)  # the last of an epoch takes the micro-batches that are left
    if config.max_iters_per_epoch:
        steps = min(steps, config.max_iters_per_epoch)
    micro_batches = min(per_rank, steps * config.accumulate)
    given = {"masks": val.masks(), "proposals": detector.proposals(config)}
    evaluator = BackgroundEvaluator(val.ground_truth(), **given) if world.rank == 0 else None
    names = class_names(val)
    pace = _pace(config, context, train)
    packs = [index.shards for index in (*_parts(train), val) if index.shards]
    ahead = ReadAhead(packs, world.local_rank, world.local_size) if config.read_ahead and packs else None

    def train_batches(epoch: int, step: int) -> Iterator[Batch]:
        if micro_batches == per_rank:
            yield from train_stream(config, plan, context.backend, epoch, step, pace)
        while True:  # an epoch ends before the loader's: go on with the next one from its beginning
            stream = train_stream(config, plan, context.backend, epoch, step, pace)
            yield from islice(stream, micro_batches - step)
            epoch, step = epoch + 1, 0

    inference = inference or Inference(detector, config, context)

    def evaluate(model: nn.Module, beat: Beat) -> Pending | None:
        mine = inference.evaluate(model, val, beat)
        everyone = gathered(mine, detector.masks(config), context.backend.collective_device)
        if not evaluator:
            return None
        rows, masks = counted(detector, config, val, everyone)
        pending = evaluator.submit(rows.numpy(), per_class=True, masks=masks)
        return _Metrics(pending, lambda result: metrics_of(detector, config, result, names))

    def close() -> None:
        for part in (ahead, evaluator):
            if part:
                part.close()

    summary = f"training: {train.summary(config.layout.crowd)}\nvalidation: {val.summary()}"
    if not val.signs["scored"]:
        summary += f"\nWarning: {val.annotation_file} has nothing to score, no box that counts: no mAP can be computed."
    return Data(
        train_samples=len(train),
        eval_samples=len(val),
        steps_per_epoch=steps,
        micro_batches=micro_batches,
        train_batches=train_batches,
        evaluate=evaluate,
        close=close,
        classes=tuple(names.items()),
        summary=f"{summary}\n{ahead.words}" if ahead else summary,
        advise=pace.words,
    )


def _parts(index: CocoIndex | JoinedIndex) -> tuple[CocoIndex, ...]:
    return index.parts if isinstance(index, JoinedIndex) else (index,)


def _pace(config: DetectionConfig, context: Context, index: CocoIndex | JoinedIndex) -> Pace:
    """The clocks of the training loader, and what its advice has to know."""
    world, by_processes = context.world, config.loader == "torch"
    more = "--loader dali or --loader nvjpeg decodes on the GPU instead" if context.backend.decodes_images else ""
    workers = (
        torch_loader.usable_workers(config.workers) if by_processes else 1
    )  # the others' threads are measured as one
    sharded = all(part.shards is not None for part in _parts(index))
    return Pace(workers, world.size, world.local_size, sharded, config.loader, more)


def class_names(index: CocoIndex) -> dict[int, str]:
    """Name by the file's category id; classes that share a name are told apart by their ids."""
    return classes.class_names(index.category_ids.tolist(), index.category_names)


def classes_of_data(config: DetectionConfig, source: Path | str) -> list[tuple[int, str]]:
    """(category id, name) of the model's classes by the validation annotations alone, whose images need not be there.

    source: the weights of another program, which do not name them. Raises UserError where the file can't be read, or
    lists a category that is none of the model's.
    """
    file, _ = config.split("val")
    try:
        parsed = coco_json.parse(file)
    except OSError as error:
        raise UserError(
            f"{file}: cannot read the annotation file ({error.strerror}); the names of the classes come from it, since "
            f"{source} has none: give --dataset-path FOLDER, or --val-annotations-file FILE with its categories"
        ) from error
    own = dict(zip(parsed.columns["category_ids"].tolist(), parsed.category_names, strict=True))
    ids = config.class_ids or (range(config.num_classes) if config.num_classes > len(own) else list(own))
    if unknown := [i for i in own if i not in ids]:
        raise UserError(
            f"{file}: category {unknown[0]} is none of the {len(ids)} classes of this model, {ids[0]} to {ids[-1]}; "
            f"give --val-annotations-file FILE with the categories of {source}"
        )
    print(f"{source} does not name its classes; the names are those of {file}")
    return list(classes.class_names(ids, [own.get(i, str(i)) for i in ids]).items())


def metrics_of(
    detector: Detector, config: DetectionConfig, result: dict[str, Any], names: dict[int, str]
) -> dict[str, Any]:
    """What is logged of an evaluator's result: its metrics and the detector's own, with class names for ids."""
    metrics = dict(result)
    by_iou, per_class = metrics.pop("per_class_by_iou"), metrics.pop("per_class")
    own = detector.extra_metrics(config, by_iou)
    return {**metrics, **own, "per_class": {names[i]: ap for i, ap in per_class.items()}}


class _Metrics:
    """A pending result of which a function makes the metrics once it is there."""

    def __init__(self, pending: Pending, metrics: Callable[[dict[str, Any]], dict[str, Any]]):
        self.pending, self.metrics = pending, metrics

    def poll(self) -> dict[str, Any] | None:
        result = self.pending.poll()
        return None if result is None else self.metrics(result)


def _synthetic(detector: Detector, config: DetectionConfig, context: Context) -> Data:
    """Random batches of the real shapes: what a step costs without any data behind it."""
    seed = distributed.derive_seed(context.seed, 2, context.world.rank)
    return Data(
        train_samples=0,
        eval_samples=0,
        steps_per_epoch=config.max_iters_per_epoch or 100,
        train_batches=lambda epoch, step: cycle(examples(detector, config, class_count(detector, config), seed)),
        evaluate=lambda model, beat: None,
        close=lambda: None,
        summary="synthetic data: random images and boxes, no evaluation"
        + (f"; --loader {config.loader} is not used, there is nothing to decode" if config.loader != "torch" else ""),
    )
