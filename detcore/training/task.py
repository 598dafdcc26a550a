"""What the training loop needs to know of a benchmark: values and functions, nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.device.base import Backend
from detcore.processes.launcher import World

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

    model: on its device. lr(step, steps_per_epoch, base): the learning rate, at a global step from 0, of a parameter
    group whose own is `base` (the optimizer's at the start). loss(model, batch): named scalar terms, each a mean over
    the batch, whose sum is minimised. open_data: called after RUN_START.

    targets: names of metrics and what they must reach; the first is the primary one. `progress.merit` of them decides
    what best.pt is. The run ends with success when an evaluation reaches all of them; None instead of a number: no
    target. Without any number the run trains to its end. accuracy_names: of these metrics in the log's EVAL_ACCURACY,
    where rules have other names. total_steps: the run ends after so many optimizer steps, however many epochs they
    are (the last one may be cut short); None: after the config's epochs. eval_epochs(completed, epochs): whether to
    evaluate after so many epochs of so many.

    hyperparameters: MLPerf event names and values, logged before INIT_STOP. examples: synthetic batches of the shapes
    of training, one for each canvas, on which a step is warmed up before RUN_START; without them it is not, and not
    recorded. prepare_evaluation: does the same for evaluations; called before RUN_START, too. judge(epochs completed,
    metrics): a warning to the person at the console about an evaluation's result, such as one that comes too late;
    None: nothing to say. observe(kind, fields): called on rank 0 with each record of progress.jsonl; with "epoch"
    (epoch, from 1; time_s: seconds of its steps in this process) when its last step is done; with "saved" (path, step,
    file) when a checkpoint is written; and with "run_start" (step) when the clock starts. checkpoint_file(step, epochs
    completed, None within an epoch): made the same file as the checkpoint written then, in a folder that exists; None:
    no further file. warmup_option: the option that lengthens the warm-up, for the advice on a loss that is not finite;
    "": none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int, int, float], float]
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]
    open_data: Callable[[], Data]
    targets: Mapping[str, float | None]
    eval_epochs: Callable[[int, int], bool]
    hyperparameters: Mapping[str, Any]
    accuracy_names: Mapping[str, str] = field(default_factory=dict)
    total_steps: int | None = None
    notes: tuple[str, ...] = ()
    examples: Callable[[], Sequence[Batch]] | None = None
    prepare_evaluation: Callable[[], None] = lambda: None
    judge: Callable[[int, dict[str, Any]], str | None] = lambda epoch, metrics: None
    observe: Callable[[str, dict[str, Any]], None] | None = None
    checkpoint_file: Callable[[int, int | None], Path | None] = lambda step, completed: None
    warmup_option: str = ""

    @property
    def metric(self) -> str:
        """The primary metric."""
        return next(iter(self.targets))

    @property
    def goals(self) -> dict[str, float]:
        """The metrics that must reach a number, and it."""
        return {name: value for name, value in self.targets.items() if value is not None}

    def accuracy(self, metrics: Mapping[str, Any]) -> float | dict[str, float]:
        """The value of EVAL_ACCURACY: the primary metric, or all of `targets` by name where there are several."""
        values = {self.accuracy_names.get(name, name): metrics[name] for name in self.targets}
        return values if len(values) > 1 else metrics[self.metric]

    def reached(self, metrics: Mapping[str, Any]) -> bool:
        """Whether an evaluation ends the run with success."""
        return bool(self.goals) and all(metrics[name] >= value for name, value in self.goals.items())


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
