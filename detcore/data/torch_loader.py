"""Batches of a plan from image files, decoded in worker processes.

Each worker makes whole micro-batches, so any number of workers, and a start at any step, give the same batches.
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
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from detcore import UserError
from detcore.data import transforms
from detcore.data.augment import jitter
from detcore.data.batch import Batch
from detcore.data.pace import Pace
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.view import View

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Options(NamedTuple):
    """How a loader works, which changes nothing of what it yields.

    workers: processes (torch) or threads that load; 0: this process (torch) or one thread. device: for which the
    batches are; a GPU decodes and holds the images with DALI and nvjpeg, and the torch loader pins their memory for it.
    antialias: of resizing; turn: by EXIF, see `detcore.data.exif`; both show in the pixels. pace: told how long the
    parts took for each batch.
    """

    workers: int = 0
    device: torch.device = torch.device("cpu")
    antialias: bool = False
    pace: Pace | None = None
    turn: str = "auto"


def batches(plan: TrainPlan | EvalPlan, keys: Iterator[tuple[int, int]], options: Options) -> Iterator[Batch]:
    """This rank's batches for the keys of the plan, images in channels_last memory.

    Raises UserError for files that do not decode and for a worker that was killed.
    """
    return _stream(_Batches(plan, options.antialias, options.turn), keys, options)


def render(image: torch.Tensor, view: View, k: int, antialias: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [3, h, w], the decoded image k of a view -> uint8 [H, W, 3], the canvas; in `out` where there is one."""
    x1, y1, x2, y2 = view.windows[k].tolist()
    part = None if (y2 - y1, x2 - x1) == tuple(image.shape[1:]) else (x1, y1, x2, y2)
    size, flip = view.sizes[k].tolist(), bool(view.mirrored[k])
    cubic = view.cubic is not None and bool(view.cubic[k])
    pixels = transforms.resize(image, size, flip=flip, antialias=antialias, window=part, cubic=cubic)
    if view.colours is not None:
        pixels = jitter(pixels, torch.from_numpy(view.colours[k]).to(pixels.device))
    if view.covers(k):
        return pixels if out is None else out.copy_(pixels)
    canvas = blank(view, pixels.device, out)
    top, left = view.offsets[k].tolist()
    bottom, right = view.extents[k].tolist()
    canvas[max(top, 0) : bottom, max(left, 0) : right] = pixels[
        max(-top, 0) : bottom - top, max(-left, 0) : right - left
    ]
    return canvas


def blank(view: View, device: torch.device, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [H, W, 3]: the canvas without an image; in `out` where there is one."""
    filled = _filled(view.fill, view.canvas, device)
    return filled.clone() if out is None else out.copy_(filled)


@functools.lru_cache(maxsize=8)  # copying it is thirty times as fast as repeating three bytes
def _filled(fill: tuple[int, int, int], canvas: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.tensor(fill, dtype=torch.uint8, device=device).expand(*canvas, 3).contiguous()


class _Batches(Dataset):
    """Makes the batch of a key (epoch, step). Mistakes in the data come back as values, not as nested tracebacks."""

    def __init__(self, plan: TrainPlan | EvalPlan, antialias: bool, turn: str = "auto") -> None:
        self.plan, self.antialias, self.turn = plan, antialias, turn

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | str:
        choice = self.plan.choose(*key)
        self.clock, self.bytes, cpu = [0.0, 0.0, 0.0], 0, time.thread_time()
        images = torch.empty(self.plan.batch_size, *choice.view.canvas, 3, dtype=torch.uint8)
        if get_worker_info():
            images.share_memory_()  # now, while there is nothing to copy
        try:
            for k, i in enumerate(choice.images.tolist()):
                self._image(i, choice.view, k, images[k])
            targets = self.plan.targets(choice)
        except UserError as error:
            return str(error)
        for canvas in images[len(choice.images) :]:
            blank(choice.view, canvas.device, canvas)
        spent = (len(choice.images), self.bytes, self.clock, time.thread_time() - cpu)
        return {"images": images, **targets, "spent": spent}

    def _image(self, i: int, view: View, k: int, out: torch.Tensor) -> None:
        index = self.plan.index
        size = (int(index.heights[i]), int(index.widths[i]))
        times = [time.perf_counter()]
        data = index.read(i)
        times.append(time.perf_counter())
        about = {"path": index.path(i), "image_id": int(index.image_ids[i]), "size": size, "turn": self.turn}
        image = transforms.decode(data, **about)
        times.append(time.perf_counter())
        render(image, view, k, self.antialias, out)
        times.append(time.perf_counter())
        self.clock = [sum(so_far) for so_far in zip(self.clock, np.diff(times).tolist(), strict=True)]
        self.bytes += len(data)


def _stream(dataset: _Batches, keys: Iterator[tuple[int, int]], options: Options) -> Iterator[Batch]:
    generator = torch.Generator()  # the default one would be advanced, and training with it
    more: dict[str, Any] = {"pin_memory": options.device.type != "cpu"}
    workers = usable_workers(options.workers)
    if workers:
        more |= {"multiprocessing_context": _fork_server(), "worker_init_fn": _begin_worker, "prefetch_factor": 2}
    loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=workers, generator=generator, **more)
    made = iter(loader)
    end_workers = functools.partial(_end_workers, made)
    if workers:
        atexit.register(end_workers)
    try:
        for item in made:
            if isinstance(item, str):
                raise UserError(item)
            spent = item.pop("spent")
            if options.pace:
                options.pace.add(*spent)
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
    loaded = sys.modules.copy()  # another thread may be importing
    context.set_forkserver_preload([m for m in loaded if m.split(".")[0] in ours and m not in ("__main__", main)])
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
