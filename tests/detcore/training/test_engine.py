"""The loop on a task small enough to check by hand."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from detcore import UserError, cli
from detcore.device.cpu import CpuBackend
from detcore.device.select import select_backend
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from tests.detcore.device.tape import TapeRecorder
from tests.detcore.training.line import (
    LR,
    STEPS,
    USUAL,
    Line,
    batch,
    by_hand,
    epochs_of,
    load,
    loss_at,
    make_task,
    mllog,
    run,
    square,
    status,
    weight,
)

EVALUATIONS = ("eval_start", "eval_accuracy")


def test_events_come_in_the_order_of_the_rules(tmp_path):
    events = []
    outcome, log = run(tmp_path, make_task(events=events), caches_cleared=True)
    assert (outcome.code, outcome.best, outcome.best_epoch) == (cli.OK, 0.2, 2)
    keys = [event["key"] for event in log if event["key"] not in ("weights_initialization", "opt_name")]
    assert keys[:17] == [
        "cache_clear", "submission_benchmark", "submission_org", "submission_division", "submission_status",
        "submission_platform", "init_start", "seed", "local_batch_size", "global_batch_size",
        "gradient_accumulation_steps", "epoch_count", "first_epoch_num", "init_stop", "run_start", "train_samples",
        "eval_samples",
    ]  # fmt: skip
    # the metric of an epoch arrives in the next one, after its first step
    assert epochs_of(log, "epoch_start", "epoch_stop", *EVALUATIONS, "eval_stop", "run_stop") == [
        ("epoch_start", 1), ("epoch_stop", 1), ("eval_start", 1),
        ("epoch_start", 2), ("eval_accuracy", 1), ("eval_stop", 1), ("epoch_stop", 2), ("eval_start", 2),
        ("epoch_start", 3), ("eval_accuracy", 2), ("eval_stop", 2), ("run_stop", None),
    ]  # fmt: skip
    values = {event["key"]: event["value"] for event in log}
    assert status(log) == ["success"] and values["status"] == "success"
    assert (values["train_samples"], values["eval_samples"], values["eval_accuracy"]) == (7, 5, 0.2)
    assert events[0] == "open" and events[-1] == "close"


def test_weights_are_those_of_gradient_descent(tmp_path):
    outcome, log = run(tmp_path, make_task(target=None))
    assert (outcome.code, outcome.step) == (cli.OK, 3 * STEPS) and "cache_clear" not in [e["key"] for e in log]
    assert weight(tmp_path) == pytest.approx(USUAL[12], abs=1e-12)


@pytest.mark.parametrize(
    ("accumulate", "per_epoch", "micro_batches", "means"),
    [(2, 2, 0, [0.5, 2.5]), (3, 2, 5, [1, 3.5])],  # the second: an epoch's last step takes what is left
)
def test_accumulation_is_the_mean_over_micro_batches(tmp_path, accumulate, per_epoch, micro_batches, means):
    task = make_task(target=None, per_epoch=per_epoch, values=lambda i: i, micro_batches=micro_batches or 4)
    outcome, _ = run(tmp_path, task, accumulate=accumulate, epochs=2)
    assert outcome.step == 4 and weight(tmp_path) == pytest.approx(by_hand(means * 2), abs=1e-12)


@pytest.mark.parametrize("pieces", [(2, 2, 2), (6,)])
def test_micro_batches_make_the_step_of_one_large_batch(pieces):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    parts = [batch(0)._replace(images=part) for part in images.split(pieces)]

    def step_on(batches):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2)).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        loss = lambda m, b: {"square": (m(b.images.double() / 255) ** 2).mean()}  # noqa: E731
        task, device = make_task(loss=loss, model=network, optimizer=optimizer), select_backend("cpu", "fp32")
        state = State(network, optimizer, device.scaler(), None)
        step = engine.make_train_step(task, state, network, RunConfig(accumulate=len(batches)), device)
        losses = [float(step(batches)["square"]) for _ in range(3)]
        return losses, nn.utils.parameters_to_vector(network.parameters()).detach()

    (expected, weights), (found, others) = step_on([batch(0)._replace(images=images)]), step_on(parts)
    assert found == pytest.approx(expected, rel=1e-6) and torch.allclose(weights, others, rtol=0, atol=1e-14)


def test_ranks_exchange_gradients_once_a_step():
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

    task, device = make_task(), select_backend("cpu", "fp32")
    state = State(task.model, task.optimizer, device.scaler(), None)
    step = engine.make_train_step(task, state, Wrapper(task.model), RunConfig(accumulate=3), device)
    step([batch(i, i) for i in range(3)])
    assert inside == [False, False, True]


def test_a_step_is_recorded_once_for_each_canvas():
    """Also where a step's micro-batches lie on different canvases; what no example has is refused."""
    recorder = TapeRecorder()
    task = make_task(examples=lambda: [batch(0, size=1), batch(0, size=2)])
    device = CpuBackend(torch.device("cpu"), "fp32", recorder)
    state = State(task.model, task.optimizer, device.scaler(), None)
    step = engine.make_train_step(task, state, task.model, RunConfig(accumulate=2), device)
    assert recorder.recordings == 2 and weight_of(task) == 1
    steps, values = [(1, 1), (2, 2), (1, 2), (1,), (2, 2), (1, 2)], []
    for i, sizes in enumerate(steps):
        step([batch(i + at, size=size) for at, size in enumerate(sizes)])
        values.append(i + (len(sizes) - 1) / 2)
    assert recorder.recordings == 4 and weight_of(task) == pytest.approx(by_hand(values), abs=1e-12)
    with pytest.raises(UserError, match="recorded for"):
        step([batch(0, size=3)] * 2)


def weight_of(task) -> float:
    return float(task.model.weight.detach())


def test_each_parameter_group_has_the_rate_of_its_own_base(tmp_path):
    """The one that the optimizer had at the start, also after a resumption."""

    class Two(Line):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

        def forward(self, images):
            return super().forward(images) + self.bias

    def task():
        model = Two()
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 2 * LR}]
        rate = lambda step, per_epoch, base: base * (0.5 if step >= per_epoch else 1)  # noqa: E731
        return make_task(target=None, model=model, optimizer=torch.optim.SGD(groups, lr=LR), lr=rate)

    one, bias = 1.0, 0.0
    for i in range(2 * STEPS):
        gradient, factor = 2 * (one + bias - i % 3), 0.5 if i >= STEPS else 1
        one, bias = one - LR * factor * gradient, bias - 2 * LR * factor * gradient
    run(tmp_path, task(), epochs=1)
    run(tmp_path, task(), epochs=2, resume=True)
    found = load(tmp_path)["model"]
    assert (float(found["weight"]), float(found["bias"])) == pytest.approx((one, bias), abs=1e-12)
    lines = (tmp_path / "out/progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines if '"step"' in line[:20]] == [LR, LR, LR / 2, LR / 2]


def test_clipping_limits_the_gradient(tmp_path):
    run(tmp_path, make_task(target=None, values=lambda i: 200), epochs=1, clip_norm=1.0)
    assert weight(tmp_path) == pytest.approx(1 + STEPS * 0.1, abs=1e-5)


@pytest.mark.parametrize("warm", [False, True])
def test_the_moving_average_is_what_is_evaluated(tmp_path, warm):
    """With a warm-up that is resumed in the middle."""
    events, average = [], 1.0
    for step in range(2 * STEPS):
        decay = min(0.5, (1 + step) / (10 + step)) if warm else 0.5
        average = decay * average + (1 - decay) * USUAL[step + 1]
    options = {"ema_decay": 0.5, "ema_warmup": warm}
    run(tmp_path, make_task(target=None), epochs=1, **options)
    run(tmp_path, make_task(target=None, events=events), epochs=2, resume=True, **options)
    assert [e for e in events if e[0] == "evaluate"][-1] == ("evaluate", False, pytest.approx(average, abs=1e-12))
    assert weight(tmp_path) == pytest.approx(USUAL[2 * STEPS], abs=1e-12)


def test_best_is_the_checkpoint_of_the_best_evaluation(tmp_path):
    outcome, log = run(tmp_path, make_task(metrics=(0.1, 0.3, 0.2), target=0.9))
    assert (outcome.code, outcome.best, status(log)) == (cli.TARGET_NOT_REACHED, 0.3, ["aborted"])
    best = load(tmp_path, "best.pt")
    assert best["step"] == 2 * STEPS and best["classes"] == [[1, "a"]]
    assert not (tmp_path / "out/evaluated.pt").exists()


def test_a_late_metric_is_awaited_before_the_next_evaluation(tmp_path):
    outcome, log = run(tmp_path, make_task(polls=12, target=0.9))
    assert epochs_of(log, *EVALUATIONS) == [(key, n) for n in (1, 2, 3) for key in EVALUATIONS]
    assert outcome.code == cli.TARGET_NOT_REACHED


def test_all_targets_must_be_reached(tmp_path, capsys):
    metrics = [{"box": b, "mask": m, "other": 0} for b, m in ((0.5, 0.1), (0.3, 0.9), (0.4, 0.2), (0.9, 0.9))]
    task = make_task(metrics=metrics, targets={"box": 0.4, "mask": 0.2})
    outcome, log = run(tmp_path, task, epochs=4)
    assert (outcome.code, outcome.best, outcome.best_epoch) == (cli.OK, 1.0, 3)
    assert load(tmp_path, "best.pt")["step"] == 3 * STEPS  # though each of the two was higher before
    values = [event["value"] for event in log if event["key"] == "eval_accuracy"]
    assert values == [{"box": m["box"], "mask": m["mask"]} for m in metrics[:3]]
    said, best = capsys.readouterr().err, "best mean of box/0.4 and mask/0.2"
    assert f"after epoch 2: box 0.3000 (target 0.4), mask 0.9000 (target 0.2), {best} 0.8750" in said
    assert f"Targets box 0.4, mask 0.2 reached: {best} 1.0000 after epoch 3" in said


def test_without_targets_the_best_is_the_highest_mean(tmp_path):
    metrics = [{"box": 0.5, "mask": 0.1}, {"box": 0.4, "mask": 0.3}, {"box": 0.3, "mask": 0.3}]
    outcome, _ = run(tmp_path, make_task(metrics=metrics, targets={"box": None, "mask": None}), epochs=3)
    assert (outcome.best, outcome.best_epoch) == (pytest.approx(0.35), 2)
    assert load(tmp_path, "best.pt")["step"] == 2 * STEPS


def test_metrics_that_had_nothing_to_score_do_not_count(tmp_path):
    metrics = [{"box": -1.0, "mask": -1.0}, {"box": 0.2, "mask": -1.0}, {"box": 0.1, "mask": -1.0}]
    outcome, _ = run(tmp_path, make_task(metrics=metrics, targets={"box": 0.4, "mask": 0.2}), epochs=3)
    assert (outcome.best, outcome.best_epoch) == (0.5, 2)


def test_metrics_without_a_target_are_followed(tmp_path, capsys):
    outcome, _ = run(tmp_path, make_task(metrics=[{"a": 0.5, "b": 0.1}], targets={"a": None, "b": 0.2}), epochs=1)
    said = capsys.readouterr().err
    assert outcome.code == cli.TARGET_NOT_REACHED and "a 0.5000 (no target), b 0.1000 (target 0.2)" in said
    assert "Target b 0.2 NOT reached in 1 epochs" in said


@pytest.mark.parametrize(("steps", "epochs", "asked"), [(6, 2, [(1, 2), (2, 2)]), (8, 2, [(1, 2), (2, 2)])])
def test_a_run_can_end_by_steps(tmp_path, steps, epochs, asked):
    """Whatever --epochs says; a last epoch that is cut short is evaluated and saved as any other."""
    questions, files = [], []
    more = {
        "eval_epochs": lambda *given: questions.append(given) or given[0] == given[1],
        "checkpoint_file": lambda *given: files.append(given),
    }
    outcome, log = run(tmp_path, make_task(target=0.9, total_steps=steps, **more), epochs=1, log_interval=100)
    assert (outcome.code, outcome.step) == (cli.TARGET_NOT_REACHED, steps)
    assert weight(tmp_path, "best.pt") == pytest.approx(USUAL[steps], abs=1e-12)
    assert [event["value"] for event in log if event["key"] == "epoch_count"] == [epochs]
    assert epochs_of(log, "epoch_stop", *EVALUATIONS) == [
        ("epoch_stop", 1), ("epoch_stop", 2), ("eval_start", 2), ("eval_accuracy", 2)
    ]  # fmt: skip
    assert set(questions) == set(asked) and files == [(4, 1), (steps, 2 if steps == 8 else None)]


def test_a_run_by_steps_is_resumed_before_its_last_evaluation(tmp_path):
    run(tmp_path, make_task(target=0.9, total_steps=6), epochs=1)
    events = []
    _, log = run(tmp_path, make_task(target=0.9, total_steps=6, events=events), epochs=1, resume=True)
    assert ("evaluate", False, pytest.approx(USUAL[6], abs=1e-12)) in events and load(tmp_path)["step"] == 6
    assert epochs_of(log, "epoch_start")[2:] == []


def test_a_judge_warns_at_the_console(tmp_path, capsys):
    judge = lambda epoch, metrics: f"{metrics['AP']} is late" if epoch == 2 else None  # noqa: E731
    run(tmp_path, make_task(target=0.9, judge=judge))
    assert capsys.readouterr().err.count("is late") == 1


@pytest.mark.parametrize(
    ("option", "advice"),
    [("--warmup", "a lower --lr, a longer --warmup, --clip-norm"), ("", "a lower --lr, --clip-norm")],
)
def test_a_loss_that_is_not_finite_names_step_terms_and_images(tmp_path, capsys, option, advice):
    def loss(network, b):
        value = square(network, b)["square"]
        return {"fine": value, "broken": value * (float("nan") if int(b.image_id) == 5 else 1.0)}

    outcome, log = run(tmp_path, make_task(loss=loss, warmup_option=option))
    said = capsys.readouterr().err
    assert outcome.code == cli.NOT_FINITE and advice in said and status(log) == ["aborted"]
    assert "step 6 (epoch 2)" in said and "broken = nan" in said and "image ids [5]" in said
    assert load(tmp_path)["step"] == STEPS  # from before the NaN


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """The loss of the last step is still fine when its gradient overflows."""
    spoil = lambda network: network.weight.register_hook(lambda gradient: gradient * float("nan"))  # noqa: E731
    outcome, _ = run(tmp_path, make_task(loss=loss_at(2 * STEPS - 1, spoil), target=0.9))
    assert outcome.code == cli.NOT_FINITE and "weights are no longer finite after step 8" in capsys.readouterr().err
    assert load(tmp_path)["step"] == STEPS and load(tmp_path)["model"]["weight"].isfinite().all()


def fail(error: Exception):
    raise error


def test_an_exception_still_ends_the_log(tmp_path):
    with pytest.raises(UserError, match="image 3"):
        run(tmp_path, make_task(loss=loss_at(0, lambda _: fail(UserError("image 3 is broken")))))
    assert status(mllog(tmp_path / "out")) == ["aborted"]
    assert json.loads((tmp_path / "out/progress.jsonl").read_text().splitlines()[-1])["status"] == "aborted"


HANG = """
import sys, time
from pathlib import Path
from tests.detcore.training.line import make_task, run
run(Path(sys.argv[1]), make_task(loss=lambda network, b: time.sleep(1000)), hang_timeout=2.0)
"""


def test_a_hang_ends_the_process_and_the_log(tmp_path):
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert result.returncode == cli.WATCHDOG, result.stderr
    assert "stood still for 2 s" in result.stderr and "phase training step" in result.stderr
    assert "train_step" in (tmp_path / "out/stacks_rank0.txt").read_text()
    assert status(mllog(tmp_path / "out")) == ["aborted"]


HANG_BEFORE = """
import sys, time
from pathlib import Path
from detcore.training.config import RunConfig
from detcore.training.engine import train
settings = RunConfig(device="cpu", output_dir=Path(sys.argv[1]) / "out", hang_timeout=2.0)
train(settings, "retinanet", lambda context: time.sleep(1000))
"""


def test_a_hang_before_the_clock_ends_the_process(tmp_path):
    """As when a file server dies while the index of the data set is built."""
    command = [sys.executable, "-c", HANG_BEFORE, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert result.returncode == cli.WATCHDOG, result.stderr
    assert "stood still for 2 s" in result.stderr and "phase building the model" in result.stderr
    assert "run_stop" not in (tmp_path / "out/result_0.txt").read_text()


def test_checkpoints_within_an_epoch(tmp_path):
    seen, due = [], [0, 0, 0, 3, 4, 4, 6, 6]

    def written() -> int:
        return load(tmp_path)["step"] if (tmp_path / "out/last.pt").exists() else 0

    def loss(network, b):
        end = time.monotonic() + 20
        while written() < due[len(seen)] and time.monotonic() < end:  # a thread writes it meanwhile
            time.sleep(0.01)
        seen.append(written())
        return square(network, b)

    run(tmp_path, make_task(loss=loss, target=None), epochs=2, checkpoint_interval=3)
    assert seen == due


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """It holds the weights of its step; what wants the file waits for it, and so does the end of the run."""
    trained, save, names, kept = threading.Event(), checkpoint.save, [], []

    def slow(path, contents, links):
        assert trained.wait(20), "training waits for the checkpoint"
        time.sleep(0.1)
        names.append((contents["step"], [link.name for link in links]))
        save(path, contents, links)

    def observe(kind, fields):
        if kind == "saved":
            kept.append((fields["step"], torch.load(fields["path"])["step"]))

    monkeypatch.setattr(checkpoint, "save", slow)
    task = make_task(loss=loss_at(STEPS + 1, lambda _: trained.set()), target=None, polls=3, observe=observe)
    before = threading.active_count()
    outcome, _ = run(tmp_path, task, epochs=2)
    assert outcome.code == cli.OK and kept == [(4, 4), (8, 8)] and threading.active_count() == before
    assert names == [(STEPS, ["evaluated.pt"]), (2 * STEPS, ["evaluated.pt"])]
    for name in ("last.pt", "best.pt"):
        assert load(tmp_path, name)["step"] == 8 and weight(tmp_path, name) == pytest.approx(USUAL[8], abs=1e-12)


def test_an_epoch_has_its_time_and_its_file_before_the_next_one(tmp_path):
    """Neither waits for the evaluation, which takes 0.4 s here, nor for the next line of a long interval."""
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
            time.sleep(0.4)
            return data.evaluate(network, beat)

        return dataclasses.replace(data, evaluate=evaluate)

    def observe(kind, fields):
        if kind in ("step", "epoch"):
            told.append((kind, fields["epoch"], fields["time_s"]))
        if kind == "saved":
            files.append(fields["file"].name)

    more = {"observe": observe, "checkpoint_file": lambda step, completed: tmp_path / f"models/{completed}.pt"}
    run(tmp_path, dataclasses.replace(task, open_data=open_data, **more), epochs=2, log_interval=100)
    assert seen == [True, True] and files == ["1.pt", "2.pt"]
    assert [entry[:2] for entry in told] == [("step", 1), ("epoch", 1), ("step", 2), ("epoch", 2)]
    assert told[3][2] <= told[2][2] - told[0][2] - 0.4  # the second epoch's own time, in the time between its lines
    assert [torch.load(tmp_path / f"models/{e}.pt", weights_only=True)["step"] for e in (1, 2)] == [4, 8]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch, at):
    save, calls = checkpoint.save, []

    def full(path, contents, links):
        calls.append(contents["step"])
        fail(UserError("No space left on device")) if len(calls) == at else save(path, contents, links)

    monkeypatch.setattr(checkpoint, "save", full)
    before = threading.active_count()
    with pytest.raises(UserError, match="No space left"):
        run(tmp_path, make_task(target=None))
    assert len(calls) == at and threading.active_count() == before
    assert status(mllog(tmp_path / "out")) == ["aborted"]
    assert (load(tmp_path)["step"] if at > 1 else (tmp_path / "out/last.pt").exists()) == (at - 1) * STEPS


@pytest.mark.parametrize("otherwise", [False, True])
def test_a_failed_write_ends_the_run_before_the_next_step(tmp_path, monkeypatch, capsys, otherwise):
    """However long the logging interval is; and it is said where the run ends for another reason."""
    began, failed, seen = threading.Event(), threading.Event(), []

    def full(path, contents, links):
        assert not otherwise or began.wait(20)
        failed.set()
        raise UserError("No space left on device")

    def act(network):
        began.set()
        assert failed.wait(20)
        time.sleep(0.3)  # the thread hands the error over
        if otherwise:
            raise RuntimeError("a real mistake")

    loss = loss_at(STEPS, act)
    monkeypatch.setattr(checkpoint, "save", full)
    watched = lambda network, b: seen.append(int(b.image_id)) or loss(network, b)  # noqa: E731
    with pytest.raises(RuntimeError if otherwise else UserError, match="mistake" if otherwise else "No space left"):
        run(tmp_path, make_task(loss=watched, target=None, polls=100), epochs=2, log_interval=100)
    assert seen[-1] <= STEPS and ("error: No space left on device" in capsys.readouterr().err) == otherwise


def test_progress_file_tells_steps_metrics_and_where_time_went(tmp_path):
    run(tmp_path, make_task(target=0.9), epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "out/progress.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert sorted(kinds[1:-1]) == ["eval", "eval", *["step"] * 4] and kinds[0] == "start" and kinds[-2:] == [
        "eval", "end",
    ]  # fmt: skip
    assert lines[0]["config"]["seed"] == 5 and lines[0]["targets"] == {"AP": 0.9} and lines[-1]["status"] == "aborted"
    assert set(lines[-1]["seconds"]) == {"start_up", "data", "train", "evaluation", "checkpoint"}
    assert [line["step"] for line in lines if line["kind"] == "step"] == [2, 4, 6, 8]


def test_scaler_and_precision_follow_the_config():
    assert not select_backend("cpu", "auto").scaler().is_enabled()
    with pytest.raises(UserError, match="fp16"):
        select_backend("cpu", "fp16")
    with select_backend("cpu", "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
