"""The recorded step against the same step as it is written: equal to the last bit, whatever it is made of."""

import contextlib
import copy
import dataclasses
import gc
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from detcore import UserError, cli
from detcore.data.synthetic import synthetic_batches
from detcore.device import graphs
from detcore.device.cpu import CpuBackend
from detcore.device.cuda import GraphRecorder
from detcore.nn import optim
from detcore.processes import distributed
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Data, Task
from tests.detcore.device.tape import TapeRecorder

ROOT = Path(__file__).resolve().parents[3]
STEPS, SIZE, CLASSES = 6, (8, 8), 3
ALL = {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 0.5}


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


both = pytest.mark.parametrize("optimizer", [adam, sgd])


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


class Prepared:
    """A task with its state on the CPU, whose step is recorded where there is a recorder."""

    def __init__(self, recorder=None, optimizer=adam, *, scale=False, device=None, **options):
        self.device, self.config = device or CpuBackend(torch.device("cpu"), "fp32", recorder), RunConfig(**options)
        self.task, self.calls = make_task(optimizer), 0
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scale)
        average = optim.Ema(self.task.model, 0.9) if self.config.ema_decay else None
        self.state = State(self.task.model, self.task.optimizer, scaler, average)
        self.task.model.train()

    def make_step(self):
        def counted(network, batch):
            self.calls += 1
            return loss(network, batch)

        task = dataclasses.replace(self.task, loss=counted)
        return engine.make_train_step(task, self.state, task.model, self.config, self.device)

    def contents(self):
        return copy.deepcopy(self.state.contents()) | {"generators": self.device.rng_state()}


def train(recorder, optimizer, *, steps=STEPS, resume=None, spoil=None, drop=0.25, passes=None, **options):
    """(the terms of every step, the state's contents and the random generators after it)."""
    run, first = Prepared(recorder, optimizer, **options), 0
    run.task.model.drop.p = drop
    torch.manual_seed(5)
    if resume:
        first = resume["step"]
        run.state.model.load_state_dict(resume["model"])
        optim.load_state_dict(run.state.optimizer, resume["optimizer"])
        run.state.scaler.load_state_dict(resume["scaler"])
        run.state.ema.load_state_dict(resume["ema"])
        run.device.set_rng_state(resume["generators"])
    step, terms = run.make_step(), []
    for i in range(first, first + steps):
        optim.set_lr(run.task.optimizer, run.task.lr(i, 1, 1e-2))
        given = batches(i, passes[i] if passes else run.config.accumulate)
        if i == spoil:
            given[0].boxes.fill_(float("inf"))
        terms.append(step(given))
    return [{name: float(value) for name, value in t.items()} for t in terms], run.contents() | {"step": first + steps}


def same(a, b) -> bool:
    """Whether two nests of tensors and other values are equal to the last bit; fails with the name of what is not."""
    (ours, kind), (theirs, other) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    assert kind == other
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, f"{keystr(path)}: {x} and {y}"
    return True


@both
@pytest.mark.parametrize("options", [{}, ALL | {"scale": True}], ids=["plain", "all"])
def test_a_recorded_step_is_the_step(options, optimizer):
    recorder = TapeRecorder()
    terms, contents = train(recorder, optimizer, **options)
    assert same((terms, contents), train(None, optimizer, **options))
    assert (recorder.recordings, recorder.replays) == (1, STEPS) and len({t["counts"] for t in terms}) == STEPS


@pytest.mark.parametrize("optimizer, clip", [(adam, 0.5), (sgd, 0.0)])
def test_a_step_whose_gradient_overflows_is_left_out_by_the_scale(optimizer, clip):
    recorded, plain = (train(r, optimizer, clip_norm=clip, scale=True, spoil=3)[1] for r in (TapeRecorder(), None))
    assert same(recorded, plain) and recorded["model"]["conv.weight"].isfinite().all()
    assert recorded["scaler"]["scale"] == 2.0**8 * 2 / 2 * 2  # grows after steps 1 and 2, halves, grows after 5 and 6


@both
def test_runs_go_on_from_recorded_to_plain_and_back(optimizer):
    options = {"ema_decay": 0.9, "scale": True}
    terms, contents = [], None
    for recorder in (TapeRecorder(), None, TapeRecorder()):
        more, contents = train(recorder, optimizer, steps=2, resume=contents, **options)
        terms += more
    assert same((terms, contents), train(None, optimizer, **options))


def test_the_tail_of_an_epoch_is_recorded_when_it_comes():
    options, recorder = {"accumulate": 3, "ema_decay": 0.9, "steps": 4, "passes": (3, 2, 3, 2)}, TapeRecorder()
    assert same(train(recorder, adam, **options), train(None, adam, **options))
    assert (recorder.recordings, recorder.replays) == (2, 4)


@both
@pytest.mark.parametrize("resumed", [False, True])
def test_the_warm_up_leaves_no_trace(optimizer, resumed):
    run = Prepared(None, optimizer, scale=True, **ALL)
    if resumed:
        run.make_step()(batches(3, 2))
    before, run.calls = run.contents(), 0
    run.device = dataclasses.replace(run.device, recorder=TapeRecorder())
    run.make_step()
    assert run.calls == 2 * (graphs.STEP_WARM_UPS + 1)
    after = run.contents()
    if not resumed:  # the optimizer's state is there now, as it begins
        made = after["optimizer"].pop("state")
        assert made and not any(value.any() for value in tree_leaves(made))
        before["optimizer"].pop("state")
    assert same(after, before)


class WarmsUp(CpuBackend):
    warms_up = True


@pytest.mark.parametrize("reason", ["a GPU without recorder", "several GPUs", "compile"])
def test_a_step_that_is_not_recorded_is_warmed_up_too(reason, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    recorder = TapeRecorder() if reason == "several GPUs" else None
    kind = CpuBackend if reason == "compile" else WarmsUp
    device = kind(torch.device("cpu"), "fp32", recorder, (recorder and reason) or "")
    run = Prepared(device=device, accumulate=2, compile=reason == "compile")
    before = run.contents()
    step = run.make_step()
    assert run.calls == 2 * graphs.WARM_UPS
    assert same([run.contents()[part] for part in ("model", "generators")], [before["model"], before["generators"]])
    step(batches(1, 2))
    step(batches(1, 1))
    assert run.calls == 2 * graphs.WARM_UPS + 3 and (recorder is None or recorder.recordings == 0)


@both
def test_warmed_up_it_trains_as_without(optimizer, monkeypatch):
    plain = train(None, optimizer, scale=True, **ALL)
    monkeypatch.setattr(CpuBackend, "warms_up", True)
    assert same(train(None, optimizer, scale=True, **ALL), plain)


def test_several_gpus_record_inference_only():
    device = CpuBackend(torch.device("cpu"), "fp32", TapeRecorder(), "several GPUs")
    assert not device.records_steps and "not recorded (several GPUs)" in device.step_execution
    model = Net().eval()
    with torch.inference_mode():
        device.compile_inference(lambda batch: model(batch.images))(batches(1, 1)[0])
    assert device.recorder.recordings == 1


def test_what_changed_is_put_back_after_an_error_too():
    run = Prepared()
    before = run.contents()
    with pytest.raises(KeyError), run.state.unchanged(run.device), torch.no_grad():
        run.task.model.conv.weight.zero_()
        raise KeyError
    assert same(run.contents(), before)


@both
@pytest.mark.parametrize("recorder", [None, TapeRecorder()], ids=["plain", "recorded"])
def test_what_a_run_held_goes_with_it(optimizer, recorder):
    """No cycle keeps its memory until Python looks for one, which torch no longer asks for before a recording."""
    run = Prepared(recorder, optimizer, scale=True, **ALL)
    task, state, device = run.task, run.state, run.device
    gc.disable()
    try:
        step = engine.make_train_step(task, state, task.model, run.config, device)
        find = device.compile_inference(lambda batch, model=task.model: model(batch.images))
        for i, passes in enumerate((2, 2, 1)):
            step(batches(i, passes))
        find(batches(3, 1)[0])
        parts = step, find, state, task.model, task.optimizer, state.ema, next(task.model.parameters()).grad
        left = [weakref.ref(part) for part in parts]
        del run, task, state, step, find, parts
        assert [part() for part in left] == [None] * len(left)
    finally:
        gc.enable()


def test_the_terms_of_a_step_outlive_the_next():
    step = Prepared(TapeRecorder()).make_step()
    first = step(batches(1, 1))
    kept = copy.deepcopy(first)
    step(batches(2, 1))
    assert same(first, kept)


def test_another_shape_is_refused_in_words():
    step = Prepared(TapeRecorder()).make_step()
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


@both
@pytest.mark.parametrize("options", [{}, ALL, ALL | {"scale": True}], ids=["plain", "all", "scaled"])
def test_a_plain_step_reads_no_value(options, optimizer):
    run = Prepared(None, optimizer, **options)
    step = run.make_step()
    with NoReading():
        for i in range(3):
            optim.set_lr(run.task.optimizer, 0.1 / (i + 1))
            step(batches(i, run.config.accumulate))


def test_recorded_inference_follows_the_weights():
    torch.manual_seed(0)
    model, recorder = Net().eval(), TapeRecorder()
    find = CpuBackend(torch.device("cpu"), "fp32", recorder).compile_inference(lambda batch: model(batch.images))
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


def test_a_run_is_the_same_recorded_or_not_or_in_turns(tmp_path, monkeypatch, capsys):
    """Three epochs as written, and one recorded, one as written, one recorded; the words of both, and the order at the
    end: recordings are freed before the process group goes."""
    ends = []

    def run(recorder, folder, epochs, **options):
        device = CpuBackend(torch.device("cpu"), "fp32", recorder)
        monkeypatch.setattr(engine, "open_device", lambda config, world: device)
        monkeypatch.setattr(distributed, "shutdown", lambda: ends.append(recorder and recorder.closed))
        fields = {"log_interval": 4, "device": "cpu", "seed": 3, "ema_decay": 0.9, "output_dir": tmp_path / folder}
        config = RunConfig(epochs=epochs, **fields, **options)
        assert engine.train(config, "retinanet", lambda context: make_task()).code == cli.OK
        (tmp_path / folder / "result_0.txt").unlink()  # it says that the run has ended with success
        saved = checkpoint.load(tmp_path / folder / "last.pt")
        saved.pop("config")
        assert [type(group["lr"]) for group in saved["optimizer"]["param_groups"]] == [float]
        return saved, capsys.readouterr().err

    expected, said = run(None, "whole", 3)
    assert "ops: " in said and "steps: not recorded (not asked for)" in said
    recorders = TapeRecorder(), None, TapeRecorder()
    for done, recorder in enumerate(recorders):
        found, said = run(recorder, "parts", done + 1, resume=done > 0, graphs="auto" if recorder else "off")
        assert ("steps: recorded once" in said) == bool(recorder)
    assert same(found, expected)
    assert [r.replays for r in recorders if r] == [STEPS, STEPS] and ends == [None, True, None, True]


def test_ranks_record_their_exchange():
    """Two processes, gradients exchanged once for two micro-batches; the recording runs its lines again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"""
import contextlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from detcore.processes import distributed
from detcore.training import engine
from detcore.nn import optim
from tests.detcore.device.test_graphs import ALL, Prepared, batches, same, sgd
r = 0 if os.fork() else 1
place = dict(RANK=r, WORLD_SIZE=2, LOCAL_RANK=r, MASTER_ADDR='127.0.0.1', MASTER_PORT={port})
distributed.init('gloo', 60, {{name: str(value) for name, value in place.items()}})
class Again:
    made = 0
    @contextlib.contextmanager
    def side_stream(self):
        Again.made += 1
        yield
    def record(self, work):
        return work
def train(recorder):
    run = Prepared(recorder, sgd, scale=True, **ALL)
    parallel = run.device.parallel(run.task.model, 2)
    torch.manual_seed(r)
    parallel.train()
    step = engine.make_train_step(run.task, run.state, parallel, run.config, run.device)
    for i in range(4):
        optim.set_lr(run.task.optimizer, run.task.lr(i, 1, 1e-2))
        step(batches(10 * i + r, 2))
    return run.contents()
assert same(train(Again()), train(None)) and Again.made == 2
distributed.barrier()
distributed.shutdown()
assert r or os.wait()[1] == 0
"""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr


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
    recorder = GraphRecorder(torch.device("cpu"), steps=False)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    recorder = GraphRecorder(torch.device("cpu"), steps=True)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    with recorder.side_stream():
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
    terms, _ = train(None, adam, compile=True, steps=3, drop=0.0)
    expected, _ = train(None, adam, steps=3, drop=0.0)
    assert all(ours == pytest.approx(theirs, rel=1e-3) for ours, theirs in zip(terms, expected, strict=True))
