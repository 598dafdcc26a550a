"""What the training loop needs to know of a benchmark: values and functions, nothing else."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detcore import cli
from detcore.data.batch import Batch
from detcore.device.backend import Backend
from detcore.processes.launcher import World
from detcore.training.progress import duration

Beat = Callable[[str, int], None]


class Pending(Protocol):
    """Metrics that are being computed elsewhere; poll returns None until they are there."""

    def poll(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Data:
    """An opened data set as the loop needs it.

    train_batches(epoch, micro_batch): an endless stream from that position on (both from 0).
    evaluate(model, beat): runs the model over this rank's evaluation images; returns a Pending on rank 0, None
    elsewhere. Its result holds the metrics by name. beat(phase, count) tells the watchdog of progress.
    classes: (the file's category id, name) of each class index; kept in checkpoints, for prediction.
    micro_batches: forward passes of an epoch and process; where --accumulate does not divide them, the last step of the
    epoch has fewer, and the mean over these is what it minimises. 0: steps_per_epoch times --accumulate.
    advise(images per second, fraction of the time spent waiting for data): what holds the loader back, in words.
    """

    train_samples: int
    eval_samples: int
    steps_per_epoch: int
    train_batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[nn.Module, Beat], Pending | None]
    close: Callable[[], None]
    summary: str = ""
    classes: tuple[tuple[int, str], ...] = ()
    micro_batches: int = 0
    advise: Callable[[float, float], str] = lambda rate, wait: ""

    def passes(self, step: int, accumulate: int) -> int:
        """Forward passes of a global step: `accumulate`, or what an epoch leaves for its last one."""
        whole = self.micro_batches or self.steps_per_epoch * accumulate
        return min(accumulate, whole - step % self.steps_per_epoch * accumulate)


@dataclass(frozen=True)
class Task:
    """One benchmark, as values and functions.

    model: on its device. lr(step, steps_per_epoch): learning rate of a global step. loss(model, batch): named scalar
    terms, each a mean over the batch, whose sum is minimised. open_data: called after RUN_START. target: the run ends
    with success when `metric` reaches it; None trains all epochs. eval_epochs(completed): whether to evaluate then.
    hyperparameters: MLPerf event names and values, logged before INIT_STOP. example: a synthetic batch of the shapes of
    training, on which a step is warmed up before RUN_START; without it steps are not recorded. prepare_evaluation: does
    the same for evaluations; called before RUN_START, too. observe(kind, fields):
    called on rank 0 with each record of progress.jsonl; "epoch" (epoch, from 1; time_s: seconds of its steps in this
    process) when its last step is done; and "saved" (path, epoch_file) when a checkpoint is written. epoch_file(epochs
    completed): made the same file as the checkpoint written then, in a folder that exists; None: no further file.
    warmup_option: the option that lengthens the warm-up, for the advice on a loss that is not finite; "": none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int, int], float]
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]
    open_data: Callable[[], Data]
    metric: str
    target: float | None
    eval_epochs: Callable[[int], bool]
    hyperparameters: dict[str, Any]
    notes: tuple[str, ...] = ()
    example: Callable[[], Batch] | None = None
    prepare_evaluation: Callable[[], None] = lambda: None
    observe: Callable[[str, dict[str, Any]], None] | None = None
    epoch_file: Callable[[int], Path | None] = lambda completed: None
    warmup_option: str = ""


@dataclass(frozen=True)
class Context:
    """Where and who this process is; handed to the function that builds the Task."""

    backend: Backend
    world: World
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended; best and best_epoch (epochs completed) are None before the first result."""

    code: int
    step: int
    best: float | None
    best_epoch: int | None
    seconds: float


def summary(outcome: Outcome, task: Task, folder: Path, epochs: int, number: int) -> str:
    """The closing words of a run of so many epochs at most; number: of the signal that ended it."""
    where = f"after {duration(outcome.seconds)}; the log, the checkpoints and progress.jsonl lie in {folder}"
    best = "no evaluation yet"
    if outcome.best is not None:
        best = f"best {task.metric} {outcome.best:.4f} after epoch {outcome.best_epoch}"
    match outcome.code:
        case cli.OK if task.target is not None:
            return f"Target {task.target:g} reached: {best}, {where}"
        case cli.OK:
            return f"Done: {best}, {where}"
        case cli.TARGET_NOT_REACHED:
            return f"Target {task.target:g} NOT reached in {epochs} epochs: {best}, {where}"
        case cli.STOPPED:
            return f"Stopped by {signal.Signals(number).name}: {best}, {where}. Go on with --resume."
    return f"Aborted at step {outcome.step}: {best}, {where}"
