"""What the original's users find after a run: the content of --json-summary, and epoch_*.pt (--save)."""

import tempfile
from pathlib import Path
from typing import Any

from detcore.device import select
from detcore.evaluation.coco import METRICS
from detcore.training.records import JsonSummary, unwritable
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


def parameters(config: Config, seed: int | None) -> dict[str, Any]:
    """The settings of a run under the original's names. seed: the one in use, which may have been drawn.

    "eval batch size" is "auto" where a GPU's memory decides it, which is later.
    """
    device, precision = select.resolve(config.device, config.precision)
    gpu = device not in ("cpu", "tpu")
    return {
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
    }


def speeds(results: list[dict[str, Any]]) -> dict[str, float]:
    """The speed with decoding of the data set's images, if that was measured; and what a step alone gives."""
    data = {}
    for result in results:  # those with data come last and are what counts
        for short, name in RATES.items():
            data[f"{short}_img/sec"] = data[f"{short}_img/sec, {result['name']}"] = result[name]
    return data


def epoch_file(config: Config, completed: int | None) -> Path | None:
    """The checkpoint after so many epochs, in the folder --save, by the original's count: epoch_0.pt after the first.

    None without --save, and within an epoch (completed None).
    """
    return config.save / f"epoch_{completed - 1}.pt" if config.save and completed else None


class Records:
    """The observer of a training, on rank 0: it keeps the summary.

    The folder --save is made here. Raises UserError if nothing can be written there.
    """

    def __init__(self, config: Config, summary: JsonSummary):
        self.config, self.summary = config, summary
        if config.save:
            try:
                config.save.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=config.save):
                    pass
            except OSError as error:
                raise unwritable("--save", config.save, error) from error

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                self.summary.log("PARAMETER", parameters(self.config, fields["config"]["seed"]))
            case "step":
                data = {"loss": fields["loss"], "learning rate": fields["lr"], "img/sec": fields["images_per_s"]}
                self.summary.log((fields["epoch"] - 1, fields["step"] - 1), data)
            case "epoch":
                self.summary.log((fields["epoch"] - 1,), {"time": fields["time_s"]})
            case "saved" if path := fields["file"]:
                self.summary.log((int(path.stem.removeprefix("epoch_")),), {"model path": str(path)})
            case "eval":
                print("\n".join(coco_lines(fields["metrics"])), flush=True)
                self.summary.log((fields["epoch"] - 1,), {"mAP": fields["metrics"]["AP"]})
            case "end":
                self.summary.log((), {"total time": fields["time_s"], "mAP": fields["best"]})
