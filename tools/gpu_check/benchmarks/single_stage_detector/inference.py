"""The part `inference`: RetinaNet's."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch

from detcore.data.synthetic import synthetic_batches
from detcore.detection import detector as detection
from detcore.training import checkpoint
from detcore.training.state import State
from single_stage_detector.data import DETECTOR
from tools.gpu_check.benchmarks.single_stage_detector.train import retinanet
from tools.gpu_check.inference import infer
from tools.gpu_check.state import Context, Job, Row
from tools.gpu_check.steps import TrainStep
from tools.gpu_check.timing import Stopwatch


def inference(context: Context) -> Iterable[Job]:
    """images/s of forward, of post-processing and of both, eager and captured as one CUDA graph; and of an evaluation
    in the middle of training, whose ms are those for which training stands still."""
    watch = Stopwatch(context)
    batches = (
        (context.sizes.batch, 2 * context.sizes.batch) if context.gpu and not context.quick else (context.sizes.batch,)
    )
    modes = [("eager", "native"), ("eager", "reference"), *([("graph", "native")] if context.gpu else [])]
    precision = "bf16" if context.gpu else "fp32"
    for batch in batches:
        for mode, ops in modes if batch == batches[0] else modes[-1:]:
            for what in ("forward", "forward+postprocess"):
                if what == "forward" and (ops == "reference" or batch != batches[0]):
                    continue
                key = f"{what} {precision} b{batch} {mode} {ops}"
                chosen = retinanet(context, batch, precision, "eager", ops)
                yield key, lambda a=(chosen, what, mode): infer(*a, context, watch)
        if batch == batches[0]:
            mode = "graph" if context.gpu else "eager"
            images = 1024 if context.gpu and not context.quick else 4 * context.sizes.batch
            key = f"evaluation pause {precision} b{batch} {mode} native"
            yield key, lambda mode=mode, images=images: pause(context, precision, mode, images)


def pause(context: Context, precision: str, mode: str, images: int) -> Row:
    """How long training stands still for an evaluation of so many synthetic images, on one device and without a loader.

    As in engine.train: the state is copied to the host (copy_ms) and written in a thread (write_ms, which may end after
    the pause), the images are copied to the device and looked at, the detections come to the host.
    """
    step = TrainStep(retinanet(context, context.sizes.batch, precision, mode, "native"))
    device, model, count = step.backend, step.task.model, -(-images // context.sizes.batch)
    state = State(model, step.task.optimizer, device.scaler(), None)
    shape = ((context.sizes.image, context.sizes.image), context.sizes.batch, 1, 1)
    batch = next(synthetic_batches(context.sizes.classes, *shape))
    find = detection.compiled_detect(DETECTOR, model, range(context.sizes.classes), device)
    file, times = context.work / "tmp" / "pause.pt", []
    file.parent.mkdir(parents=True, exist_ok=True)

    def write(contents: dict) -> float:
        start = time.perf_counter()
        checkpoint.save(file, contents)
        return time.perf_counter() - start

    try:
        with ThreadPoolExecutor(1) as pool:
            for _ in range(3):  # the first records
                step()
                device.synchronize()
                start = time.perf_counter()
                contents = device.to_host(state.contents())
                copied = time.perf_counter()
                written = pool.submit(write, contents)
                model.eval()
                detection.detect_all(find, repeat(batch, count), device, lambda phase, number: None)
                model.train()
                end = time.perf_counter()
                times.append((end - start, copied - start, written.result()))
    finally:
        file.unlink(missing_ok=True)
        step.close()
    passed, copy, writing = (1e3 * value for value in min(times[1:]))
    row = {"ms": passed, "n": 2, "copy_ms": copy, "write_ms": writing, "images": count * context.sizes.batch}
    row |= {"batch": context.sizes.batch, "mode": mode, "ops": "native", "images_per_s": 1e3 * row["images"] / passed}
    if context.gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row
