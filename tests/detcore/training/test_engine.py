"""The loop on a task small enough to check by hand: one weight, a quadratic loss."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from torch import nn

from detcore import UserError, cli
from detcore.data.batch import Batch, whole_images
from detcore.device import backend
from detcore.nn import optim
from detcore.processes import distributed
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Data, Task

STEPS = 4  # an epoch


class Line(nn.Module):
    """One weight; loss (weight - target)^2, the target being the first pixel of each image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, images):
        return self.weight - images[:, 0, 0, 0].double()


def batch(value: int, image_id: int = 0) -> Batch:
    images = torch.full((1, 3, 1, 1), value, dtype=torch.uint8)
    return whole_images(
        images, torch.zeros(1, 1, 4), torch.full((1, 1), -1), torch.tensor([image_id]), torch.ones(1, 2, dtype=int)
    )


class Later:
    """A metric that arrives at the n-th poll."""

    def __init__(self, value: float, polls: int):
        self.value, self.polls = value, polls

    def poll(self):
        self.polls -= 1
        return {"AP": self.value} if self.polls <= 0 else None


def make_task(
    *, metrics=(0.1, 0.2, 0.3), target=0.2, polls=1, loss=None, values=None, events=None, lr=0.1, per_epoch=STEPS
):
    """A task whose evaluation results are given; `events` collects what the loop calls."""
    events = [] if events is None else events
    results = iter(metrics)
    model = Line()

    def open_data():
        events.append("open")

        def stream(epoch, step):
            events.append(("stream", epoch, step))
            start = epoch * per_epoch + step
            return (batch((values or (lambda i: i % 3))(i), i) for i in count(start))

        def evaluate(network, beat):
            events.append(("evaluate", network.training, float(network.weight.detach())))
            return Later(next(results), polls)

        return Data(7, 5, per_epoch, stream, evaluate, lambda: events.append("close"), "seven images", ((1, "a"),))

    return Task(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        lr=lambda step, per_epoch: lr,
        loss=loss or (lambda network, b: {"square": (network(b.images) ** 2).mean()}),
        open_data=open_data,
        metric="AP",
        target=target,
        eval_epochs=lambda completed: True,
        hyperparameters={"opt_name": "sgd"},
    )


def run(tmp_path, task, **options):
    options = {"epochs": 3, "log_interval": 2, "device": "cpu", "seed": 5, "output_dir": tmp_path / "out"} | options
    outcome = engine.train(RunConfig(**options), "retinanet", lambda context: task)
    return outcome, mllog(options["output_dir"])


def mllog(folder: Path) -> list[dict]:
    lines = (folder / "result_0.txt").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def by_hand(values, lr=0.1):
    """The weight after plain gradient descent on those targets."""
    weight = 1.0
    for value in values:
        weight -= lr * 2 * (weight - value)
    return weight


def test_events_come_in_the_order_of_the_rules(tmp_path):
    events = []
    outcome, log = run(tmp_path, make_task(events=events))
    assert outcome.code == cli.OK and outcome.best == 0.2 and outcome.best_epoch == 2
    keys = [
        entry["key"] for entry in log if entry["key"] not in ("weights_initialization", "opt_name", "tracked_stats")
    ]
    head = ["submission_benchmark", "submission_org", "submission_division", "submission_status", "submission_platform"]
    head += [
        "init_start",
        "seed",
        "local_batch_size",
        "global_batch_size",
        "gradient_accumulation_steps",
        "epoch_count",
    ]
    head += ["first_epoch_num", "init_stop", "run_start", "train_samples", "eval_samples"]
    assert keys[: len(head)] == head
    rest = [(entry["key"], entry["metadata"].get("epoch_num")) for entry in log[len(head) :]]
    rest = [
        item for item in rest if item[0].startswith(("epoch_st", "eval_", "run_stop")) and item[0] != "eval_samples"
    ]
    # the metric of an epoch arrives in the next one, after its first step
    assert rest == [
        ("epoch_start", 1), ("epoch_stop", 1), ("eval_start", 1),
        ("epoch_start", 2), ("eval_accuracy", 1), ("eval_stop", 1), ("epoch_stop", 2), ("eval_start", 2),
        ("epoch_start", 3), ("eval_accuracy", 2), ("eval_stop", 2), ("run_stop", None),
    ]  # fmt: skip
    assert log[-2]["metadata"]["status"] == "success" and log[-1]["value"] == "success"
    samples = {entry["key"]: entry["value"] for entry in log if entry["key"].endswith("_samples")}
    assert samples == {"train_samples": 7, "eval_samples": 5}
    assert events[0] == "open" and events[-1] == "close"


def test_caches_that_the_launcher_dropped_are_logged_first_and_no_others(tmp_path):
    assert "cache_clear" not in [entry["key"] for entry in run(tmp_path, make_task())[1]]
    _, log = run(tmp_path, make_task(), caches_cleared=True, output_dir=tmp_path / "second")
    assert (log[0]["key"], log[0]["value"]) == ("cache_clear", True)


def test_weights_are_those_of_gradient_descent(tmp_path):
    outcome, _ = run(tmp_path, make_task(target=None))
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert outcome.code == cli.OK and outcome.step == 3 * STEPS
    assert float(saved["model"]["weight"]) == pytest.approx(by_hand([i % 3 for i in range(12)]), abs=1e-12)


def test_accumulation_is_the_mean_over_micro_batches(tmp_path):
    run(tmp_path, make_task(target=None, per_epoch=2, values=lambda i: i), accumulate=2, epochs=1)
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(by_hand([0.5, 2.5]), abs=1e-12)


def with_tail(micro_batches, per_epoch, events=None):
    """make_task() whose epochs have so many micro-batches, 0, 1, 2, ..., in per_epoch steps."""
    task = make_task(target=None, per_epoch=per_epoch)

    def open_data():
        def stream(epoch, passed):
            if events is not None:
                events.append((epoch, passed))
            return (batch(i % micro_batches, i) for i in count(epoch * micro_batches + passed))

        return dataclasses.replace(task.open_data(), micro_batches=micro_batches, train_batches=stream)

    return dataclasses.replace(task, open_data=open_data)


def test_the_last_step_of_an_epoch_takes_the_micro_batches_that_are_left(tmp_path):
    outcome, _ = run(tmp_path, with_tail(5, per_epoch=2), accumulate=3, epochs=2)
    assert outcome.step == 4
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(by_hand([1, 3.5, 1, 3.5]), abs=1e-12)


def test_a_run_with_such_a_tail_is_resumed_where_it_was(tmp_path):
    events, options = [], {"accumulate": 3, "output_dir": tmp_path / "out"}
    run(tmp_path, with_tail(5, per_epoch=2), epochs=1, **options)
    run(tmp_path, with_tail(5, per_epoch=2, events=events), epochs=2, resume=True, **options)
    assert events == [(1, 0)]
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(by_hand([1, 3.5, 1, 3.5]), abs=1e-12)


@pytest.mark.parametrize("pieces", [(2, 2, 2), (3, 3), (6,)])
def test_micro_batches_make_the_step_of_one_large_batch(pieces):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    empty = batch(0)
    whole = empty._replace(images=images)
    parts = [empty._replace(images=part) for part in images.split(pieces)]

    def step_on(batches):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2)).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        task = dataclasses.replace(
            make_task(loss=lambda m, b: {"square": (m(b.images.double() / 255) ** 2).mean()}),
            model=network, optimizer=optimizer,
        )  # fmt: skip
        device = backend.select("cpu", "fp32")
        state = State(network, optimizer, device.scaler(), None)
        step = engine.make_train_step(task, state, network, RunConfig(accumulate=len(batches)), device)
        losses = [float(step(batches)["square"]) for _ in range(3)]
        return losses, torch.nn.utils.parameters_to_vector(network.parameters()).detach()

    (expected, weights), (found, others) = step_on([whole]), step_on(parts)
    assert found == pytest.approx(expected, rel=1e-6) and torch.allclose(weights, others, rtol=0, atol=1e-14)


def test_clipping_limits_the_gradient(tmp_path):
    run(tmp_path, make_task(target=None, values=lambda i: 200), epochs=1, clip_norm=1.0)
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(1 + STEPS * 0.1, abs=1e-5)


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    events = []
    run(tmp_path, make_task(target=None, events=events, metrics=(0.1,)), epochs=1, ema_decay=0.5)
    weights = [by_hand([i % 3 for i in range(n)]) for n in range(1, STEPS + 1)]
    average = 1.0
    for weight in weights:
        average = 0.5 * average + 0.5 * weight
    evaluated = next(e for e in events if e[0] == "evaluate")
    assert evaluated == ("evaluate", False, pytest.approx(average, abs=1e-12))
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(weights[-1], abs=1e-12)


def test_best_is_the_checkpoint_of_the_best_evaluation(tmp_path):
    outcome, _ = run(tmp_path, make_task(metrics=(0.1, 0.3, 0.2), target=0.9))
    assert outcome.code == cli.TARGET_NOT_REACHED and outcome.best == 0.3
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    assert best["step"] == 2 * STEPS and best["classes"] == [[1, "a"]]
    assert not (tmp_path / "out/evaluated.pt").exists()


def test_a_late_metric_is_awaited_before_the_next_evaluation(tmp_path):
    outcome, log = run(tmp_path, make_task(polls=50, target=0.9))
    order = [(e["key"], e["metadata"]["epoch_num"]) for e in log if e["key"] in ("eval_start", "eval_accuracy")]
    expected = [(key, n) for n in (1, 2, 3) for key in ("eval_start", "eval_accuracy")]
    assert order == expected and outcome.code == cli.TARGET_NOT_REACHED


def test_target_not_reached_ends_aborted(tmp_path):
    outcome, log = run(tmp_path, make_task(target=0.9))
    assert outcome.code == cli.TARGET_NOT_REACHED
    assert [e["metadata"]["status"] for e in log if e["key"] == "run_stop"] == ["aborted"]


@pytest.mark.parametrize(
    ("option", "advice"),
    [("--warmup", "a lower --lr, a longer --warmup, --clip-norm"), ("", "a lower --lr, --clip-norm")],
)
def test_a_loss_that_is_not_finite_names_step_terms_and_images(tmp_path, capsys, option, advice):
    def loss(network, b):
        value = (network(b.images) ** 2).mean()
        return {"fine": value, "broken": value * (float("nan") if int(b.image_id) == 5 else 1.0)}

    outcome, log = run(tmp_path, dataclasses.replace(make_task(loss=loss), warmup_option=option))
    said = capsys.readouterr().err
    assert outcome.code == cli.NOT_FINITE and advice in said
    assert "step 6 (epoch 2)" in said and "broken = nan" in said and "image ids [5]" in said
    assert log[-2]["metadata"]["status"] == "aborted"
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == STEPS  # from before the NaN


def test_an_exception_still_ends_the_log(tmp_path):
    def loss(network, b):
        raise UserError("image 3 is broken")

    with pytest.raises(UserError, match="image 3"):
        run(tmp_path, make_task(loss=loss))
    log = mllog(tmp_path / "out")
    assert [e["metadata"]["status"] for e in log if e["key"] == "run_stop"] == ["aborted"]
    assert json.loads((tmp_path / "out/progress.jsonl").read_text().splitlines()[-1])["status"] == "aborted"


HANG = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from test_engine import make_task, run
from pathlib import Path
run(Path(sys.argv[3]), make_task(loss=lambda network, b: time.sleep(1000)), hang_timeout=2.0)
"""


def test_a_hang_ends_the_process_and_the_log(tmp_path):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[3]), str(tmp_path)]
    result = subprocess.run([sys.executable, "-c", HANG, *folders], capture_output=True, text=True, timeout=120)
    assert result.returncode == cli.WATCHDOG, result.stderr
    assert "stood still for 2 s" in result.stderr and "phase training step" in result.stderr
    assert "train_step" in (tmp_path / "out/stacks_rank0.txt").read_text()
    assert mllog(tmp_path / "out")[-2]["metadata"]["status"] == "aborted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_resume_gives_the_same_weights(tmp_path, number):
    def loss(network, b):
        if int(b.image_id) == 5 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), number)
        return {"square": (network(b.images) ** 2).mean()}

    outcome, log = run(tmp_path, make_task(loss=loss, target=0.9))
    assert outcome.code == cli.STOPPED and outcome.step == 6
    assert log[-2]["metadata"]["status"] == "aborted"
    events = []
    outcome, _ = run(tmp_path, make_task(loss=loss, metrics=(0.2, 0.3), target=0.9, events=events), resume=True)
    assert ("stream", 1, 2) in events and outcome.step == 3 * STEPS
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert float(saved["model"]["weight"]) == pytest.approx(by_hand([i % 3 for i in range(12)]), abs=1e-12)
    assert [epoch for epoch, _ in saved["evaluations"]] == [1, 2]  # the third arrived after the last checkpoint


def test_a_signal_in_the_last_step_of_an_epoch_saves_too(tmp_path):
    def loss(network, b):
        if int(b.image_id) == STEPS - 1 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return {"square": (network(b.images) ** 2).mean()}

    outcome, _ = run(tmp_path, make_task(loss=loss, target=0.9))
    assert outcome.code == cli.STOPPED and outcome.step == STEPS
    events = []
    outcome, log = run(tmp_path, make_task(loss=loss, target=0.9, events=events), resume=True)
    assert ("stream", 1, 0) in events and outcome.step == 3 * STEPS
    assert [e["metadata"]["epoch_num"] for e in log if e["key"] == "eval_accuracy"] == [1, 2, 3]


def test_a_rank_whose_signal_comes_late_stops_with_the_others(tmp_path, monkeypatch, capsys):
    """It has none of its own when the others tell it of theirs."""
    asked = []

    def agree(values, device="cpu"):
        asked.append(values)
        return [*values[:2], signal.SIGUSR1] if len(values) == 3 and len(asked) > 2 else list(values)

    monkeypatch.setattr(distributed, "agree", agree)
    outcome, _ = run(tmp_path, make_task(target=0.9))
    assert outcome.code == cli.STOPPED
    assert "Stopped by SIGUSR1" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """The loss of the last step is still fine when its gradient overflows."""

    def loss(network, b):
        value = (network(b.images) ** 2).mean()
        if int(b.image_id) == 2 * STEPS - 1:
            network.weight.register_hook(lambda gradient: gradient * float("nan"))
        return {"square": value}

    outcome, _ = run(tmp_path, make_task(loss=loss, target=0.9))
    assert outcome.code == cli.NOT_FINITE and "weights are no longer finite after step 8" in capsys.readouterr().err
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert saved["step"] == STEPS and saved["model"]["weight"].isfinite().all()


def test_a_run_that_succeeded_keeps_its_log(tmp_path):
    run(tmp_path, make_task(target=0.1))
    before = (tmp_path / "out/result_0.txt").read_bytes()
    with pytest.raises(UserError, match="has ended with success"):
        run(tmp_path, make_task(target=0.1), resume=True)
    with pytest.raises(UserError, match="accumulate was 1"):
        run(tmp_path, make_task(target=0.1), resume=True, accumulate=2)
    assert (tmp_path / "out/result_0.txt").read_bytes() == before


def test_the_log_of_a_run_without_a_checkpoint_is_set_aside(tmp_path):
    def no_data():
        raise UserError("nowhere.json: no such file")

    broken = dataclasses.replace(make_task(), open_data=no_data)
    with pytest.raises(UserError):
        run(tmp_path, broken)
    first = (tmp_path / "out/result_0.txt").read_bytes()
    with pytest.raises(UserError):
        run(tmp_path, broken)
    assert (tmp_path / "out/result_0.txt.previous").read_bytes() == first
    outcome, _ = run(tmp_path, make_task())
    assert outcome.code == cli.OK and not list((tmp_path / "out").glob("*.previous"))


def test_ranks_exchange_gradients_once_a_step(tmp_path):
    """With accumulation, all but the last backward pass run under no_sync."""
    inside = []

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.syncs = module, True

        def forward(self, images):
            inside.append(self.syncs)
            return self.module(images)

        @contextlib.contextmanager
        def no_sync(self):
            self.syncs = False
            yield
            self.syncs = True

    task, device = make_task(), backend.select("cpu", "fp32")
    state = State(task.model, task.optimizer, device.scaler(), None)
    step = engine.make_train_step(task, state, Wrapper(task.model), RunConfig(accumulate=3), device)
    step([batch(i, i) for i in range(3)])
    assert inside == [False, False, True]


def test_resume_at_an_epochs_end_makes_up_for_the_missing_evaluation(tmp_path):
    run(tmp_path, make_task(target=0.9), epochs=1)
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert saved["evaluations"] == []  # last.pt is written before the evaluation
    events = []
    _, log = run(tmp_path, make_task(target=0.9, metrics=(0.5, 0.6), events=events), epochs=2, resume=True)
    assert next(e for e in events if e[0] == "evaluate")[2] == float(saved["model"]["weight"])
    assert [e["metadata"]["epoch_num"] for e in log if e["key"] == "eval_accuracy"] == [1, 1, 2]


def test_a_run_goes_on_on_another_kind_of_device(tmp_path, capsys):
    run(tmp_path, make_task(target=None), epochs=1)
    last = tmp_path / "out" / "last.pt"
    saved = checkpoint.load(last)
    assert len(saved["generators"]) == 1
    of_a_gpu = torch.cat((saved["generators"], torch.zeros(1, 16, dtype=torch.uint8)), 1)
    checkpoint.save(last, saved | {"generators": of_a_gpu})
    run(tmp_path, resumed := make_task(target=None), epochs=2, resume=True, device="auto")
    assert "resumed on another kind of device" in capsys.readouterr().err
    run(tmp_path, whole := make_task(target=None), epochs=2, output_dir=tmp_path / "whole")
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_with_other_settings_is_refused(tmp_path):
    run(tmp_path, make_task(target=0.9), epochs=1)
    with pytest.raises(UserError, match="accumulate was 1, is 2"):
        run(tmp_path, make_task(), epochs=2, resume=True, accumulate=2)


def test_a_setting_younger_than_the_checkpoint_was_at_its_default(tmp_path):
    run(tmp_path, make_task(target=None), epochs=1)
    saved = checkpoint.load(last := tmp_path / "out" / "last.pt")
    del saved["config"]["variants"]
    checkpoint.save(last, saved)
    with pytest.raises(UserError, match=r"variants was \[\], is \['stem'\]"):
        run(tmp_path, make_task(), epochs=2, resume=True, variants=("stem",))
    outcome, _ = run(tmp_path, make_task(target=None), epochs=2, resume=True)
    assert outcome.code == cli.OK


def test_an_earlier_run_is_not_lost(tmp_path):
    run(tmp_path, make_task(target=None), epochs=1)
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        run(tmp_path, make_task(target=None), epochs=1)
    outcome, _ = run(tmp_path, make_task(target=None), epochs=1, overwrite=True)
    assert outcome.code == cli.OK


def test_overwriting_waits_until_the_new_run_has_its_data(tmp_path):
    run(tmp_path, make_task(target=None), epochs=1)
    before = (tmp_path / "out/last.pt").read_bytes()

    def no_data():
        raise UserError("nowhere.json: no such file")

    with pytest.raises(UserError, match=r"nowhere\.json"):
        run(tmp_path, dataclasses.replace(make_task(), open_data=no_data), overwrite=True)
    assert (tmp_path / "out/last.pt").read_bytes() == before
    assert b"success" in (tmp_path / "out/result_0.txt.previous").read_bytes()


@pytest.mark.parametrize("name", ["config", "seed", "step", "generators", "world_size", "evaluations", "optimizer"])
@pytest.mark.parametrize("value", [None, "absent", [["x"]], {"a": 1}, torch.zeros(2), -3])
def test_a_checkpoint_of_other_content_is_refused_in_words(tmp_path, name, value):
    run(tmp_path, make_task(target=None), epochs=1)
    saved = checkpoint.load(tmp_path / "out/last.pt")
    saved.pop(name)
    checkpoint.save(tmp_path / "out/last.pt", saved if value == "absent" else saved | {name: value})
    if name == "seed" and isinstance(value, int):
        return  # any number is a seed
    with pytest.raises(UserError, match="--resume"):
        run(tmp_path, make_task(target=None), epochs=2, resume=True)


def test_resuming_on_another_data_set_is_refused(tmp_path):
    run(tmp_path, make_task(target=None), epochs=1)
    with pytest.raises(UserError, match="had 4 steps an epoch, this data set gives 3"):
        run(tmp_path, make_task(target=None, per_epoch=3), epochs=2, resume=True)


def test_checkpoints_within_an_epoch(tmp_path):
    seen = []

    due = [0, 0, 0, 3, 4, 4, 6, 6]

    def written() -> int:
        path = tmp_path / "out/last.pt"
        return torch.load(path, weights_only=True)["step"] if path.exists() else 0

    def loss(network, b):
        end = time.monotonic() + 20
        while written() < due[len(seen)] and time.monotonic() < end:  # a thread writes it meanwhile
            time.sleep(0.01)
        seen.append(written())
        return {"square": (network(b.images) ** 2).mean()}

    run(tmp_path, make_task(loss=loss, target=None), epochs=2, checkpoint_interval=3)
    assert seen == due


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """It holds the weights of its step; what wants the file waits for it, and so does the end of the run."""
    trained, save, names = threading.Event(), checkpoint.save, []

    def slow(path, contents, links):
        assert trained.wait(20), "training waits for the checkpoint"
        time.sleep(0.2)
        names.append((contents["step"], [link.name for link in links]))
        save(path, contents, links)

    def loss(network, b):
        trained.set() if int(b.image_id) > STEPS else None
        return {"square": (network(b.images) ** 2).mean()}

    kept = []
    monkeypatch.setattr(checkpoint, "save", slow)
    task = make_task(loss=loss, target=None, polls=3)
    observe = lambda kind, fields: kept.append(torch.load(fields["path"])["step"]) if kind == "saved" else None  # noqa: E731
    before = threading.active_count()
    outcome, _ = run(tmp_path, dataclasses.replace(task, observe=observe), epochs=2)
    assert outcome.code == cli.OK and kept == [STEPS, 2 * STEPS] and threading.active_count() == before
    assert names == [(STEPS, ["evaluated.pt"]), (2 * STEPS, ["evaluated.pt"])]
    for name, values in (("last.pt", 8), ("best.pt", 8)):
        saved = torch.load(tmp_path / "out" / name, weights_only=True)
        assert saved["step"] == values
        assert float(saved["model"]["weight"]) == pytest.approx(by_hand([i % 3 for i in range(values)]), abs=1e-12)


def test_an_epoch_has_its_time_and_its_file_before_the_next_one(tmp_path):
    """Neither waits for the evaluation, which takes a second here, nor for the next line of a long interval."""
    (tmp_path / "models").mkdir()
    told, seen, files = [], [], []
    task = make_task(target=None)

    def open_data():
        data = task.open_data()

        def evaluate(network, beat):
            end = time.monotonic() + 20
            while not (there := (tmp_path / f"models/{1 + len(seen)}.pt").exists()) and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(there)
            time.sleep(1)
            return data.evaluate(network, beat)

        return dataclasses.replace(data, evaluate=evaluate)

    def observe(kind, fields):
        if kind in ("step", "epoch"):
            told.append((kind, fields["epoch"]))
        if kind == "epoch":
            assert fields["time_s"] < 0.9
        if kind == "saved":
            files.append(fields["epoch_file"].name)

    more = {"observe": observe, "epoch_file": lambda completed: tmp_path / f"models/{completed}.pt"}
    run(tmp_path, dataclasses.replace(task, open_data=open_data, **more), epochs=2, log_interval=100)
    assert seen == [True, True] and files == ["1.pt", "2.pt"]
    assert told == [("step", 1), ("epoch", 1), ("step", 2), ("epoch", 2)]
    steps = [torch.load(tmp_path / f"models/{e}.pt", weights_only=True)["step"] for e in (1, 2)]
    assert steps == [STEPS, 2 * STEPS]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch, at):
    save, calls = checkpoint.save, []

    def full(path, contents, links):
        calls.append(contents["step"])
        if len(calls) == at:
            raise UserError("No space left on device")
        save(path, contents, links)

    monkeypatch.setattr(checkpoint, "save", full)
    before = threading.active_count()
    with pytest.raises(UserError, match="No space left"):
        run(tmp_path, make_task(target=None))
    assert len(calls) == at and threading.active_count() == before
    assert mllog(tmp_path / "out")[-2]["metadata"]["status"] == "aborted"
    last = tmp_path / "out/last.pt"
    assert (torch.load(last, weights_only=True)["step"] if at > 1 else last.exists()) == (at - 1) * STEPS


def test_a_failed_write_ends_the_run_before_the_next_step(tmp_path, monkeypatch):
    """However long the logging interval is."""
    failed, seen = threading.Event(), []

    def full(path, contents, links):
        failed.set()
        raise UserError("No space left on device")

    def loss(network, b):
        seen.append(int(b.image_id))
        if int(b.image_id) == STEPS:
            assert failed.wait(20)
            time.sleep(0.3)  # the thread hands the error over
        return {"square": (network(b.images) ** 2).mean()}

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="No space left"):
        run(tmp_path, make_task(loss=loss, target=None, polls=100), epochs=2, log_interval=100)
    assert seen[-1] <= STEPS


def test_a_checkpoint_that_cannot_be_written_is_told_of_where_the_run_ends_otherwise(tmp_path, monkeypatch, capsys):
    broken = threading.Event()

    def full(path, contents, links):
        assert broken.wait(20)
        time.sleep(0.2)
        raise UserError("No space left on device")

    def loss(network, b):
        if int(b.image_id) == STEPS:
            broken.set()
            raise RuntimeError("a real mistake")
        return {"square": (network(b.images) ** 2).mean()}

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RuntimeError, match="a real mistake"):
        run(tmp_path, make_task(loss=loss, target=None, polls=99))
    assert "error: No space left on device" in capsys.readouterr().err


def test_progress_file_tells_steps_metrics_and_where_time_went(tmp_path):
    run(tmp_path, make_task(target=0.9), epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "out/progress.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "step", "step", "step", "eval", "step", "eval", "end"] or [
        line["kind"] for line in lines
    ] == ["start", "step", "step", "eval", "step", "step", "eval", "end"]
    assert lines[0]["config"]["seed"] == 5 and lines[-1]["status"] == "aborted"
    assert set(lines[-1]["seconds"]) == {"start_up", "data", "train", "evaluation", "checkpoint"}
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == [2, 4, 6, 8]


def test_scaler_and_precision_follow_the_config():
    assert not backend.select("cpu", "auto").scaler().is_enabled()
    with pytest.raises(UserError, match="fp16"):
        backend.select("cpu", "fp16")
    with backend.select("cpu", "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_random_numbers_continue_from_their_state():
    device = backend.select("cpu", "fp32")
    torch.rand(5)
    state = device.rng_state()
    expected = torch.rand(5)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(5), expected)


def test_ema_restores_the_trained_values_after_an_error():
    model = Line()
    ema = optim.Ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
    with pytest.raises(RuntimeError), ema.applied(model):
        assert model.weight.item() == 1.0
        raise RuntimeError
    assert model.weight.item() == 3.0
    assert len(list(islice(ema.state_dict(), 5))) == 1
