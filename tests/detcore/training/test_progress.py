"""When the console says why training waits, and how far a long job is."""

import io

import pytest
import torch

from detcore.training import progress
from detcore.training.progress import Meter, Progress


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds; set clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_advice_comes_when_waiting_and_not_too_often(tmp_path, clock):
    console = io.StringIO()
    said = Progress(tmp_path / "progress.jsonl", console=console)
    for now, wait, expected in [
        (10, 0.9, 0),  # the first interval: the workers start
        (20, 0.1, 0),
        (30, 0.11, 1),
        (40, 0.9, 1),
        (30 + progress.ADVICE_EVERY + 1, 0.05, 1),
        (30 + progress.ADVICE_EVERY + 2, 0.5, 2),
    ]:
        clock[0] = now
        said.advise(100.0, wait, lambda rate, wait: f"slow: {rate} {wait}\n".strip())
        assert console.getvalue().count("slow: 100.0") == expected
    said.close()
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"kind": "loader"' in lines[0] and '"data_wait": 0.11' in lines[0]


def test_nothing_measured_is_nothing_said(tmp_path):
    console = io.StringIO()
    said = Progress(tmp_path / "progress.jsonl", console=console)
    for _ in range(3):
        said.advise(1.0, 0.9, lambda rate, wait: "")
    assert console.getvalue() == ""


def test_the_words_are_asked_for_in_every_interval(tmp_path):
    """They count from call to call, so that one interval's numbers do not mix with another's."""
    asked = []
    said = Progress(None)
    for wait in (0.9, 0.0, 0.9):
        said.advise(1.0, wait, lambda rate, wait: asked.append(wait) or "")
    assert asked == [0.9, 0.0, 0.9]


def test_a_slow_run_says_that_it_is_alive(tmp_path, clock):
    """Where steps take so long that no logging interval ends: the first line after QUIET seconds, and so on."""
    console = io.StringIO()
    said = Progress(tmp_path / "progress.jsonl", console=console)
    said.run_started(100)
    for step, now, expected in [(101, 29, 0), (102, 40, 1), (103, 60, 1), (104, 80, 2)]:
        clock[0] = now
        said.alive(step, 110, lambda: 0)
        assert console.getvalue().count(" of 110: ") == expected
    first, second = console.getvalue().splitlines()
    assert first == "step 102 of 110: 20.00 s a step  ETA 2:40 for all epochs, without evaluation"
    assert second.startswith("step 104 of 110: 20.00 s a step  ETA 2:00")
    said.evaluating(3, 5)
    clock[0] = 111
    said.evaluating(3, 7)
    assert console.getvalue().splitlines()[2:] == ["evaluation after epoch 3: 7 batches looked at"]
    said.say("a line")
    clock[0] = 140
    said.alive(105, 110, lambda: 0)
    assert console.getvalue().splitlines()[3:] == ["a line"]


def test_the_size_of_a_model_and_its_step(tmp_path):
    layers = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5).requires_grad_(False)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    assert progress.about_model(parameters, 0) == "model: 41 parameters, 16 of them train"
    assert progress.about_model(parameters, 1200).endswith("16 of them train; goes on after step 1,200")


def test_meter_of_what_takes_seconds(clock):
    meter = Meter("looking", 10)
    clock[0] = 8
    meter.add(2)
    assert meter.text() == "looking: 2 of 10 (20%), 0.25/s, ETA 0:32"


def test_meter(clock, capsys):
    meter = Meter("packing", 100)
    meter.skip(40)
    clock[0] = 10
    meter.add(20, 10_000_000)
    assert meter.text() == "packing: 60 of 100 (60%), 2/s, 1 MB/s, ETA 0:20"
    assert capsys.readouterr().err == ""
    clock[0] = 40
    meter.add(10)
    assert capsys.readouterr().err.startswith("packing: 70 of 100 (70%)")
    meter.close()
    assert "70 of 100" in capsys.readouterr().err


def test_meter_of_an_unknown_total(clock):
    meter = Meter("counting", 0)
    assert meter.text() == "counting: 0, 0/s"
    clock[0] = 2
    meter.add(1000)
    assert meter.text() == "counting: 1,000, 500/s"


def test_waiting_for_data_while_a_gpu_is_busy_is_no_wait(clock):
    bar = Progress(None)
    bar.run_started(0)

    def interval(step, busy):
        with bar.clock("data"):
            clock[0] += 6.0
        clock[0] += 4.0
        return bar.interval(step=step, images_per_step=2, busy=busy)

    assert interval(5, 0.0) == (1.0, 0.6)  # a CPU does nothing else while it waits
    assert interval(10, 9.0) == (1.0, pytest.approx(0.1))
    assert interval(15, 2.0) == (1.0, 0.6)
    assert interval(20, 10.5) == (1.0, 0.0)
