"""What the original's users find after a run: log.txt, model_<iteration>.pth, last_checkpoint, the dllogger summary."""

import datetime
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from detcore.training.checkpoint import link_or_copy
from detcore.training.mlperf import SUCCESS
from detcore.training.records import JsonSummary, unwritable
from maskrcnn.config import Config
from maskrcnn.last_checkpoint import LAST

FINAL = "model_final.pth"
METRICS = {"AP": "BBOX_mAP", "segm_AP": "MASK_mAP"}  # and what the summary calls them
WINDOW = 20  # intervals that a median is of


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

    def step(self, fields: dict[str, Any]) -> None:
        """The line of an interval."""
        seconds = self.images_per_step / max(fields["images_per_s"], 1e-9)
        times = {"time": seconds, "data": seconds * fields["data_wait"]}
        parts = [self._meter(name, value) for name, value in {"loss": fields["loss"], **fields["terms"]}.items()]
        parts += [self._meter(name, value) for name, value in times.items()]
        count, total = self.sums["time"]
        eta = datetime.timedelta(seconds=round(total / count * (fields["last_step"] - fields["step"])))
        memory = round(self.memory_gib() * 1024)
        self._write("  ".join(
            (f"eta: {eta}", f"iter: {fields['step']}", *parts, f"lr: {fields['lr']:.6f}", f"max mem: {memory}")
        ))  # fmt: skip

    def end(self, seconds: float, steps: int) -> None:
        """The last line of a training."""
        whole = str(datetime.timedelta(seconds=round(seconds)))
        self._write(f"Total training time: {whole} ({seconds / max(steps, 1):.4f} s / it)")

    def _meter(self, name: str, value: float) -> str:
        recent = self.recent.setdefault(name, deque(maxlen=WINDOW))
        recent.append(value)
        count, total = self.sums.get(name, (0, 0.0))
        self.sums[name] = count + 1, total + value
        return f"{name}: {statistics.median(recent):.4f} ({(total + value) / (count + 1):.4f})"

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
        self.newest = Path()

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                path, append = self.config.output_dir / "log.txt", self.config.resume
                self.trainer = Trainer(path, self.images_per_step, self.memory_gib, append=append)
            case "run_start":
                self.before = self.steps = fields["step"]
            case "step":
                self.steps = fields["step"]
                self.trainer.step(fields)
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
                seconds = fields["time_s"]
                done = self.steps - self.before
                self.trainer.end(seconds, done)
                speed = {"e2e_train_time": seconds}
                if seconds and done:
                    speed["train_perf_fps"] = done * self.images_per_step / seconds
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
