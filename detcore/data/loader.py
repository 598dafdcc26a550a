"""Batches from image files, decoded in worker processes: an endless stream to train on, one pass to evaluate.

What a batch holds follows from (seed, epoch, step, rank, world size) and nothing else. The order of an epoch is the
permutation drawn from (seed, epoch); whether an image is mirrored, and all else that is drawn for it, is a hash of
(seed, epoch, position in the file).
Each worker makes whole micro-batches, so any number of workers, and a start at any step, give the same batches.

Micro-batch s of rank r takes positions (s * world + r) * batch_size onwards of the permutation: the ranks share an
epoch without overlap. `drop_last` leaves out the images that do not fill a micro-batch on every rank, others each
epoch; without it the last micro-batches are filled from the beginning of the same permutation.

Workers come from a fork server: a plain fork would copy a process with device contexts and communication threads,
whose locks may be held at that moment, and its signal handlers. They block SIGINT, SIGTERM and SIGUSR1, sent to
whole process groups: the training process decides when to end, and its workers end with it.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from detcore import UserError
from detcore.data import Batch, transforms
from detcore.data.augment import Augment, cut_boxes, jitter, uniform
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def steps_per_epoch(n_images: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Micro-batches that each rank yields an epoch. UserError where drop_last leaves none."""
    together = batch_size * world_size
    steps = n_images // together if drop_last else -(-n_images // together)
    if not steps:
        raise UserError(
            f"{n_images} images do not fill one batch of {batch_size} on each of {world_size} processes; lower "
            "--batch-size or the number of processes, or take some images twice with --no-drop-last."
        )
    return steps


def eval_steps(n_images: int, batch_size: int, world_size: int) -> int:
    """Batches that each rank yields in one evaluation, the last ones padded."""
    return -(-n_images // (batch_size * world_size))


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n_images]: the permutation of one epoch."""
    return np.random.default_rng([seed % 2**64, epoch]).permutation(n_images)


class Choice(NamedTuple):
    """Which images a batch takes, and what is done to each: cut to the window, mirrored, resized, recoloured.

    images: int64 [n] positions in the file. flips: bool [n]. windows: int64 [n, 4] x1, y1, x2, y2 in pixels of the
    original image; None: all of each image. colours: float32 [n, 3, 4] as for `augment.jitter`; None: as they are.
    """

    images: np.ndarray
    flips: np.ndarray
    windows: np.ndarray | None = None
    colours: np.ndarray | None = None

    def views(self) -> Iterator[tuple[bool, tuple[int, int, int, int] | None, torch.Tensor | None]]:
        """Of each image: whether it is mirrored, its window, its colours."""
        windows = repeat(None) if self.windows is None else map(tuple, self.windows.tolist())
        colours = repeat(None) if self.colours is None else torch.from_numpy(self.colours)
        return zip(self.flips.tolist(), windows, colours)


class TrainPlan:
    """Which images a training micro-batch takes, what is done to each, and what their boxes become.

    All loaders read it, so that they agree on everything but the pixels.
    """

    def __init__(
        self,
        index: CocoIndex,
        image_size: tuple[int, int],
        batch_size: int,
        max_boxes: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        hflip: float,
        crowd: str,
        min_box: float,
        augment: Augment | None = None,
    ) -> None:
        if crowd not in ("keep", "drop"):
            raise ValueError(f"crowd is {crowd!r}, neither keep nor drop")
        self.index, self.image_size, self.batch_size, self.max_boxes = index, image_size, batch_size, max_boxes
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.hflip, self.crowd, self.min_box, self.augment = hflip, crowd, min_box, augment
        self.steps = steps_per_epoch(len(index), batch_size, world_size, drop_last)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        index.check_images()
        suspects = np.flatnonzero(index.box_count() > max_boxes).tolist()
        counts = [(len(self._all_boxes(i, flip=False, window=None)[0]), i) for i in suspects]
        self._refuse(*max(counts, default=(0, 0), key=lambda found: found[0]))  # the fullest: one error tells enough

    def choose(self, epoch: int, step: int) -> Choice:
        """What batch_size images are taken, and what is drawn for them."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.index), self.seed, epoch))
        first = (step * self.world_size + self.rank) * self.batch_size
        images = self._order[1][np.arange(first, first + self.batch_size) % len(self.index)]
        flips = uniform(self.seed, epoch, images) < self.hflip
        if not self.augment:
            return Choice(images, flips)
        boxes = [self._boxes(i)[0] for i in images.tolist()]
        windows = self.augment.windows(self.seed, epoch, images, self._size(images), boxes)
        return Choice(images, flips, windows, self.augment.colours(self.seed, epoch, images))

    def targets(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The fields of `Batch` other than the images."""
        images = choice.images
        boxes = np.zeros((len(images), self.max_boxes, 4), np.float32)
        labels = np.full((len(images), self.max_boxes), -1, np.int64)
        for row, (i, (flip, window, _)) in enumerate(zip(images.tolist(), choice.views())):
            kept, classes = self._kept_boxes(i, flip, window)
            boxes[row, : len(kept)], labels[row, : len(kept)] = kept, classes
        return {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "image_id": torch.from_numpy(self.index.image_ids[images]),
            "size": torch.from_numpy(self._size(images)),
        }

    def _size(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self.index.heights[images], self.index.widths[images]], 1).astype(int)

    def _boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        boxes, labels, crowd = self.index.boxes(i)
        return (boxes[~crowd], labels[~crowd]) if self.crowd == "drop" else (boxes, labels)

    def _kept_boxes(self, i: int, flip: bool, window: tuple[int, int, int, int] | None) -> tuple[np.ndarray, ...]:
        boxes, labels = self._all_boxes(i, flip, window)
        self._refuse(len(boxes), i)
        return boxes, labels

    def _refuse(self, count: int, i: int) -> None:
        """UserError if so many boxes are too many of an image."""
        if count > self.max_boxes:
            raise UserError(
                f"{self.index.path(i)}: image {self.index.image_ids[i]} has {count} boxes, more than "
                f"{self.max_boxes}; raise --max-boxes to at least that."
            )

    def _all_boxes(self, i: int, flip: bool, window: tuple[int, int, int, int] | None) -> tuple[np.ndarray, ...]:
        boxes, labels = self._boxes(i)
        size = (int(self.index.heights[i]), int(self.index.widths[i]))
        if window:
            boxes, inside = cut_boxes(boxes, window)
            boxes, labels, size = boxes[inside], labels[inside], (window[3] - window[1], window[2] - window[0])
        boxes, keep = transforms.resize_boxes(boxes, size, self.image_size, flip=flip, min_box=self.min_box)
        return boxes[keep], labels[keep]

    def keys(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) from there on without end; steps beyond an epoch's count go on into the next."""
        epoch, step = epoch + step // self.steps, step % self.steps
        while True:
            yield from ((epoch, s) for s in range(step, self.steps))
            epoch, step = epoch + 1, 0


class EvalPlan:
    """Which images an evaluation batch takes: each once over all ranks, in the file's order, none mirrored."""

    def __init__(self, index: CocoIndex, batch_size: int, rank: int, world_size: int) -> None:
        self.index, self.batch_size, self.rank, self.world_size = index, batch_size, rank, world_size
        self.steps = eval_steps(len(index), batch_size, world_size)
        index.check_images()

    def choose(self, epoch: int, step: int) -> Choice:
        """As `TrainPlan.choose`, but fewer images, or none, where the file ends."""
        first = (step * self.world_size + self.rank) * self.batch_size
        images = np.arange(first, max(first, min(first + self.batch_size, len(self.index))))
        return Choice(images, np.zeros(len(images), bool))

    def targets(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The fields of `Batch` other than the images, padded to the batch size; one empty box an image."""
        images = choice.images
        image_id = np.full(self.batch_size, -1, np.int64)
        image_id[: len(images)] = self.index.image_ids[images]
        size = np.ones((self.batch_size, 2), np.int64)
        size[: len(images), 0], size[: len(images), 1] = self.index.heights[images], self.index.widths[images]
        return {
            "boxes": torch.zeros(self.batch_size, 1, 4),
            "labels": torch.full((self.batch_size, 1), -1),
            "image_id": torch.from_numpy(image_id),
            "size": torch.from_numpy(size),
        }

    def keys(self) -> Iterator[tuple[int, int]]:
        return ((0, step) for step in range(self.steps))


def train_batches(
    index: CocoIndex,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    max_boxes: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    epoch: int,
    step: int,
    drop_last: bool = True,
    hflip: float = 0.5,
    antialias: bool = False,
    crowd: str = "keep",
    min_box: float = 0.0,
    augment: Augment | None = None,
    pin_memory: bool = False,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    """An endless stream of this rank's micro-batches, from micro-batch `step` of `epoch` on (both from 0).

    image_size: (height, width) of every image. hflip: the probability of mirroring. crowd: "keep" crowd boxes as
    ordinary ones or "drop" them. Boxes not wider and higher than min_box pixels of the resized image are left out.
    augment: crop and recolour images at random too; boxes whose centre is cut off are left out, the others clipped.
    workers: processes that decode; 0 decodes in this one. Images come in channels_last memory, pinned if asked.
    pace: told how long the workers took for each batch.

    Raises UserError, before the first batch, for missing images, more boxes than max_boxes and too few images for a
    batch; later for files that do not decode and for a worker that was killed.
    """
    shard = (batch_size, max_boxes, seed, rank, world_size, drop_last)
    plan = TrainPlan(index, image_size, *shard, hflip, crowd, min_box, augment)
    return _stream(_Batches(plan, image_size, antialias), plan.keys(epoch, step), workers, pin_memory, pace)


def eval_batches(
    index: CocoIndex,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    antialias: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """`eval_steps` batches, the same number on every rank: each image of the file exactly once over all ranks.

    The rest of the last batches is padding (image_id -1, black, size 1x1). Boxes are one empty row an image, labels
    -1: the truth stays in `CocoIndex.ground_truth`. Arguments and errors as for `train_batches`.
    """
    plan = EvalPlan(index, batch_size, rank, world_size)
    return _stream(_Batches(plan, image_size, antialias), plan.keys(), workers, pin_memory)


class _Batches(Dataset):
    """Makes the batch of a key (epoch, step). Mistakes in the data come back as values, not as nested tracebacks."""

    def __init__(self, plan: TrainPlan | EvalPlan, image_size: tuple[int, int], antialias: bool) -> None:
        self.plan, self.image_size, self.antialias = plan, image_size, antialias

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | str:
        choice = self.plan.choose(*key)
        self.clock, self.bytes, cpu = [0.0, 0.0, 0.0], 0, time.thread_time()
        try:
            pixels = [self._image(i, *view) for i, view in zip(choice.images.tolist(), choice.views())]
            targets = self.plan.targets(choice)
        except UserError as error:
            return str(error)
        blank = torch.zeros(*self.image_size, 3, dtype=torch.uint8)
        pixels += [blank] * (self.plan.batch_size - len(pixels))
        # default_collate stacks straight into shared memory when it runs in a worker.
        spent = (len(choice.images), self.bytes, self.clock, time.thread_time() - cpu)
        return {"images": default_collate(pixels), **targets, "spent": spent}

    def _image(self, i: int, flip: bool, window: tuple | None, colour: torch.Tensor | None) -> torch.Tensor:
        index = self.plan.index
        size = (int(index.heights[i]), int(index.widths[i]))
        times = [time.perf_counter()]
        data = index.read(i)
        times.append(time.perf_counter())
        image = transforms.decode(data, path=index.path(i), image_id=int(index.image_ids[i]), size=size)
        times.append(time.perf_counter())
        resized = transforms.resize(image, self.image_size, flip=flip, antialias=self.antialias, window=window)
        if colour is not None:
            resized = jitter(resized, colour)
        times.append(time.perf_counter())
        self.clock = [sum(so_far) for so_far in zip(self.clock, np.diff(times).tolist(), strict=True)]
        self.bytes += len(data)
        return resized


def _stream(
    dataset: _Batches, keys: Iterator[tuple[int, int]], workers: int, pin_memory: bool, pace: Pace | None = None
) -> Iterator[Batch]:
    generator = torch.Generator()  # the default one would be advanced, and training with it
    more: dict[str, Any] = {}
    workers = usable_workers(workers)
    if workers:
        more = {"multiprocessing_context": _fork_server(), "worker_init_fn": _begin_worker, "prefetch_factor": 2}
    loader = DataLoader(
        dataset, batch_size=None, sampler=keys, num_workers=workers, pin_memory=pin_memory, generator=generator, **more
    )
    batches = iter(loader)
    end_workers = functools.partial(_end_workers, batches)
    if workers:
        atexit.register(end_workers)
    try:
        for item in batches:
            if isinstance(item, str):
                raise UserError(item)
            spent = item.pop("spent")
            if pace:
                pace.add(*spent)
            yield Batch(**{**item, "images": item["images"].permute(0, 3, 1, 2)})
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        # The others come where a worker is killed while it hands a batch over: files are read by workers alone.
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise UserError(
            f"a loader worker was killed ({error or type(error).__name__}). Most often memory ran out: lower "
            "--workers or --batch-size, or give the container more shared memory (docker run --ipc=host)."
        ) from None
    finally:
        if workers:
            end_workers()
            atexit.unregister(end_workers)


def usable_workers(workers: int) -> int:
    """No more than there are processors."""
    return min(workers, len(os.sched_getaffinity(0)))


def _fork_server() -> Any:
    """The fork server's context, the server started with torch loaded and the signals blocked."""
    context = multiprocessing.get_context("forkserver")
    # A worker runs the main module's imports again; loaded here once, they cost it nothing.
    main = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    ours = {__package__.split(".")[0], main.split(".")[0]}
    context.set_forkserver_preload([m for m in sys.modules if m.split(".")[0] in ours and m not in ("__main__", main)])
    # A mask passes through fork and exec, so that not even a worker that is just starting can be hit.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # again, for starting the tracker unblocks some
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _end_workers(batches: Any) -> None:
    """End a DataLoader's workers. Left to the interpreter's exit they would get a SIGTERM, which they block."""
    batches._shutdown_workers()
    for worker in batches._workers:
        worker.kill()


def _begin_worker(number: int) -> None:
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # in case somebody else had started the fork server
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the training process is gone: torch watches the fork server, which outlives it."""
    multiprocessing.parent_process().join()
    os._exit(1)
