"""What the original's users find after a run: dllogger's JSON lines (--json-summary), and epoch_*.pt (--save)."""

import datetime
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcore import UserError
from detcore.device import backend
from detcore.evaluation.coco import METRICS
from ssd300.config import Config

RATES = {
    "avg": "images_per_s", "med": "median_images_per_s", "min": "min_images_per_s", "max": "max_images_per_s",
}  # fmt: skip
"""The original's names of speeds, and those of `detcore.detection.benchmark`."""


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
    With path None nothing is written. The file is opened here, and elapsedtime counts from here; without `append` what
    was in it goes with the first line, so that a run which is refused loses nothing. Raises UserError if it can't be
    written.
    """

    def __init__(self, path: Path | None, *, append: bool = False):
        self._begin = time.time()
        self._path, self._file, self._append = path, None, append
        if path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise _unwritable("--json-summary", path, error) from error

    def log(self, step: str | Sequence[int], data: dict[str, Any]) -> None:
        """One line, flushed. Raises UserError if it can't be written."""
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
        try:
            if not self._append and self._path.is_file():  # a pipe or a device has nothing to remove
                self._file.truncate(0)
            self._append = True
            self._file.write(f"DLLL {json.dumps(line)}\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable("--json-summary", self._path, error) from error

    def parameters(self, config: Config, seed: int | None) -> None:
        """The settings of a run under the original's names. seed: the one in use, which may have been drawn.

        "eval batch size" is "auto" where a GPU's memory decides it, which is later.
        """
        device, precision = backend.resolve(config.device, config.precision)
        gpu = device not in ("cpu", "tpu")
        self.log(
            "PARAMETER",
            {
                "dataset path": str(config.dataset_path),
                "epochs": config.epochs,
                "batch size": config.batch_size,
                "eval batch size": config.eval_batch_size or ("auto" if gpu else config.batch_size),
                "no cuda": not gpu,
                "seed": seed,
                "checkpoint path": str(config.checkpoint) if config.checkpoint else None,
                "mode": config.original_mode,
                "eval on epochs": list(config.evaluation),
                "lr decay epochs": list(config.decay_epochs),
                "learning rate": config.lr,
                "momentum": config.momentum,
                "weight decay": config.weight_decay,
                "lr warmup": config.warmup,
                "backbone": config.backbone,
                "backbone path": str(config.weights) if config.weights else None,
                "num workers": config.workers,
                "AMP": precision in ("bf16", "fp16"),
                "precision": precision,
            },
        )

    def benchmark(self, results: list[dict[str, Any]]) -> None:
        """The speed with decoding of the data set's images, if that was measured; and what a step alone gives."""
        data = {}
        for result in results:  # those with data come last and are what counts
            for short, name in RATES.items():
                data[f"{short}_img/sec"] = data[f"{short}_img/sec, {result['name']}"] = result[name]
        self.log((), data)


def epoch_file(config: Config, completed: int) -> Path | None:
    """The checkpoint after so many epochs, in the folder --save, by the original's count: epoch_0.pt after the first.

    None without --save.
    """
    return config.save / f"epoch_{completed - 1}.pt" if config.save else None


class Records:
    """The observer of a training, on rank 0: it keeps the summary.

    The folder --save is made here. Raises UserError if nothing can be written there.
    """

    def __init__(self, config: Config, summary: Summary):
        self.config, self.summary = config, summary
        if config.save:
            try:
                config.save.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=config.save):
                    pass
            except OSError as error:
                raise _unwritable("--save", config.save, error) from error

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                self.summary.parameters(self.config, fields["config"]["seed"])
            case "step":
                data = {"loss": fields["loss"], "learning rate": fields["lr"], "img/sec": fields["images_per_s"]}
                self.summary.log((fields["epoch"] - 1, fields["step"] - 1), data)
            case "epoch":
                self.summary.log((fields["epoch"] - 1,), {"time": fields["time_s"]})
            case "saved" if path := fields["epoch_file"]:
                self.summary.log((int(path.stem.removeprefix("epoch_")),), {"model path": str(path)})
            case "eval":
                print("\n".join(coco_lines(fields["metrics"])), flush=True)
                self.summary.log((fields["epoch"] - 1,), {"mAP": fields["metrics"]["AP"]})
            case "end":
                self.summary.log((), {"total time": fields["time_s"], "mAP": fields["best"]})


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{option} {path} can't be written: {error.strerror or error}. Give another path or free space.")
