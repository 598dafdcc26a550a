"""The loader's batches with the JPEG files decoded by torchvision on the device: for a GPU machine without DALI.

Order, mirroring, crops, colours, boxes and labels come from the same `TrainPlan` and `EvalPlan` as those of
`detcore.data.loader` and are equal to the bit; the pixels go through the same functions, on the device. On the CPU they
are equal too; a GPU's inverse transform, colour upsampling and rounding differ by a few grey levels.

A few threads read the files ahead; decoding itself happens in the training process, when a batch is asked for. Files
that a GPU's decoder does not take (other formats, grey, CMYK or RGB-coded JPEG, incomplete ones) are decoded by the
processor as everywhere else, with the same errors. Damage within a complete JPEG that the decoder does not notice stays
unseen, as with libjpeg.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from detcore import UserError
from detcore.data import Batch, transforms
from detcore.data.augment import Augment, jitter
from detcore.data.coco import CocoIndex
from detcore.data.encoded import EncodedFiles
from detcore.data.loader import EvalPlan, TrainPlan
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
    device: torch.device,
    drop_last: bool = True,
    hflip: float = 0.5,
    antialias: bool = False,
    crowd: str = "keep",
    min_box: float = 0.0,
    augment: Augment | None = None,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    """As `detcore.data.loader.train_batches`. workers: threads that read files. device: decodes and holds the images;
    the other fields stay in host memory. UserError where torchvision cannot decode there."""
    shard = (batch_size, max_boxes, seed, rank, world_size, drop_last)
    plan = TrainPlan(index, image_size, *shard, hflip, crowd, min_box, augment)
    return _stream(plan, plan.keys(epoch, step), image_size, workers, antialias, device, pace)


def eval_batches(
    index: CocoIndex,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    device: torch.device,
    antialias: bool = False,
) -> Iterator[Batch]:
    """As `detcore.data.loader.eval_batches`; workers and device as for `train_batches`."""
    plan = EvalPlan(index, batch_size, rank, world_size)
    return _stream(plan, plan.keys(), image_size, workers, antialias, device)


def _stream(
    plan: TrainPlan | EvalPlan,
    keys: Iterator[tuple[int, int]],
    image_size: tuple[int, int],
    workers: int,
    antialias: bool,
    device: torch.device,
    pace: Pace | None = None,
) -> Iterator[Batch]:
    try:
        decode_jpeg([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--loader nvjpeg: this torchvision does not decode on the device ({reason}); take --loader torch or dali."
        ) from error
    return _batches(EncodedFiles(plan, keys, max(workers, 1)), image_size, antialias, device, pace)


def _batches(
    files: EncodedFiles, image_size: tuple[int, int], antialias: bool, device: torch.device, pace: Pace | None
) -> Iterator[Batch]:
    blank = torch.zeros(*image_size, 3, dtype=torch.uint8, device=device)
    try:
        for choice, data in files:
            if device.type != "cpu":
                # torchvision decodes on a stream of its own, into memory that ours may have freed but not yet read.
                torch.accelerator.current_stream(device).synchronize()
            times, cpu = [time.perf_counter()], time.thread_time()
            decoded = _decode(files, choice.images, data, device)
            times.append(time.perf_counter())
            pixels = [
                transforms.resize(image, image_size, flip=flip, antialias=antialias, window=window)
                for image, (flip, window, _) in zip(decoded, choice.views())
            ]
            if choice.colours is not None:
                colours = torch.from_numpy(choice.colours).to(device)
                pixels = [jitter(image, colour) for image, colour in zip(pixels, colours)]
            pixels += [blank] * (files.plan.batch_size - len(pixels))
            batch = torch.stack(pixels).permute(0, 3, 1, 2)
            times.append(time.perf_counter())
            if pace:
                size, reading, _ = files.spent()
                pace.add(len(choice.images), size, [reading, *np.diff(times).tolist()], time.thread_time() - cpu)
            yield Batch(images=batch, **files.plan.targets(choice))
    finally:
        files.close()


def _decode(files: EncodedFiles, images: np.ndarray, data: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """uint8 RGB [3, h, w] on the device for each file. UserError, naming the file, as from `transforms.decode`."""
    facts = [files.facts(i) for i in images.tolist()]
    plain = [k for k, (one, fact) in enumerate(zip(data, facts)) if transforms.is_plain_jpeg(one, size=fact["size"])]
    found = dict(zip(plain, _decode_jpegs([torch.from_numpy(data[k]) for k in plain], device), strict=True))
    pixels = (found.get(k) for k in range(len(data)))
    return [
        transforms.decode(one, **fact).to(device) if image is None else image
        for one, fact, image in zip(data, facts, pixels, strict=True)
    ]


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """All in one batch; where that fails each alone, for the error does not say which. None for those that fail."""
    if not files:
        return []
    try:
        return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [image for file in files for image in _decode_jpegs([file], device)]
