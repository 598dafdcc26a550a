"""The recorded step against the same step as it is written: equal to the last bit, whatever it is made of."""

import contextlib
import copy
import dataclasses
import gc
import os
import re
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detcore import UserError, cli
from detcore.data.synthetic import synthetic_batches
from detcore.device import backend, graphs
from detcore.nn import optim
from detcore.processes import distributed
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Data, Task
from tests.detcore.device.tape import TapeRecorder

ROOT = Path(__file__).resolve().parents[3]
STEPS, SIZE, CLASSES = 6, (8, 8), 3


class Net(nn.Module):
    """What a step can meet: convolution, batch statistics, random numbers, weights of one and of more dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.25)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, images):
        x = self.drop(torch.relu(self.norm(self.conv(images.float() / 255))))
        return self.out(x.mean((2, 3)))


def loss(network, batch):
    logits = network(batch.images)
    counts = torch.stack([(batch.labels == k).sum(1) for k in range(CLASSES)], 1)
    size = logits.sum(1) - batch.boxes.sum((1, 2)) / 100
    return {"counts": (logits - counts).square().mean(), "size": size.square().mean()}


def batches(seed: int, count: int, images: int = 2):
    """Different ones each."""
    return [next(synthetic_batches(CLASSES, SIZE, images, 5, seed * 100 + i)) for i in range(count)]


def adam(model):
    return optim.adam(model, 1e-2, 1e-3, fused=True)


def sgd(model):
    return optim.sgd(model, 1e-3, 0.9, 1e-2, fused=True)


def make_task(optimizer=adam) -> Task:
    torch.manual_seed(1)
    model = Net()

    def open_data():
        def stream(epoch, step):
            step += epoch * STEPS
            while True:
                yield from batches(step, 1)
                step += 1

        return Data(7, 5, STEPS, stream, lambda network, beat: None, lambda: None)

    return Task(
        model=model,
        optimizer=optimizer(model),
        lr=lambda step, per_epoch, base: 1e-2 / (1 + step),
        loss=loss,
        open_data=open_data,
        targets={"AP": None},
        eval_epochs=lambda completed, epochs: False,
        hyperparameters={},
        examples=lambda: batches(99, 1),
    )


def make_state(task: Task, config: RunConfig, scale: bool) -> State:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scale)
    return State(task.model, task.optimizer, scaler, optim.Ema(task.model, 0.9) if config.ema_decay else None)


def train(recorder, optimizer, config, *, scale=False, steps=STEPS, resume=None, spoil=None, drop=0.25, passes=None):
    """(the terms of every step, the state's contents and the random generators after it)."""
    device = backend.Backend(torch.device("cpu"), "fp32", recorder)
    task = make_task(optimizer)
    state = make_state(task, config, scale)
    task.model.drop.p = drop
    torch.manual_seed(5)
    if resume:
        state.model.load_state_dict(resume["model"])
        optim.load_state_dict(state.optimizer, resume["optimizer"])
        state.scaler.load_state_dict(resume["scaler"])
        state.ema.load_state_dict(resume["ema"]) if state.ema else None
        device.set_rng_state(resume["generators"])
    task.model.train()
    step = engine.make_train_step(task, state, task.model, config, device)
    first = resume["step"] if resume else 0
    terms = []
    for i in range(first, first + steps):
        optim.set_lr(task.optimizer, task.lr(i, 1, 1e-2))
        given = batches(i, passes[i] if passes else config.accumulate)
        if i == spoil:
            given[0].boxes.fill_(float("inf"))
        terms.append(step(given))
    contents = copy.deepcopy(state.contents()) | {"generators": device.rng_state(), "step": first + steps}
    return [{name: float(value) for name, value in t.items()} for t in terms], contents


def flat(value, name=""):
    if isinstance(value, dict):
        return [item for key, v in value.items() for item in flat(v, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [item for i, v in enumerate(value) for item in flat(v, f"{name}.{i}")]
    return [(name, value)]


def same(a, b) -> bool:
    a, b = flat(a), flat(b)
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b):
        equal = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        assert equal, f"{name}: {x} and {y}"
    return True


CASES = {
    "plain": {},
    "average": {"ema_decay": 0.9},
    "accumulated": {"accumulate": 3},
    "clipped": {"clip_norm": 0.5},
    "all": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 0.5},
}


@pytest.mark.parametrize("scale", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_step(case, optimizer, scale):
    config, recorder = RunConfig(**CASES[case]), TapeRecorder()
    terms, contents = train(recorder, optimizer, config, scale=scale)
    expected_terms, expected = train(None, optimizer, config, scale=scale)
    assert (recorder.recordings, recorder.replays) == (1, STEPS)
    assert terms == expected_terms and len({t["counts"] for t in terms}) == STEPS
    assert same(contents, expected)


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_whose_gradient_overflows_is_left_out_by_the_scale(optimizer, clip):
    config = RunConfig(clip_norm=clip)
    _, contents = train(TapeRecorder(), optimizer, config, scale=True, spoil=3)
    _, expected = train(None, optimizer, config, scale=True, spoil=3)
    assert same(contents, expected)
    assert contents["model"]["conv.weight"].isfinite().all()
    assert contents["scaler"]["scale"] == 2.0**8 * 2 / 2 * 2  # grows after steps 1 and 2, halves, grows after 5 and 6


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_runs_go_on_from_recorded_to_plain_and_back(optimizer):
    config = RunConfig(ema_decay=0.9)
    whole, expected = train(None, optimizer, config, scale=True, steps=9)
    terms, contents = [], None
    for recorder in (TapeRecorder(), None, TapeRecorder()):
        more, contents = train(recorder, optimizer, config, scale=True, steps=3, resume=contents)
        terms += more
    assert terms == whole and same(contents, expected)


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_the_tail_of_an_epoch_is_recorded_when_it_comes(optimizer):
    config, passes, recorder = RunConfig(accumulate=3, ema_decay=0.9), (3, 2, 3, 2), TapeRecorder()
    plain = train(None, optimizer, config, steps=4, passes=passes)
    recorded = train(recorder, optimizer, config, steps=4, passes=passes)
    assert recorder.recordings == 2 and recorder.replays == 4
    assert plain[0] == recorded[0] and same(plain[1], recorded[1])


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_warm_up_leaves_no_trace(optimizer, resumed):
    task, config = make_task(optimizer), RunConfig(accumulate=2, ema_decay=0.9)
    state = make_state(task, config, True)
    task.model.train()
    device = backend.Backend(torch.device("cpu"), "fp32")
    if resumed:
        engine.make_train_step(task, state, task.model, config, device)(batches(3, 2))
    before, generators = copy.deepcopy(state.contents()), device.rng_state()
    calls = []

    def counted(network, batch):
        calls.append(batch.images.shape)
        return loss(network, batch)

    recording = dataclasses.replace(device, recorder=TapeRecorder())
    engine.make_train_step(dataclasses.replace(task, loss=counted), state, task.model, config, recording)
    assert len(calls) == 2 * (graphs.STEP_WARM_UPS + 1)
    after = state.contents()
    if not resumed:  # the optimizer's state is there now, as it begins
        made = after["optimizer"].pop("state")
        assert made and all(not v.any() for _, v in flat(made))
        before["optimizer"].pop("state")
    assert same(after, before) and torch.equal(device.rng_state(), generators)


class WarmsUp(backend.Backend):
    warms_up = True


@pytest.mark.parametrize("reason", ["a GPU without recorder", "several GPUs", "compile"])
def test_a_step_that_is_not_recorded_is_warmed_up_too(reason, monkeypatch):
    config, calls, task = RunConfig(accumulate=2, compile=reason == "compile"), [], make_task()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    state = make_state(task, config, False)

    def counted(network, batch):
        calls.append(batch.images.shape)
        return loss(network, batch)

    device = (backend.Backend if config.compile else WarmsUp)(torch.device("cpu"), "fp32")
    if reason == "several GPUs":
        device = dataclasses.replace(device, recorder=TapeRecorder(), eager=reason)
    before, generators = copy.deepcopy(state.model.state_dict()), device.rng_state()
    step = engine.make_train_step(dataclasses.replace(task, loss=counted), state, task.model, config, device)
    assert len(calls) == 2 * graphs.WARM_UPS
    assert same(state.model.state_dict(), before) and torch.equal(device.rng_state(), generators)
    step(batches(1, 2))
    step(batches(1, 1))
    assert len(calls) == 2 * graphs.WARM_UPS + 3 and (device.recorder is None or device.recorder.recordings == 0)


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_warmed_up_it_trains_as_without(optimizer, monkeypatch):
    config = RunConfig(accumulate=2, ema_decay=0.9)
    plain = train(None, optimizer, config, scale=True)
    monkeypatch.setattr(backend.Backend, "warms_up", True)
    assert same(train(None, optimizer, config, scale=True), plain)


def test_several_gpus_record_inference_only():
    device = backend.Backend(torch.device("cpu"), "fp32", TapeRecorder(), "several GPUs")
    assert not device.records_steps and "not recorded (several GPUs)" in device.steps
    model = Net().eval()
    find = device.compile_inference(lambda batch: model(batch.images))
    with torch.inference_mode():
        find(batches(1, 1)[0])
    assert device.recorder.recordings == 1


def test_what_changed_is_put_back_after_an_error_too():
    task = make_task()
    state, device = make_state(task, RunConfig(), False), backend.Backend(torch.device("cpu"), "fp32")
    before = copy.deepcopy(state.contents())
    with pytest.raises(KeyError), state.unchanged(device):
        with torch.no_grad():
            task.model.conv.weight.zero_()
        raise KeyError
    assert same(state.contents(), before)


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("recorder", [None, TapeRecorder()], ids=["plain", "recorded"])
def test_what_a_run_held_goes_with_it(optimizer, recorder):
    """No cycle keeps its memory until Python looks for one, which torch no longer asks for before a recording."""
    task, config = make_task(optimizer), RunConfig(accumulate=2, ema_decay=0.9, clip_norm=0.5)
    state, device = make_state(task, config, True), backend.Backend(torch.device("cpu"), "fp32", recorder)
    gc.disable()
    try:
        step = engine.make_train_step(task, state, task.model, config, device)
        find = device.compile_inference(lambda batch, model=task.model: model(batch.images))
        for i in range(2):
            step(batches(i, 2))
        step(batches(2, 1))
        find(batches(3, 1)[0])
        parts = step, find, state, task.model, task.optimizer, state.ema, next(task.model.parameters()).grad
        left = [weakref.ref(part) for part in parts]
        del task, state, step, find, parts
        assert [part() for part in left] == [None] * len(left)
    finally:
        gc.enable()


def test_the_terms_of_a_step_outlive_the_next():
    task = make_task()
    recorder = TapeRecorder()
    device = backend.Backend(torch.device("cpu"), "fp32", recorder)
    step = engine.make_train_step(task, make_state(task, RunConfig(), False), task.model, RunConfig(), device)
    first = step(batches(1, 1))
    kept = {name: value.clone() for name, value in first.items()}
    step(batches(2, 1))
    assert same(first, kept)


def test_another_shape_is_refused_in_words():
    task = make_task()
    device = backend.Backend(torch.device("cpu"), "fp32", TapeRecorder())
    step = engine.make_train_step(task, make_state(task, RunConfig(), False), task.model, RunConfig(), device)
    said = r"1 x \(images 1x3x8x8 uint8, 5 boxes\) .* recorded for 1 x \(images 2x3x8x8 uint8, 5 boxes\).*--graphs off"
    with pytest.raises(UserError, match=said):
        step(batches(1, 1, images=1))
    with pytest.raises(UserError, match="2 x "):
        step(batches(1, 2))


class NoReading(TorchDispatchMode):
    """Fails where a step would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the step reads a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("case", CASES)
def test_a_plain_step_reads_no_value(case, optimizer, scale):
    config, task = RunConfig(**CASES[case]), make_task(optimizer)
    state = make_state(task, config, scale)
    step = engine.make_train_step(task, state, task.model, config, backend.Backend(torch.device("cpu"), "fp32"))
    with NoReading():
        for i in range(3):
            optim.set_lr(task.optimizer, 0.1 / (i + 1))
            step(batches(i, config.accumulate))


def test_recorded_inference_follows_the_weights():
    torch.manual_seed(0)
    model, recorder = Net().eval(), TapeRecorder()
    device = backend.Backend(torch.device("cpu"), "fp32", recorder)
    find = device.compile_inference(lambda batch: model(batch.images))
    one, two, small = *batches(1, 2), batches(7, 1, images=1)[0]
    ema = optim.Ema(model, 0.5)
    ema.average["out.bias"].add_(3)
    with torch.inference_mode():
        first = find(one)
        assert torch.equal(first, model(one.images)) and torch.equal(find(two), model(two.images))
        assert torch.equal(first, model(one.images)), "the result outlives the next"
        assert torch.equal(find(small), model(small.images))
    with torch.no_grad():
        model.out.weight.mul_(2)
        assert torch.equal(find(one), model(one.images)) and not torch.equal(find(one), first)
        with ema.applied(model):
            assert torch.equal(find(one), model(one.images))
        assert torch.equal(find(one), model(one.images))
    assert recorder.recordings == 2


def run(tmp_path, monkeypatch, recorder, name, **options):
    device = backend.Backend(torch.device("cpu"), "fp32", recorder)
    monkeypatch.setattr(backend, "select", lambda *args, **more: device)
    fields = {"epochs": 2, "log_interval": 4, "device": "cpu", "seed": 3, "output_dir": tmp_path / name}
    outcome = engine.train(RunConfig(**fields | {"ema_decay": 0.9} | options), "retinanet", lambda context: make_task())
    assert outcome.code == cli.OK
    saved = checkpoint.load(tmp_path / name / "last.pt")
    saved.pop("config")
    return saved


def test_a_run_with_recorded_steps_is_the_run(tmp_path, monkeypatch, capsys):
    recorder, ends = TapeRecorder(), []
    monkeypatch.setattr(distributed, "shutdown", lambda: ends.append(recorder.closed))
    ours = run(tmp_path, monkeypatch, recorder, "recorded")
    assert recorder.replays == 2 * STEPS and ends == [True], "given back before the process group goes"
    said = capsys.readouterr().err
    assert "ops: " in said and "steps: recorded once" in said
    theirs = run(tmp_path, monkeypatch, None, "plain")
    assert "steps: not recorded (not asked for)" in capsys.readouterr().err
    assert same(ours, theirs)
    assert [type(g["lr"]) for g in ours["optimizer"]["param_groups"]] == [float]


def test_a_run_goes_on_recorded_or_not(tmp_path, monkeypatch):
    expected = run(tmp_path, monkeypatch, None, "whole", epochs=3)
    run(tmp_path, monkeypatch, TapeRecorder(), "parts", epochs=1)
    for epochs, recorder, graphs_ in ((2, None, "off"), (3, TapeRecorder(), "auto")):
        folder = tmp_path / "parts"
        (folder / "result_0.txt").unlink()  # it says that the run has ended with success
        found = run(tmp_path, monkeypatch, recorder, "parts", epochs=epochs, resume=True, graphs=graphs_)
    assert same(found, expected)


def test_options_of_the_optimizer_are_not_those_of_the_checkpoint():
    task = make_task(lambda model: torch.optim.Adam(model.parameters(), lr=0.5))
    task.loss(task.model, batches(1, 1)[0])["counts"].backward()
    task.optimizer.step()
    saved = optim.state_dict(task.optimizer)
    ours = make_task(adam).optimizer
    rate = ours.param_groups[0]["lr"]
    optim.load_state_dict(ours, saved)
    group = ours.param_groups[0]
    assert group["lr"] is rate and float(rate) == pytest.approx(1e-2) and group["fused"] and group["capturable"]
    moments = [values["exp_avg"] for values in ours.state.values()]
    assert all(torch.equal(m, saved["state"][i]["exp_avg"]) for i, m in enumerate(moments)) and len(moments) == 6
    with pytest.raises(ValueError):
        optim.load_state_dict(make_task(sgd).optimizer, saved)  # two groups


def test_sgd_decays_weights_and_not_biases_and_norms():
    model = Net()
    groups = optim.sgd(model, 0.1, 0.9, 0.01, fused=False).param_groups
    named = {p: name for name, p in model.named_parameters()}
    sorts = {g["weight_decay"]: {named[p] for p in g["params"]} for g in groups}
    assert sorts == {0.01: {"conv.weight", "out.weight"}, 0.0: {"conv.bias", "norm.weight", "norm.bias", "out.bias"}}
    assert all(type(g["lr"]) is float and g["momentum"] == 0.9 for g in groups)


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_graphs_on_where_no_gpu_is_meant_is_refused_with_the_configuration(device):
    with pytest.raises(UserError, match=f"--graphs on --device {device}: only a GPU"):
        RunConfig(graphs="on", device=device)


def test_who_records_steps():
    with pytest.raises(UserError, match="--graphs on: only a GPU"):
        backend.select("cpu", "fp32", graphs="on")
    device = backend.select("cpu", "fp32", graphs="auto")
    assert device.recorder is None and "only a GPU" in device.steps
    assert backend._why_eager("cuda", "auto", 1) == "" and backend._why_eager("cuda", "on", 8) == ""
    assert re.search("few images.*waits for the processor.*--graphs on", backend._why_eager("cuda", "auto", 8))
    assert backend._why_eager("cuda", "off", 1)


def test_ranks_record_their_exchange():
    """Two processes, gradients exchanged once for two micro-batches; the recording runs its lines again."""
    port = free_port()
    program = f"""
import contextlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from detcore.device import backend
from detcore.processes import distributed
from detcore.training import engine
from detcore.nn import optim
from detcore.training.config import RunConfig
from tests.detcore.device.test_graphs import batches, make_state, make_task, same, sgd
r = 0 if os.fork() else 1
place = dict(RANK=r, WORLD_SIZE=2, LOCAL_RANK=r, MASTER_ADDR='127.0.0.1', MASTER_PORT={port})
distributed.init('gloo', 60, {{name: str(value) for name, value in place.items()}})
class Again:
    made = 0
    @contextlib.contextmanager
    def aside(self):
        Again.made += 1
        yield
    def record(self, work):
        return work
def train(recorder):
    device, config = backend.Backend(torch.device('cpu'), 'fp32', recorder), RunConfig(accumulate=2, ema_decay=0.9)
    task = make_task(sgd)
    state = make_state(task, config, True)
    parallel = device.parallel(task.model, 2)
    torch.manual_seed(r)
    parallel.train()
    step = engine.make_train_step(task, state, parallel, config, device)
    for i in range(4):
        optim.set_lr(task.optimizer, task.lr(i, 1, 1e-2))
        step(batches(10 * i + r, 2))
    return state.contents(), device.rng_state()
assert same(train(Again()), train(None)) and Again.made == 2
distributed.barrier()
distributed.shutdown()
assert r or os.wait()[1] == 0
"""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_recorder_of_a_gpu_keeps_to_the_rules_of_pytorch(monkeypatch):
    """One stream aside for warm-up and capture that waits for the main one and is waited for; graphs given back."""
    events = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            events.append("replay")

        def reset(self):
            events.append("reset")

    @contextlib.contextmanager
    def entered(what):
        events.append(what)
        yield
        events.append("left")

    def capture(graph, pool, stream, capture_error_mode):
        return entered(f"capture {pool} {stream.name} {capture_error_mode}")

    main = Stream("main")
    fakes = {"Stream": lambda device: Stream(), "graph_pool_handle": lambda: "pool", "CUDAGraph": Graph}
    fakes |= {"current_stream": lambda: main, "stream": lambda s: entered(f"on {s.name}"), "graph": capture}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gc, "collect", lambda: events.append("collect"))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")  # it comes back as it was
    recorder = backend.GraphRecorder(torch.device("cpu"), steps=False)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    recorder = backend.GraphRecorder(torch.device("cpu"), steps=True)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    with recorder.aside():
        events.append("warm-up")
    replay = recorder.record(lambda: events.append("work") or 7)
    assert replay() == replay() == 7
    recorder.close()
    recorder.close()
    assert events == [
        *("aside waits for main", "on aside", "warm-up", "left", "main waits for aside"),
        *("collect", "capture pool aside thread_local", "work", "left", "replay", "replay", "reset"),
    ]

    def fails():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with pytest.raises(UserError, match=r"not permitted when stream is capturing\); --graphs off"):
        recorder.record(fails)


@pytest.mark.slow
def test_torch_compile_computes_the_same():
    """Without random numbers, which its kernels draw otherwise."""
    terms, _ = train(None, adam, RunConfig(compile=True), steps=3, drop=0.0)
    expected, _ = train(None, adam, RunConfig(), steps=3, drop=0.0)
    assert all(ours == pytest.approx(theirs, rel=1e-3) for ours, theirs in zip(terms, expected, strict=True))
