"""Where a step's milliseconds go: its kernels by family, for the rows that ask for it."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu_check.floor import rates
from tools.gpu_check.state import Context, Row

FAMILIES = (
    ("nccl", r"nccl"),
    (
        "layout",  # a copy that is not vectorized has strides which differ from its source's
        r"^(?!aten::|triton).*(nchwtonhwc|nhwctonchw|foldednhwc|addpadding|transpose\w*kernel|permut\w*kernel"
        r"|tensortransform|(?<!_)elementwise_kernel<.*direct_copy)",
    ),
    ("memcpy", r"^memcpy|^memset|copy_kernel|direct_copy|aten::copy_|^aten::(to|_to_copy)$"),
    ("matching", r"match"),
    ("loss", r"focal|sigmoid|softplus|box_loss|l1_loss|smooth"),
    ("optimizer", r"adam|optimizer|multi_tensor|foreach"),
    ("normalize", r"normalize"),
    ("quantise", r"^(largest|narrow)_kernel"),
    (
        "convolution/gemm",
        r"conv|gemm|cudnn|cutlass|xmma|wgrad|dgrad|fprop|implicit|mm$|addmm|bmm|nvjet|winograd|weight_gradient",
    ),
    (
        "batchnorm/elementwise",
        r"bias_relu|batch_?norm|bn_|elementwise|relu|vectorized|triton|aten::(add|mul|sub|div)|threshold",
    ),
)
"""What a kernel is for, by its name in small letters: the first family whose pattern is in it; else "other"."""
OURS = {
    **dict.fromkeys(("used", "highest", "match", "wanted_deltas"), "matching"),
    **dict.fromkeys(("focal", "biased_focal", "column_sums", "box", "scale", "total"), "loss"),
    **dict.fromkeys(("bias_relu", "mask", "mask_sums", "channel_sums", "pool_bias_relu"), "batchnorm/elementwise"),
    **dict.fromkeys(("norm_moments", "norm_merge", "norm_act", "norm_sums", "norm_input"), "batchnorm/elementwise"),
    **dict.fromkeys(("fuse", "fuse_backward", "fuse_weights", "fuse_gather"), "batchnorm/elementwise"),
    "normalize": "normalize",
    "fold": "memcpy",
}
"""The same for the kernels of csrc/, all of them detcore::<name>_kernel."""
STEPS = 3
"""So many steps are profiled."""


def family(name: str) -> str:
    own = re.search(r"detcore::(?:\(anonymous namespace\)::)?(\w+)_kernel", name)
    if own and own[1] in OURS:
        return OURS[own[1]]
    low = (own[1] if own else name).lower()
    return next((kind for kind, pattern in FAMILIES if re.search(pattern, low)), "other")


def traced(run: Callable[[], Any], gpu: bool, times: int = 1) -> dict[str, tuple[float, float]]:
    """Name: (milliseconds, calls) of one run(), of everything that ran on the device (on a CPU: of every operator by
    itself); from so many runs."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        for _ in range(times):
            run()
        if gpu:
            torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in recorded.key_averages():
        if event.is_user_annotation or gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue  # an annotation, such as an optimizer's, spans kernels that are counted by themselves
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micros > 0:
            found[event.key] = (micros / 1e3 / times, event.count / times)
    return found


def layout_kernels(names: Any) -> list[str]:
    """Those that only bring values into another order in memory."""
    return [name for name in names if family(name) == "layout"]


def profile_step(step: Any, context: Context, gflop: float) -> Row:
    """{ms, families, top, layout, next} of a TrainStep that is warm; gflop: of an image.

    ms: the sum of its kernels, more than the step's time where some run side by side. families: {name: {ms, share,
    floor_ms}}. top: the 15 largest kernels. layout: {name: ms} of the kernels that only change the order in memory.
    """
    kernels = traced(step, context.gpu, STEPS)
    if not kernels:
        return {"error": "the profiler recorded no kernel"}
    families: dict[str, float] = defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        families[family(name)] += milliseconds
    total, floors = sum(families.values()), family_floors(step, context, gflop)
    rows = {
        name: {"ms": value, "share": value / total, "floor_ms": floors.get(name)}
        for name, value in sorted(families.items(), key=lambda item: -item[1])
    }
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:15]
    top = [{"kernel": name[:200], "ms": ms, "calls": calls, "family": family(name)} for name, (ms, calls) in largest]
    layout = {name[:200]: kernels[name][0] for name in layout_kernels(kernels)}
    return {"ms": total, "families": rows, "top": top, "layout": layout, "next": next_things(rows)}


def family_floors(step: Any, context: Context, gflop: float) -> dict[str, float]:
    """Milliseconds that a family can't do without: its arithmetic or its bytes at the measured rates, where known.

    gflop: of an image, of the benchmark's own model. Elementwise work and changes of layout have none, since they can
    be fused into the convolutions or left out.
    """
    copy, rate = rates(context)
    config, model = step.config, step.task.model
    floors = {"batchnorm/elementwise": 0.0, "memcpy": 0.0, "layout": 0.0, "other": 0.0}
    if copy:
        wide = config.precision in ("fp32", "tf32")
        if hasattr(model, "anchors"):
            logits = config.batch_size * len(model.anchors) * step.classes * (4 if wide else 2)
            floors["loss"] = 2 * logits / copy / 1e6  # logits read, gradient written
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        floors["optimizer"] = 28 * trained / copy / 1e6  # weight, two moments, gradient read; three of them written
    if context.gpu and config.precision in rate:
        floors["convolution/gemm"] = config.batch_size * gflop / rate[config.precision]
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
