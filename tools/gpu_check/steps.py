"""Training steps of any program's Config: images/s, losses, kernels.

They go through what a real run goes through: `build_task`, `engine.make_train_step` and with it the backend's
compile_step, chosen by the options of Config; the batch is synthetic and lies on the device, so no loader limits it.
"""

import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from detcore.detection.detector import class_count, examples
from detcore.device import native
from detcore.nn import optim
from detcore.processes.launcher import World
from detcore.training import engine
from detcore.training.state import State
from detcore.training.task import Context as RunContext
from tools.gpu_check.floor import rates
from tools.gpu_check.kernels import profile_step
from tools.gpu_check.state import Context, Row, Skip
from tools.gpu_check.timing import Stopwatch

UPDATES = 5
"""Updates at RATE between the two losses of a row."""
RATE = 1e-4
NARROW = tuple(name for name in native.VARIANTS if name not in ("fp8_heads", "norm_activations", "pyramid_nodes"))
"""Those of detcore that compute the same numbers; the last two are one program's alone."""
ALL_BUT_FP8 = {"variants": NARROW, "what": "+all but fp8_heads"}


@dataclass(frozen=True)
class Scale:
    """What a benchmark's images/s are set beside: GFLOP of a training step an image (2 per multiplication and
    addition); {card: images/s} that others have published."""

    gflop: float
    published: dict[str, float] = field(default_factory=dict)


def run_options(context: Context, batch: int, precision: str, mode: str, ops: str) -> dict[str, Any]:
    """Options of a Config that every program has."""
    own = {"graphs": "on" if "graph" in mode else "off", "compile": "compiled" in mode, "ops": ops}
    device = "cuda" if context.gpu else "cpu"
    return {"synthetic": True, "device": device, "precision": precision, "batch_size": batch, "seed": 1, **own}


class Program:
    """Device, task and a batch of a config of any of the programs; the same objects as in engine.train.

    Raises Skip for native ops that are not built.
    """

    def __init__(self, config: Any):
        missing = list(filter(None, map(native.load, native.libraries(config.program))))
        if missing and config.ops == "native":
            raise Skip(missing[0])
        self.config = config
        self.backend = engine.open_device(config, World())
        torch.manual_seed(1)
        self.task = import_module(f"{config.program}.train").build_task(config, RunContext(self.backend, World(), 1))
        detector = import_module(f"{config.program}.data").DETECTOR
        self.classes = class_count(detector, config)
        self.batch = self.backend.to_device(examples(detector, config, self.classes, 1)[0])


class TrainStep(Program):
    """A training step, warmed up, to be called."""

    def __init__(self, config: Any):
        super().__init__(config)
        state = State(self.task.model, self.task.optimizer, self.backend.scaler(), None)
        self.step = engine.make_train_step(self.task, state, self.task.model, config, self.backend)
        self.task.model.train()

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.step([self.batch])

    def losses(self) -> tuple[float, float]:
        """The loss of the fresh weights and that after UPDATES updates, which warm the step up.

        The weights are the same in each row: the first loss tells whether its forward pass computes the same, the
        second whether its gradients do. After it the weights stay near where they are, as long as the clock runs.
        """
        optim.set_lr(self.task.optimizer, RATE)
        values = [float(sum(self().values())) for _ in range(UPDATES + 1)]
        optim.set_lr(self.task.optimizer, 1e-6)
        return values[0], values[-1]

    def close(self) -> None:
        self.backend.close()


def judge(row: Row, batch: int, context: Context, precision: str, scale: Scale) -> Row:
    """images/s and what they mean: against a published figure for this card and the floor of the arithmetic."""
    row |= {"batch": batch, "precision": precision, "images_per_s": 1e3 * batch / row["ms"]}
    row |= {"images_per_s_p10": 1e3 * batch / row["p90_ms"], "images_per_s_p90": 1e3 * batch / row["p10_ms"]}
    if not context.gpu:
        return row
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    card = torch.cuda.get_device_name()
    if figure := next((value for name, value in scale.published.items() if name in card), None):
        row["x_published"] = row["images_per_s"] / figure
    _, rate = rates(context)
    if precision in rate:
        row["percent_of_flop_floor"] = 100 * row["images_per_s"] * scale.gflop / 1e3 / rate[precision]
    return row


def train_row(config: Any, mode: str, context: Context, watch: Stopwatch, scale: Scale, profiled: bool = False) -> Row:
    """images/s of the training step of a config of any program, its losses (`TrainStep.losses`; "error" where one is
    not finite), and under "profile" its kernels by family."""
    step = TrainStep(config)
    try:
        losses = [value if math.isfinite(value) else str(value) for value in step.losses()]
        row = watch.time(step, warmup=1, least=5, most=100)
        row |= {"mode": mode, "ops": config.ops, "loss": losses[0], "later_loss": losses[1]}
        if not all(isinstance(value, float) for value in losses):
            row["error"] = f"a loss is not finite: {losses[0]}, after {UPDATES} updates {losses[1]}"
        row = judge(row, config.batch_size, context, config.precision, scale)
        if profiled:
            row["profile"] = profile_step(step, context, scale.gflop)
    finally:
        step.close()
        forget_compiled(mode)
    return row


def forget_compiled(mode: str) -> None:
    if "compiled" in mode:
        torch._dynamo.reset()
