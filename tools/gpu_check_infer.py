"""The parts `inference` and `profile` of tools/gpu_check.py."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from gpu_check_core import Context, Job, Row, Stopwatch
from gpu_check_ops import rates
from gpu_check_train import GFLOP_PER_IMAGE, TrainStep, retinanet
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from detcore import backend, checkpoint, detection
from detcore.data import Batch
from detcore.data.synthetic import synthetic_batches
from detcore.state import State
from single_stage_detector.data import DETECTOR

FAMILIES = (
    ("nccl", r"nccl"),
    ("memcpy", r"^memcpy|^memset|copy_kernel|direct_copy|aten::copy_|^aten::(to|_to_copy)$"),
    ("matching", r"match"),
    ("loss", r"focal|sigmoid|softplus|box_loss|l1_loss|smooth"),
    ("optimizer", r"adam|optimizer|multi_tensor|foreach"),
    ("normalize", r"normalize"),
    (
        "convolution/gemm",
        r"conv|gemm|cudnn|cutlass|xmma|wgrad|dgrad|fprop|implicit|mm$|addmm|bmm|nvjet|winograd|nchwtonhwc",
    ),
    (
        "batchnorm/elementwise",
        r"bias_relu|batch_?norm|bn_|elementwise|relu|vectorized|triton|aten::(add|mul|sub|div)|threshold",
    ),
)  # fmt: skip
"""What a kernel is for, by its name: the first family whose pattern is in it; else "other"."""
OURS = {
    **dict.fromkeys(("used", "highest", "match"), "matching"),
    **dict.fromkeys(("focal", "box", "scale", "total"), "loss"),
    **dict.fromkeys(("bias_relu", "mask", "mask_sums", "channel_sums"), "batchnorm/elementwise"),
    "normalize": "normalize",
}
"""The same for the kernels of csrc/, all of them detcore::<name>_kernel."""


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
    find = detection.finder(DETECTOR, model, range(context.sizes.classes), device)
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


def infer(config: Any, what: str, mode: str, context: Context, watch: Stopwatch) -> Row:
    """images/s of the model of a config of any program, what: "forward" or "forward+postprocess"."""
    batch, step = config.batch_size, TrainStep(config)
    recording = backend.select(context.device.type, config.precision, graphs="on") if mode == "graph" else step.backend
    model, device, fixed = step.task.model.eval(), step.backend, step.batch
    detect, category_ids = import_module(f"{config.program}.data").detect, torch.arange(step.classes).to(device.device)

    def forward(batch: Batch) -> Tensor:
        with device.autocast():
            outputs = model(batch.images)
        return torch.stack([part.flatten()[0].float() for part in tree_leaves(outputs)])

    def both(batch: Batch) -> Tensor:
        return detect(model, batch, device, category_ids)

    run = recording.compile_inference(forward if what == "forward" else both)
    try:
        with torch.inference_mode():
            row = watch.time(lambda: run(fixed), least=5, most=200)
    finally:
        recording.close()
    row |= {"batch": batch, "mode": mode, "ops": config.ops, "images_per_s": 1e3 * batch / row["ms"]}
    if context.gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def profiled(context: Context) -> Iterable[Job]:
    """Milliseconds a step by kernel family, and the 15 largest kernels: the main configuration, the eager reference."""
    precision = "bf16" if context.gpu else "fp32"
    modes = (("graph", "native"), ("eager", "reference")) if context.gpu else (("eager", "native"),)
    for mode, ops in modes:
        key = f"{precision} b{context.sizes.batch} {mode} {ops}"
        yield key, lambda mode=mode, ops=ops: profile_step(context, precision, mode, ops)


def profile_step(context: Context, precision: str, mode: str, ops: str) -> Row:
    step = TrainStep(retinanet(context, context.sizes.batch, precision, mode, ops))
    for _ in range(5):
        step()
    steps = 3
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.gpu else [])]
    step.backend.synchronize()
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        step.backend.synchronize()
    step.close()
    kernels = kernel_times(recorded, context.gpu, steps)
    if not kernels:
        return {"error": "the profiler recorded no kernel"}
    families = defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        families[family(name)] += milliseconds
    total = sum(families.values())
    floors = family_floors(context, precision, step)
    rows = {
        name: {"ms": value, "share": value / total, "floor_ms": floors.get(name)}
        for name, value in sorted(families.items(), key=lambda item: -item[1])
    }
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:15]
    top = [{"kernel": name[:200], "ms": ms, "calls": calls, "family": family(name)} for name, (ms, calls) in largest]
    return {"mode": mode, "ops": ops, "ms": total, "families": rows, "top": top, "next": next_things(rows)}


def kernel_times(recorded: profile, gpu: bool, steps: int) -> dict[str, tuple[float, float]]:
    """Name: (milliseconds, calls) a step, of everything that ran on the device (on a CPU: of every operator itself)."""
    found: dict[str, tuple[float, float]] = {}
    for event in recorded.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if gpu != on_gpu:
            continue
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micros > 0:
            found[event.key] = (micros / 1e3 / steps, event.count / steps)
    return found


def family(name: str) -> str:
    own = re.search(r"detcore::(?:\(anonymous namespace\)::)?(\w+)_kernel", name)
    if own:
        return OURS.get(own[1], "other")
    low = name.lower()
    return next((kind for kind, pattern in FAMILIES if re.search(pattern, low)), "other")


def family_floors(context: Context, precision: str, step: TrainStep) -> dict[str, float]:
    """Milliseconds that a family can't do without: its arithmetic or its bytes at the measured rates, where known.

    Only for the benchmark's own model, whose arithmetic is known; elementwise work has none, since it can be fused
    into the convolutions.
    """
    copy, rate = rates(context)
    batch, parameters = context.sizes.batch, sum(p.numel() for p in step.task.model.parameters() if p.requires_grad)
    floors = {"batchnorm/elementwise": 0.0, "memcpy": 0.0, "other": 0.0}
    if copy:
        logits = (
            batch * len(step.task.model.anchors) * context.sizes.classes * (4 if precision in ("fp32", "tf32") else 2)
        )
        floors["loss"] = 2 * logits / copy / 1e6  # logits read, gradient written
        floors["optimizer"] = 28 * parameters / copy / 1e6  # weight, two moments, gradient read; three of them written
    if context.gpu and precision in rate:
        floors["convolution/gemm"] = batch * GFLOP_PER_IMAGE / rate[precision]
    return floors


def next_things(rows: dict[str, Row]) -> list[str]:
    """The three families with the most milliseconds above their floor, in words."""
    over = {name: row["ms"] - (row["floor_ms"] or 0.0) for name, row in rows.items()}
    told = []
    for name in sorted(over, key=lambda name: -over[name])[:3]:
        row = rows[name]
        floor = "floor unknown" if row["floor_ms"] is None else f"floor {row['floor_ms']:.2f} ms"
        told.append(
            f"{name}: {row['ms']:.2f} ms a step ({row['share']:.0%}), {floor}: {over[name]:.2f} ms to win at most"
        )
    return told
