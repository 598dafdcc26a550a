"""The loader's batches with the JPEG files decoded by torchvision on the device: for a GPU machine without DALI.

Order, mirroring, crops, colours, boxes and labels come from the same `TrainPlan` and `EvalPlan` as those of
`detcore.data.torch_loader` and are equal to the bit; the pixels go through the same functions, on the device. On the
CPU they are equal too; a GPU's inverse transform, colour upsampling and rounding differ by a few grey levels.

A few threads read the files ahead; decoding itself happens in the training process, when a batch is asked for. Files
that a GPU's decoder does not take (other formats, grey, CMYK or RGB-coded JPEG, incomplete ones) and those that EXIF
turns are decoded by the processor as everywhere else, with the same errors. Damage within a complete JPEG that the
decoder does not notice stays unseen, as with libjpeg.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from detcore import UserError
from detcore.data import transforms
from detcore.data.batch import Batch
from detcore.data.encoded import EncodedFiles
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.torch_loader import Options, blank, render


def batches(plan: TrainPlan | EvalPlan, keys: Iterator[tuple[int, int]], options: Options) -> Iterator[Batch]:
    """As `torch_loader.batches`, decoded and held by the options' device; the other fields stay in host memory.

    UserError where torchvision cannot decode there.
    """
    some = [encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))]
    try:
        decode_jpeg(some, mode=ImageReadMode.RGB, device=options.device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--loader nvjpeg: this torchvision does not decode on the device ({reason}); take --loader torch or dali."
        ) from error
    return _batches(EncodedFiles(plan, keys, max(options.workers, 1), options.turn), options)


def _batches(files: EncodedFiles, options: Options) -> Iterator[Batch]:
    device, pace = options.device, options.pace
    try:
        for choice, data in files:
            if device.type != "cpu":
                # torchvision decodes on a stream of its own, into memory that ours may have freed but not yet read.
                torch.accelerator.current_stream(device).synchronize()
            times, cpu = [time.perf_counter()], time.thread_time()
            decoded = _decode(files, choice.images, data, device)
            times.append(time.perf_counter())
            pixels = [render(image, choice.view, k, options.antialias) for k, image in enumerate(decoded)]
            pixels += [blank(choice.view, device)] * (files.plan.batch_size - len(pixels))
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
    plain = [
        k
        for k, (one, fact) in enumerate(zip(data, facts))
        if transforms.is_plain_jpeg(one, size=fact["size"], turn=fact["turn"])
    ]
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
