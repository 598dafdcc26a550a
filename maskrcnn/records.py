"""What the original's users find after a run: log.txt, model_<iteration>.pth, last_checkpoint, the dllogger summary."""

import datetime
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from detcore.training.checkpoint import link_or_copy
from detcore.training.mlperf import SUCCESS
from detcore.training.records import JsonSummary, unwritable
from maskrcnn.config import Config
from maskrcnn.last_checkpoint import LAST

FINAL = "model_final.pth"
METRICS = {"AP": "BBOX_mAP", "segm_AP": "MASK_mAP", "AR@100": "AR@100", "AR@1000": "AR@1000"}
"""And what the summary calls them."""
WINDOW = 20  # intervals that a median is of


def inference_speed(found: Mapping[str, float]) -> dict[str, float]:
    """Images a second, and seconds of a batch where they were measured, under the summary's names.

    found: of `inference.evaluate` or `benchmark`, in milliseconds.
    """
    names = {"latency_avg": "mean_ms", "latency_90": "p90_ms", "latency_95": "p95_ms", "latency_99": "p99_ms"}
    times = {name: found[key] / 1e3 for name, key in names.items() if key in found}
    return {"inference_perf_fps": found["images_per_s"], **times}


def checkpoint_file(config: Config, step: int, completed: int | None) -> Path | None:
    """The checkpoint that lasts, every SOLVER.CHECKPOINT_PERIOD steps and at the end; None at another step.

    completed: epochs, None within one.
    """
    if not config.save_checkpoint:
        return None
    if completed == config.epochs if config.epochs else step == config.solver_max_iter:
        return config.output_dir / FINAL
    return None if step % config.solver_checkpoint_period else config.output_dir / f"model_{step:07d}.pth"


class Trainer:
    """The original's own log lines: medians over the last intervals, and means over the run in parentheses.

    An interval's values are means over its steps, where the original has the values of its last step alone.
    """

    def __init__(self, path: Path, images_per_step: int, memory_gib: Callable[[], float], *, append: bool):
        """Opens the file. Raises UserError if it can't be written."""
        self.images_per_step, self.memory_gib = images_per_step, memory_gib
        self.recent: dict[str, deque[float]] = {}
        self.sums: dict[str, tuple[int, float]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: TextIO = path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise unwritable("--output-dir", path, error) from error

    def step(self, fields: dict[str, Any], steps: int) -> None:
        """The line of an interval of so many steps."""
        seconds = self.images_per_step / max(fields["images_per_s"], 1e-9)
        times = {"time": seconds, "data": seconds * fields["data_wait"]}
        values = {"loss": fields["loss"], **fields["terms"], **times}
        parts = [self._meter(name, value, steps) for name, value in values.items()]
        count, total = self.sums["time"]
        eta = datetime.timedelta(seconds=round(total / count * (fields["last_step"] - fields["step"])))
        memory = round(self.memory_gib() * 1024)
        self._write("  ".join(
            (f"eta: {eta}", f"iter: {fields['step']}", *parts, f"lr: {fields['lr']:.6f}", f"max mem: {memory}")
        ))  # fmt: skip

    def end(self, seconds: float, steps: int) -> None:
        """The last lines of a training: the trainer's, and what scripts/train_benchmark.sh makes of it, printed too."""
        whole = str(datetime.timedelta(seconds=round(seconds)))
        self._write(f"Total training time: {whole} ({seconds / steps:.4f} s / it)")
        line = f"Training perf is: {steps * self.images_per_step / seconds:f} FPS"
        print(line, file=self.file, flush=True)
        print(line, flush=True)

    def _meter(self, name: str, value: float, steps: int) -> str:
        recent = self.recent.setdefault(name, deque(maxlen=WINDOW))
        recent.append(value)
        count, total = self.sums.get(name, (0, 0.0))
        count, total = self.sums[name] = count + steps, total + value * steps
        return f"{name}: {statistics.median(recent):.4f} ({total / count:.4f})"

    def _write(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"{now},{int(time.time() % 1 * 1000):03d} maskrcnn_benchmark.trainer INFO: {text}\n")
        self.file.flush()


class Records:
    """The observer of a training, on rank 0: it keeps log.txt, last_checkpoint and the summary.

    memory_gib(): the most memory that the device has given out so far.
    """

    def __init__(self, config: Config, summary: JsonSummary, images_per_step: int, memory_gib: Callable[[], float]):
        self.config, self.summary = config, summary
        self.images_per_step, self.memory_gib = images_per_step, memory_gib
        self.trainer: Trainer | None = None
        self.before = self.steps = 0  # of the run, when this process began, and now
        self.seconds = 0.0  # to the last step: what is evaluated after it is no training, as in the original
        self.newest = Path()

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                path, append = self.config.output_dir / "log.txt", self.config.resume
                self.trainer = Trainer(path, self.images_per_step, self.memory_gib, append=append)
            case "run_start":
                self.before = self.steps = fields["step"]
            case "step":
                self.trainer.step(fields, fields["step"] - self.steps)
                self.steps, self.seconds = fields["step"], fields["time_s"]
                data = {"learning_rate": fields["lr"], "loss": fields["loss"], **fields["terms"]}
                self.summary.log((fields["epoch"] - 1, fields["step"] - 1), data)
            case "saved" if path := fields["file"]:
                self._announce(path)
            case "eval":
                metrics = fields["metrics"]
                self.summary.log((fields["epoch"] - 1,), {METRICS[k]: metrics[k] for k in METRICS if k in metrics})
            case "end":
                if fields["status"] == SUCCESS and self.config.save_checkpoint:
                    self._finish()
                speed = {"e2e_train_time": self.seconds}
                if done := self.steps - self.before:
                    self.trainer.end(self.seconds, done)
                    speed["train_perf_fps"] = done * self.images_per_step / self.seconds
                self.summary.log((), speed)

    def _announce(self, path: Path) -> None:
        self.newest = path
        (self.config.output_dir / LAST).write_text(f"{path}\n", encoding="utf-8")

    def _finish(self) -> None:
        """A run that its targets have ended has a model_final.pth, too: last.pt under that name."""
        final, last = (self.config.output_dir / name for name in (FINAL, "last.pt"))
        if self.newest == final or not last.is_file():
            return
        link_or_copy(last, final)
        self._announce(final)
