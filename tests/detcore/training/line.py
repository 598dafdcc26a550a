"""A training small enough to check by hand: one weight, a quadratic loss, evaluation results that are given."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import nn

from detcore.data.batch import Batch, whole_images
from detcore.training import engine
from detcore.training.config import RunConfig
from detcore.training.task import Data, Outcome, Task

STEPS, LR = 4, 0.1  # of an epoch


class Line(nn.Module):
    """One weight; loss (weight - target)^2, the target being the first pixel of each image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, images):
        return self.weight - images[:, 0, 0, 0].double()


def batch(value: int, image_id: int = 0, size: int = 1) -> Batch:
    """One image of size x size pixels of that value."""
    images = torch.full((1, 3, size, size), value, dtype=torch.uint8)
    facts = torch.tensor([image_id]), torch.ones(1, 2, dtype=int)
    return whole_images(images, torch.zeros(1, 1, 4), torch.full((1, 1), -1), *facts)


def square(network: nn.Module, b: Batch) -> dict[str, torch.Tensor]:
    return {"square": (network(b.images) ** 2).mean()}


def loss_at(image_id: int, act: Callable[[nn.Module], object]) -> Callable:
    """`square`, with an act before the image of that id is looked at."""

    def loss(network, b):
        act(network) if int(b.image_id) == image_id else None
        return square(network, b)

    return loss


class Later:
    """A result that arrives at the n-th poll."""

    def __init__(self, metrics: dict[str, float], polls: int):
        self.metrics, self.polls = metrics, polls

    def poll(self):
        self.polls -= 1
        return self.metrics if self.polls <= 0 else None


def make_task(
    *, metrics=(0.1, 0.2, 0.3), target=0.2, polls=1, loss=square, values=lambda i: i % 3, events=None,
    per_epoch=STEPS, micro_batches=0, **fields,
) -> Task:  # fmt: skip
    """A task whose images have `values` by their number, and whose evaluations give `metrics`, AP or dictionaries.

    events: collects what the loop calls. micro_batches: of an epoch; their values begin anew in each. fields: of Task.
    """
    events = [] if events is None else events
    results = iter(metrics)
    model = Line()

    def open_data():
        events.append("open")

        def stream(epoch, step):
            events.append(("stream", epoch, step))
            every = micro_batches or per_epoch
            return (batch(values(i % every if micro_batches else i), i) for i in count(epoch * every + step))

        def evaluate(network, beat):
            events.append(("evaluate", network.training, float(network.weight.detach())))
            result = next(results)
            return Later(result if isinstance(result, dict) else {"AP": result}, polls)

        close = lambda: events.append("close")  # noqa: E731
        return Data(7, 5, per_epoch, stream, evaluate, close, "seven images", ((1, "a"),), micro_batches)

    usual = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=LR), "lr": lambda step, per_epoch, base: base,
        "open_data": open_data, "targets": {"AP": target}, "eval_epochs": lambda completed, epochs: True,
        "hyperparameters": {"opt_name": "sgd"},
    }  # fmt: skip
    return Task(**{"model": model, "loss": loss, **usual, **fields})


def run(tmp_path: Path, task: Task, **options) -> tuple[Outcome, list[dict]]:
    """How it ended, and the events of its log."""
    options = {"epochs": 3, "log_interval": 2, "device": "cpu", "seed": 5, "output_dir": tmp_path / "out"} | options
    outcome = engine.train(RunConfig(**options), "retinanet", lambda context: task)
    return outcome, mllog(options["output_dir"])


def mllog(folder: Path) -> list[dict]:
    lines = (folder / "result_0.txt").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def epochs_of(log: list[dict], *keys: str) -> list[tuple[str, int | None]]:
    """Key and epoch_num of the events with these keys."""
    return [(event["key"], event["metadata"].get("epoch_num")) for event in log if event["key"] in keys]


def status(log: list[dict]) -> list[str]:
    return [event["metadata"]["status"] for event in log if event["key"] == "run_stop"]


def load(tmp_path: Path, name: str = "last.pt") -> dict:
    return torch.load(tmp_path / "out" / name, weights_only=True)


def weight(tmp_path: Path, name: str = "last.pt") -> float:
    return float(load(tmp_path, name)["model"]["weight"])


def by_hand(values, lr: float = LR) -> float:
    """The weight after plain gradient descent on those targets."""
    at = 1.0
    for value in values:
        at -= lr * 2 * (at - value)
    return at


USUAL = [by_hand([i % 3 for i in range(steps)]) for steps in range(3 * STEPS + 1)]
"""The weight after so many steps of `make_task`."""
