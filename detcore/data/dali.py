"""The loader's batches through NVIDIA DALI (extra `dali`): all of the pixels' way on CPU or GPU.

Order, mirroring, crops, colours, boxes and labels come from the same `TrainPlan` and `EvalPlan` as those of
`detcore.data.loader`; all but the pixels is equal to the bit. The pixels differ by at most one grey level with the CPU
decoder, which is the same library: only the resize rounds differently. A change of colours enlarges that to five at
most. The GPU decoder's inverse transform and colour upsampling differ by a few levels more.
Files are read ahead by a few threads and handed to DALI as bytes; DALI's own shuffling is not used. DALI works two
batches ahead in threads and streams of its own.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_png

from detcore import UserError
from detcore.data import Batch, transforms
from detcore.data.augment import Augment
from detcore.data.coco import CocoIndex
from detcore.data.encoded import EncodedFiles
from detcore.data.loader import Choice, EvalPlan, TrainPlan
from detcore.data.pace import Pace


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
    device_id: int | None = None,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    """As `detcore.data.loader.train_batches`. workers: DALI's CPU threads. device_id: the GPU that decodes and holds
    the images (the other fields stay in host memory); None does all on the CPU. UserError where DALI is missing."""
    shard = (batch_size, max_boxes, seed, rank, world_size, drop_last)
    plan = TrainPlan(index, image_size, *shard, hflip, crowd, min_box, augment)
    return _stream(plan, plan.keys(epoch, step), image_size, workers, antialias, device_id, pace)


def eval_batches(
    index: CocoIndex,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    antialias: bool = False,
    device_id: int | None = None,
) -> Iterator[Batch]:
    """As `detcore.data.loader.eval_batches`; workers and device_id as for `train_batches`."""
    plan = EvalPlan(index, batch_size, rank, world_size)
    return _stream(plan, plan.keys(), image_size, workers, antialias, device_id)


class _Source:
    """Feeds DALI the encoded files of one batch after the other and what to do to each, and remembers what it fed.

    That are the files and the mirror flags; with crops and colours also begin and end of the window as y, x, and matrix
    and offset of the colours.
    """

    def __init__(self, files: EncodedFiles) -> None:
        self.files, self.plan = files, files.plan
        self.fed: deque[Choice] = deque()
        self.augmented = isinstance(self.plan, TrainPlan) and self.plan.augment is not None
        self.blank = encode_png(torch.zeros(3, 1, 1, dtype=torch.uint8)).numpy()

    def __call__(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        choice, data = next(self.files)
        padding = self.plan.batch_size - len(data)
        self.fed.append(choice)
        fed = (data + [self.blank] * padding, np.pad(choice.flips.astype(np.int32), (0, padding)))
        if not self.augmented:
            return fed
        changes = (
            choice.windows[:, 1::-1].astype(np.int32),
            choice.windows[:, :1:-1].astype(np.int32),
            choice.colours[..., :3],
            choice.colours[..., 3],
        )
        return *fed, *(np.ascontiguousarray(part) for part in changes)

    def check(self, images: np.ndarray, shapes: np.ndarray) -> None:
        """UserError if an image has not the size that the annotation file gives. shapes: int [N, 3]."""
        for i, (height, width, _) in zip(images.tolist(), shapes.tolist()):
            transforms.check_size(height, width, **self.files.facts(i))

    def blame(self, error: Exception) -> UserError:
        """Find the file that made DALI fail: DALI gives its place among those in flight, not its name."""
        for choice in self.fed:
            for i in choice.images.tolist():
                try:
                    transforms.decode(self.plan.index.read(i), **self.files.facts(i))
                except UserError as reason:
                    return reason
        return UserError(f"DALI failed, though every file of the batch decodes without it: {error}")


def _stream(
    plan: TrainPlan | EvalPlan,
    keys: Iterator[tuple[int, int]],
    image_size: tuple[int, int],
    workers: int,
    antialias: bool,
    device_id: int | None,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the DALI loader wants NVIDIA DALI ({error}): pip install .[dali], or take --loader torch."
        ) from error
    threads = max(workers, 1)
    return _batches(_Source(EncodedFiles(plan, keys, threads)), image_size, threads, antialias, device_id, pace)


def _batches(
    source: _Source,
    image_size: tuple[int, int],
    threads: int,
    antialias: bool,
    device_id: int | None,
    pace: Pace | None,
) -> Iterator[Batch]:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    device = "cpu" if device_id is None else f"cuda:{device_id}"
    batch_size = source.plan.batch_size
    try:
        pipeline = _pipeline(source, image_size, threads, antialias, device_id)
        while True:
            begin = time.perf_counter()
            try:
                pixels, shapes = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise source.blame(error) from error
            if pace:  # what DALI does beside the training step does not hold it back and is not seen here
                size, reading, awaited = source.files.spent()
                pace.add(batch_size, size, [reading, max(time.perf_counter() - begin - awaited, 0.0), 0.0], 0.0)
            choice = source.fed.popleft()
            source.check(choice.images, np.asarray(shapes.as_tensor()))
            # DALI reuses its buffers, so the values are copied out: on torch's stream, whose memory `out` is. Work that
            # still reads what was there before would race with a copy on another.
            out = torch.empty(batch_size, *image_size, 3, dtype=torch.uint8, device=device)
            stream = None if device_id is None else torch.cuda.current_stream(out.device)
            feed_ndarray(pixels.as_tensor(), out, cuda_stream=stream)
            yield Batch(images=out.permute(0, 3, 1, 2), **source.plan.targets(choice))
    finally:
        source.files.close()


def _pipeline(
    source: _Source, image_size: tuple[int, int], threads: int, antialias: bool, device_id: int | None
) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=source.plan.batch_size, num_threads=threads, device_id=device_id)
    with pipeline:
        decoder = {"device": "cpu" if device_id is None else "mixed", "output_type": types.RGB}
        fed = fn.external_source(source=source, num_outputs=6 if source.augmented else 2, batch=True)
        encoded, flips, *changes = fed
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)
        if changes:
            begin, end, matrix, offset = changes
            window = {"start": begin, "end": end, "axes": [0, 1]}
            image = fn.decoders.image_slice(encoded, **window, adjust_orientation=False, **decoder)
        else:
            image = fn.decoders.image(encoded, adjust_orientation=False, **decoder)
        image = fn.flip(image, horizontal=flips)
        image = fn.resize(
            image,
            resize_y=image_size[0],
            resize_x=image_size[1],
            interp_type=types.INTERP_LINEAR,
            antialias=antialias,
        )
        if changes:
            image = fn.coord_transform(image, M=matrix, T=offset, dtype=types.UINT8)
        pipeline.set_outputs(image, shape)
    pipeline.build()
    return pipeline
