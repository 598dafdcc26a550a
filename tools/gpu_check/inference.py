"""images/s of inference of any program."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from detcore.data.batch import Batch
from detcore.detection import detector as detection
from detcore.device.select import select_backend
from tools.gpu_check.state import Context, Row
from tools.gpu_check.steps import Program
from tools.gpu_check.timing import Stopwatch


def infer(config: Any, what: str, mode: str, context: Context, watch: Stopwatch) -> Row:
    """images/s of the model of a config of any program, what: "forward" or "forward+postprocess"."""
    batch, program = config.batch_size, Program(config)
    model, device, fixed = program.task.model.eval(), program.backend, program.batch
    recording = select_backend(context.device.type, config.precision, graphs="on") if mode == "graph" else device
    detector = import_module(f"{config.program}.data").DETECTOR
    category_ids = torch.arange(program.classes).to(device.device)

    def forward(batch: Batch) -> Tensor:
        with device.autocast():
            outputs = model(batch.images)
        return torch.stack([part.flatten()[0].float() for part in tree_leaves(outputs)])

    def both(batch: Batch) -> Tensor:
        return detection.detect(detector, model, batch, device, category_ids)

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
