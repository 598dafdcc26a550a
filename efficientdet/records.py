"""What the original's users find after a run: the content of --dllogger-file, and checkpoint_<epochs>.pt."""

from pathlib import Path
from typing import Any

from detcore.training.records import JsonSummary
from efficientdet.config import Config


def checkpoint_file(config: Config, completed: int | None) -> Path | None:
    """The checkpoint that lasts, every --save-checkpoint-interval epochs; None for others, and within an epoch."""
    every = config.save_checkpoint_interval
    return config.output_dir / f"checkpoint_{completed}.pt" if completed and every and not completed % every else None


class Records:
    """The observer of a training, on rank 0: it keeps the summary, under the original's keys.

    parameters: of the model, those that train and others. images_per_step: of all processes.
    """

    def __init__(self, config: Config, summary: JsonSummary, parameters: int, images_per_step: int):
        self.config, self.summary, self.parameters = config, summary, parameters
        self.images_per_step = images_per_step
        self.best = (0, -1.0)  # epoch from 0, and its metric

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        match kind:
            case "start":
                about = {"model_name": self.config.model, "param_count": self.parameters}
                self.summary.log("PARAMETER", {**about, "Scheduled_epochs": self.config.total_epochs})
            case "step":
                rate = fields["images_per_s"]
                # The original writes the throughput under three names over its versions.
                data = {"train_loss": fields["loss"], "throughput": rate, "train_throughput": rate, "lr": fields["lr"]}
                seconds = self.images_per_step / max(rate, 1e-9)
                times = {"train_batch_time": seconds, "train_data_time": seconds * fields["data_wait"]}
                self.summary.log((fields["epoch"] - 1, fields["step"] - 1), data | times)
            case "eval":
                value = fields["metrics"][self.config.metric]
                if value > self.best[1]:
                    self.best = fields["epoch"] - 1, value
                data = {"map": value, "best_map": self.best[1], "best_epoch": self.best[0]}
                self.summary.log((fields["epoch"] - 1,), data)
            case "end":
                self.summary.log((), {"best_map": fields["best"], "total_time": fields["time_s"]})
