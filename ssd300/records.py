"""What the original's users read after a run: dllogger's JSON lines (--json-summary), and epoch_*.pt (--save)."""

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcore import backend, checkpoint
from detcore.evaluation.coco import METRICS
from ssd300.config import Config

RATES = {
    "avg": "images_per_s", "med": "median_images_per_s", "min": "min_images_per_s", "max": "max_images_per_s",
}  # fmt: skip
"""The original's names of speeds, and those of `detcore.benchmark`."""


_AREAS = {"s": "small", "m": "medium", "l": "large"}


def coco_lines(metrics: dict[str, Any]) -> list[str]:
    """The twelve lines that pycocotools prints."""
    lines = []
    for name in METRICS:
        kind = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        iou = {"AP50": "0.50", "AP75": "0.75"}.get(name, "0.50:0.95")
        most = int(name[2:]) if name.startswith("AR1") else 100
        line = f" {kind} @[ IoU={iou:<9} | area={_AREAS.get(name[-1], 'all'):>6} | maxDets={most:>3} ]"
        lines.append(f"{line} = {metrics[name]:0.3f}")
    return lines


class Summary:
    """A file in the format of dllogger's JSONStreamBackend: "DLLL " and one object a line, with type, step and data.

    step is "PARAMETER", [epoch, iteration] or [epoch] (both from 0), and [] for what holds for the whole run.
    With path None nothing is written.
    """

    def __init__(self, path: Path | None, *, append: bool = False):
        self._begin = time.time()
        self._file = None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a" if append else "w", encoding="utf-8")

    def log(self, step: str | Sequence[int], data: dict[str, Any]) -> None:
        """One line, flushed."""
        if not self._file:
            return
        now = time.time()
        line = {
            "timestamp": str(now),
            "datetime": str(datetime.datetime.fromtimestamp(now)),
            "elapsedtime": str(now - self._begin),
            "type": "LOG",
            "step": step if isinstance(step, str) else list(step),
            "data": data,
        }
        self._file.write(f"DLLL {json.dumps(line)}\n")
        self._file.flush()

    def parameters(self, config: Config, seed: int | None) -> None:
        """The settings of a run under the original's names. seed: the one in use, which may have been drawn."""
        device, precision = backend.resolve(config.device, config.precision)
        self.log(
            "PARAMETER",
            {
                "dataset path": str(config.dataset_path),
                "epochs": config.epochs,
                "batch size": config.batch_size,
                "eval batch size": config.eval_batch_size or config.batch_size,
                "no cuda": device == "cpu",
                "seed": seed,
                "checkpoint path": str(config.checkpoint) if config.checkpoint else None,
                "mode": config.original_mode,
                "eval on epochs": list(config.evaluation),
                "lr decay epochs": list(config.multistep),
                "learning rate": config.lr,
                "momentum": config.momentum,
                "weight decay": config.weight_decay,
                "lr warmup": config.warmup,
                "backbone": config.backbone,
                "backbone path": str(config.weights) if config.weights else None,
                "num workers": config.workers,
                "AMP": precision in ("bf16", "fp16"),
                "precision": config.precision,
            },
        )

    def benchmark(self, results: list[dict[str, Any]]) -> None:
        """The speed with decoding of the data set's images, if that was measured; and what a step alone gives."""
        data = {}
        for result in results:  # those with data come last and are what counts
            for short, name in RATES.items():
                data[f"{short}_img/sec"] = data[f"{short}_img/sec, {result['name']}"] = result[name]
        self.log((), data)


class Records:
    """A task's observer: keeps the summary, and a copy of the checkpoint of each epoch.

    A copy is a hard link where the file system has them, so that it takes no second write.
    """

    def __init__(self, config: Config):
        self.save = config.save
        self.summary = Summary(config.json_summary, append=config.resume)
        self.config = config
        self.steps_per_epoch = 0
        self._epoch_began = 0.0

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                self.summary.parameters(self.config, fields["config"]["seed"])
            case "step":
                data = {"loss": fields["loss"], "learning rate": fields["lr"], "img/sec": fields["images_per_s"]}
                self.summary.log((fields["epoch"] - 1, fields["step"] - 1), data)
            case "saved" if fields["step"] % fields["steps_per_epoch"] == 0:
                self._epoch(fields["step"] // fields["steps_per_epoch"] - 1, fields["path"], fields["time_s"])
            case "eval":
                print("\n".join(coco_lines(fields["metrics"])), flush=True)
                self.summary.log((fields["epoch"] - 1,), {"mAP": fields["metrics"]["AP"]})
            case "end":
                self.summary.log((), {"total time": fields["time_s"], "mAP": fields["best"]})

    def _epoch(self, epoch: int, last: Path, now: float) -> None:
        self.summary.log((epoch,), {"time": now - self._epoch_began})
        self._epoch_began = now
        if self.save:
            self.save.mkdir(parents=True, exist_ok=True)
            path = self.save / f"epoch_{epoch}.pt"
            checkpoint.link_or_copy(last, path)
            self.summary.log((epoch,), {"model path": str(path)})
