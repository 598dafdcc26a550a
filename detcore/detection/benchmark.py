"""`--mode benchmark`: the speed of training steps and of inference, without and with the data set."""

import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from detcore import cli
from detcore.data.batch import Batch
from detcore.detection import detector as detection
from detcore.detection import speed
from detcore.detection.config import DetectionConfig
from detcore.detection.detections import Detector, finished
from detcore.detection.inference import write_json
from detcore.device import native
from detcore.nn import optim
from detcore.processes import distributed
from detcore.training import engine
from detcore.training.state import State
from detcore.training.task import Context, Task

PARTS = ("training", "inference")
Results = list[dict[str, Any]]


def benchmark(
    config: DetectionConfig,
    detector: Detector,
    build_task: Callable[[Any, Context], Task],
    parts: tuple[str, ...] = PARTS,
    report: Callable[[Results], None] = lambda results: None,
) -> int:
    """Speed of training steps and of inference with post-processing, without and with the data set.

    Prints images/s (all processes together) and the milliseconds of an iteration, as `speed.latencies` has them, and
    peak memory. Writes benchmark.json. Each iteration ends with a wait for the device. parts: of PARTS, what is
    measured. report: gets the results on rank 0.
    """
    with engine.joined(config) as (world, device):
        context = Context(device, world, distributed.choose_seed(config.seed, device.collective_device))
        torch.manual_seed(context.seed)
        task = build_task(config, context)
        steps = {
            "training": lambda: _training(config, task, context),
            "inference": lambda: _inference(config, detector, task, context),
        }
        runs = {part: steps[part]() for part in parts}
        classes = detection.class_count(detector, config)
        fake = [device.to_device(b) for b in detection.examples(detector, config, classes, context.seed)]
        results = [
            _measure(f"{part}, synthetic", run, itertools.cycle(fake), config, config.batch_size * world.size, context)
            for part, run in runs.items()
        ]
        for part, run in runs.items() if not config.synthetic else ():
            stream, images = _stream(part, config, detector, task, context)
            results.append(_measure(f"{part}, with data", run, device.prefetch(stream), config, images, context))
    if world.rank == 0:
        print(native.describe(config.program, device.device), f"steps: {device.step_execution}", sep="\n")
        print(f"{'':22} images/s  {speed.HEADER}   peak GiB")
        for r in results:
            print(f"{r['name']:22} {r['images_per_s']:8.1f}  {speed.row(r)}   {r['peak_gib']:8.2f}")
        about = {
            "environment": device.describe() | {"processes": world.size},
            "seed": context.seed,
            "weights": weights(config),
        }
        if "inference" in parts and not config.checkpoint:
            print(
                f"weights: {weights(config)}; such a model finds far more than a trained one, which costs time in "
                "post-processing. Give --checkpoint FILE"
            )
        write_json(config.output_dir / "benchmark.json", {**about, "results": results})
        report(results)
    return cli.OK


def weights(config: DetectionConfig) -> str:
    """What the model that is measured knows, in words: a checkpoint's path, or "random"."""
    if config.checkpoint:
        return str(config.checkpoint)
    return "random" if config.resume or config.synthetic or not config.pretrained else "random but for the backbone"


def _training(config: DetectionConfig, task: Task, context: Context) -> Callable[[Batch], None]:
    device = context.backend
    state = State(task.model, task.optimizer, device.scaler(), None)
    parallel = device.parallel(task.model, context.world.size)
    step = engine.make_train_step(task, state, parallel, dataclasses.replace(config, accumulate=1), device)
    optim.schedule_lr(task.optimizer, lambda base: base)

    def train(batch: Batch) -> None:
        parallel.train()
        step([device.to_device(batch)])

    return train


def _inference(config: DetectionConfig, detector: Detector, task: Task, context: Context) -> Callable[[Batch], None]:
    device = context.backend
    classes = list(range(detection.class_count(detector, config)))
    detect = detection.compiled_detect(detector, task.model, classes, device)

    @torch.inference_mode()
    def infer(batch: Batch) -> None:
        task.model.eval()
        found = detect(device.to_device(batch))
        if detector.masks(config):
            finished(found)

    return infer


def _stream(
    part: str, config: DetectionConfig, detector: Detector, task: Task, context: Context
) -> tuple[Iterator[Batch], int]:
    """Endless batches of the data set as a part takes them, and the images of each, of all processes together.

    Inference has no batches that padding fills up, unless the data set is smaller than one.
    """
    if part == "training":
        index = detection.open_train(detector, config)
        plan = detection.train_plan(detector, config, index, context)
        return detection.train_stream(config, plan, context.backend, 0, 0), config.batch_size * context.world.size
    world, device, index = context.world, context.backend, detection.open_val(detector, config)
    images = detection.eval_batch_size(detector, config, task.model.eval(), index, world, device)
    together = images * world.size
    complete = max(1, len(index) // together)

    def again() -> Iterator[Batch]:
        while True:
            with contextlib.closing(detection.eval_stream(detector, config, index, world, device, images)) as batches:
                yield from itertools.islice(batches, complete)

    return again(), min(together, len(index))


def _measure(
    name: str,
    run: Callable[[Batch], None],
    batches: Iterator[Batch],
    config: DetectionConfig,
    at_once: int,
    context: Context,
) -> dict[str, Any]:
    """at_once: images of an iteration, of all processes together."""
    if context.world.rank == 0:
        counts = f"{config.benchmark_warmup} iterations to warm up, {config.benchmark_iterations} measured"
        print(f"measuring {name}: {counts}", file=sys.stderr, flush=True)
    for _ in range(config.benchmark_warmup):
        run(next(batches))
    context.backend.synchronize()
    times = []
    for _ in range(config.benchmark_iterations):
        start = time.perf_counter()
        run(next(batches))
        context.backend.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "name": name,
        "images_per_s": len(times) * at_once / sum(times),
        "median_images_per_s": at_once / statistics.median(times),
        "min_images_per_s": at_once / max(times),
        "max_images_per_s": at_once / min(times),
        **speed.latencies(times),
        "peak_gib": context.backend.peak_memory_gib(),
        "iterations": len(times),
    }
