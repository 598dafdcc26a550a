"""The part `floor`: what this machine can do at best."""

from collections.abc import Callable, Iterable

import torch

from tools.gpu_check.state import Context, Job, Row, load
from tools.gpu_check.timing import Stopwatch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def floor(context: Context) -> Iterable[Job]:
    """copy: GB/s read and written together. bf16, fp16, tf32, fp32: TFLOP/s of a square matrix product."""
    watch = Stopwatch(context)

    def copy() -> Row:
        # On a GPU five times what its cache holds (50 MB on an H100, 60 on an H200) at least.
        count = (2**28 if context.quick else 2**30) if context.gpu else 2**24
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=context.device)
        target = torch.empty_like(source)
        row = watch.time(lambda: target.copy_(source), least=10)
        return row | {"mib": count / 2**20, "gb_s": 2 * count / row["ms"] / 1e6}

    def multiply(precision: str) -> Callable[[], Row]:
        def run() -> Row:
            side = (256 if context.quick else 1024) if not context.gpu else 8192
            dtype = PRECISIONS[precision]
            # Random values: constant ones draw less power and so multiply faster than a network's.
            a, b = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            try:
                row = watch.time(lambda: a @ b, least=5)
            finally:
                torch.backends.cuda.matmul.fp32_precision = before
            return row | {"side": side, "tflop_s": 2 * side**3 / row["ms"] / 1e9}

        return run

    yield "copy", copy
    for precision in ("bf16", "fp16", "tf32", "fp32") if context.gpu else ("fp32",):
        yield precision, multiply(precision)


def rates(context: Context) -> tuple[float | None, dict[str, float]]:
    """Copy GB/s (None if not measured) and TFLOP/s by precision, as the part `floor` found them."""
    rows = load(context.out)["parts"].get("floor", {}).get("rows", {})
    return rows.get("copy", {}).get("gb_s"), {k: r["tflop_s"] for k, r in rows.items() if "tflop_s" in r}
