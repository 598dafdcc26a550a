"""The loader's batches through NVIDIA DALI (extra `dali`): all of the pixels' way on CPU or GPU.

Order, mirroring, crops, colours, boxes and labels come from the same `TrainPlan` and `EvalPlan` as those of
`detcore.data.torch_loader`; all but the pixels is equal to the bit. The pixels differ by at most one grey level with
the CPU decoder, which is the same library: only the resize rounds differently. A change of colours enlarges that to
five at most. The GPU decoder's inverse transform and colour upsampling differ by a few levels more. Files are read
ahead by a few threads and handed to DALI as bytes; DALI's own shuffling is not used. DALI works two batches ahead in
threads and streams of its own.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_png

from detcore import UserError
from detcore.data import transforms
from detcore.data.batch import Batch
from detcore.data.encoded import EncodedFiles
from detcore.data.plan import Choice, EvalPlan, TrainPlan
from detcore.data.torch_loader import Options


def batches(plan: TrainPlan | EvalPlan, keys: Iterator[tuple[int, int]], options: Options) -> Iterator[Batch]:
    """As `torch_loader.batches`. The options' workers are DALI's CPU threads; where their device is a GPU, it decodes
    and holds the images (the other fields stay in host memory), else all is done on the CPU. UserError where DALI is
    missing or the recipe's interpolation is another than bilinear.
    """
    if plan.recipe.methods != {"bilinear"}:
        raise UserError("the DALI loader scales images bilinearly alone; take --loader torch or nvjpeg.")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the DALI loader wants NVIDIA DALI ({error}): pip install .[dali], or take --loader torch."
        ) from error
    return _batches(_Source(EncodedFiles(plan, keys, max(options.workers, 1), options.turn)), options)


class _Source:
    """Feeds DALI the encoded files of one batch after the other and what to do to each, and remembers what it fed.

    These are the files and the mirror flags, then what the plan's steps (`_Plan.cuts` and so on) need: begin and end of
    the window as y, x; size, begin of the canvas on the scaled image and canvas as y, x; matrix and offset of the
    colours.
    """

    def __init__(self, files: EncodedFiles) -> None:
        self.files, self.plan = files, files.plan
        self.fed: deque[Choice] = deque()
        self.fill = self.plan.choose(0, 0).view.fill

    def __call__(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        choice, data = next(self.files)
        self.fed.append(choice)
        data = [self._upright(one, i) for one, i in zip(data, choice.images.tolist(), strict=True)]
        view, padding = choice.view, self.plan.batch_size - len(data)
        blank = [encode_png(torch.tensor(self.fill, dtype=torch.uint8)[:, None, None]).numpy()] * padding
        changes = [view.mirrored.astype(np.int32)]
        if self.plan.cuts:
            changes += [view.windows[:, 1::-1].astype(np.int32), view.windows[:, :1:-1].astype(np.int32)]
        if self.plan.places:
            canvas = np.tile(view.canvas, (self.plan.batch_size, 1))
            sizes = np.concatenate([view.sizes, canvas[len(data) :]])  # padding covers its canvas
            changes += [sizes.astype(np.float32), -view.offsets.astype(np.int32), canvas.astype(np.int32)]
        if self.plan.recolours:
            changes += [view.colours[..., :3], view.colours[..., 3]]
        return data + blank, *(self._padded(part) for part in changes)

    def _upright(self, data: np.ndarray, i: int) -> np.ndarray:
        """The file, or where EXIF turns it one that holds the turned pixels: DALI turns all images or none."""
        facts = self.files.facts(i)
        try:
            if transforms.is_turned(data, size=facts["size"], turn=facts["turn"]):
                return encode_png(transforms.decode(data, **facts).contiguous()).numpy()
        except UserError:
            return data  # `check` and `blame` say what is wrong with it
        return data

    def _padded(self, part: np.ndarray) -> np.ndarray:
        """With zeros for the places of the batch that have no image."""
        return np.pad(part, [(0, self.plan.batch_size - len(part)), *[(0, 0)] * (part.ndim - 1)])

    def check(self, images: np.ndarray, shapes: np.ndarray) -> None:
        """UserError if an image has not the size that the annotation file gives. shapes: int [N, 3]."""
        for i, (height, width, _) in zip(images.tolist(), shapes.tolist()):
            facts = self.files.facts(i)
            transforms.check_size(height, width, **{name: facts[name] for name in ("path", "image_id", "size")})

    def blame(self, error: Exception) -> UserError:
        """Find the file that made DALI fail: DALI gives its place among those in flight, not its name."""
        for choice in self.fed:
            for i in choice.images.tolist():
                try:
                    transforms.decode(self.plan.index.read(i), **self.files.facts(i))
                except UserError as reason:
                    return reason
        return UserError(f"DALI failed, though every file of the batch decodes without it: {error}")


def _batches(source: _Source, options: Options) -> Iterator[Batch]:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    plan, device, pace = source.plan, options.device, options.pace
    try:
        pipeline = _pipeline(source, options)
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
                pace.add(plan.batch_size, size, [reading, max(time.perf_counter() - begin - awaited, 0.0), 0.0], 0.0)
            choice = source.fed.popleft()
            source.check(choice.images, np.asarray(shapes.as_tensor()))
            # DALI reuses its buffers, so the values are copied out: on torch's stream, whose memory `out` is. Work that
            # still reads what was there before would race with a copy on another.
            out = torch.empty(plan.batch_size, *choice.view.canvas, 3, dtype=torch.uint8, device=device)
            stream = None if device.type == "cpu" else torch.cuda.current_stream(device)
            feed_ndarray(pixels.as_tensor(), out, cuda_stream=stream)
            yield Batch(images=out.permute(0, 3, 1, 2), **plan.targets(choice))
    finally:
        source.files.close()


def _pipeline(source: _Source, options: Options) -> Any:
    from nvidia.dali import Pipeline, fn, types

    plan, gpu = source.plan, options.device.type != "cpu"
    device_id = options.device.index or 0 if gpu else None
    pipeline = Pipeline(batch_size=plan.batch_size, num_threads=max(options.workers, 1), device_id=device_id)
    with pipeline:
        decoder = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        outputs = 2 + 2 * plan.cuts + 3 * plan.places + 2 * plan.recolours
        encoded, mirrored, *changes = fn.external_source(source=source, num_outputs=outputs, batch=True)
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)
        if plan.cuts:
            begin, end, *changes = changes
            image = fn.decoders.image_slice(encoded, start=begin, end=end, axes=[0, 1], **decoder)
        else:
            image = fn.decoders.image(encoded, **decoder)
        image = fn.flip(image, horizontal=mirrored)
        scaled = {"interp_type": types.INTERP_LINEAR, "antialias": options.antialias}
        if plan.places:
            size, begin, canvas, *changes = changes
            image = fn.resize(image, size=size, **scaled)
        else:
            height, width = plan.recipe.canvases[0]
            image = fn.resize(image, resize_y=height, resize_x=width, **scaled)
        if plan.recolours:
            image = fn.coord_transform(image, M=changes[0], T=changes[1], dtype=types.UINT8)
        if plan.places:
            fill = {"out_of_bounds_policy": "pad", "fill_values": list(source.fill)}
            image = fn.slice(image, start=begin, shape=canvas, axes=[0, 1], **fill)
        pipeline.set_outputs(image, shape)
    pipeline.build()
    return pipeline
