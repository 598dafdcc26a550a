"""Runs that stop and go on, and output folders that hold an earlier run."""

import functools
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from detcore import UserError, cli
from detcore.processes import distributed
from detcore.processes.launcher import World
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from tests.detcore.training.line import STEPS, USUAL, epochs_of, load, loss_at, make_task, run, status, weight


@pytest.fixture
def one_epoch(tmp_path, trained):
    """A folder whose out/ holds a run of one epoch without a target."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(folder, make_task(target=None), epochs=1)
    return folder


def no_data():
    raise UserError("nowhere.json: no such file")


def no_model(context):
    raise UserError("there is no file of its weights")


@pytest.mark.parametrize(
    ("image", "number", "stopped", "position"), [(5, signal.SIGTERM, 6, (1, 2)), (5, signal.SIGUSR1, 6, (1, 2)),
                                                 (STEPS - 1, signal.SIGTERM, STEPS, (1, 0))],
)  # fmt: skip
def test_a_signal_saves_and_resume_gives_the_same_weights(tmp_path, image, number, stopped, position):
    """Also in the last step of an epoch."""
    sent = loss_at(image, functools.cache(lambda network: os.kill(os.getpid(), number)))
    outcome, log = run(tmp_path, make_task(loss=sent, target=0.9))
    assert (outcome.code, outcome.step, status(log)) == (cli.STOPPED, stopped, ["aborted"])
    events = []
    metrics = (0.1, 0.2, 0.3)[len(load(tmp_path)["evaluations"]) :]
    outcome, log = run(tmp_path, make_task(metrics=metrics, target=0.9, events=events), resume=True)
    assert ("stream", *position) in events and outcome.step == 3 * STEPS
    assert weight(tmp_path) == pytest.approx(USUAL[12], abs=1e-12)
    assert epochs_of(log, "eval_accuracy") == [("eval_accuracy", epoch) for epoch in (1, 2, 3)]
    assert [epoch for epoch, _ in load(tmp_path)["evaluations"]] == [1, 2]  # the third came after the last checkpoint


def test_a_rank_whose_signal_comes_late_stops_with_the_others(tmp_path, monkeypatch, capsys):
    """It has none of its own when the others tell it of theirs."""
    asked = []

    def all_reduce_max(values, device="cpu"):
        asked.append(values)
        return [*values[:2], signal.SIGUSR1] if len(values) == 3 and len(asked) > 2 else list(values)

    monkeypatch.setattr(distributed, "all_reduce_max", all_reduce_max)
    outcome, _ = run(tmp_path, make_task(target=0.9))
    assert outcome.code == cli.STOPPED and "Stopped by SIGUSR1" in capsys.readouterr().err


def test_a_run_whose_epochs_end_with_fewer_micro_batches_goes_on_where_it_was(tmp_path):
    events, tail = [], {"target": None, "per_epoch": 2, "micro_batches": 5, "values": lambda i: i}
    run(tmp_path, make_task(**tail), epochs=1, accumulate=3)
    run(tmp_path, make_task(**tail, events=events), epochs=2, accumulate=3, resume=True)
    assert events[1] == ("stream", 1, 0)
    run(tmp_path, make_task(**tail), epochs=2, accumulate=3, output_dir=tmp_path / "whole" / "out")
    assert weight(tmp_path) == weight(tmp_path / "whole")


def test_resume_at_an_epochs_end_makes_up_for_the_missing_evaluation(one_epoch):
    assert load(one_epoch)["evaluations"] == []  # last.pt is written before the evaluation
    events = []
    _, log = run(one_epoch, make_task(target=0.9, metrics=(0.5, 0.6), events=events), epochs=2, resume=True)
    assert next(e for e in events if e[0] == "evaluate")[2] == pytest.approx(USUAL[STEPS], abs=1e-12)
    assert [epoch for _, epoch in epochs_of(log, "eval_accuracy")] == [1, 1, 2]


def test_a_run_goes_on_on_another_kind_of_device(one_epoch, capsys):
    last = one_epoch / "out/last.pt"
    saved = checkpoint.load(last)
    assert len(saved["generators"]) == 1
    of_a_gpu = torch.cat((saved["generators"], torch.zeros(1, 16, dtype=torch.uint8)), 1)
    checkpoint.save(last, saved | {"generators": of_a_gpu})
    run(one_epoch, make_task(target=None), epochs=2, resume=True, device="auto")
    assert "resumed on another kind of device" in capsys.readouterr().err
    assert weight(one_epoch) == pytest.approx(USUAL[8], abs=1e-12)


def test_resume_with_other_settings_is_refused(one_epoch):
    with pytest.raises(UserError, match="accumulate was 1, is 2"):
        run(one_epoch, make_task(), epochs=2, resume=True, accumulate=2)
    with pytest.raises(UserError, match="had 4 steps an epoch, this data set gives 3"):
        run(one_epoch, make_task(target=None, per_epoch=3), epochs=2, resume=True)


def test_resume_without_a_run_and_with_another_programs(one_epoch):
    with pytest.raises(UserError, match=r"--resume: there is no run to go on with in .*nowhere.*--output-dir"):
        run(one_epoch, make_task(), epochs=2, resume=True, output_dir=one_epoch / "nowhere")
    assert not (one_epoch / "nowhere").exists()
    last = one_epoch / "out/last.pt"
    checkpoint.save(last, checkpoint.load(last) | {"program": "elsewhere"})
    with pytest.raises(UserError, match=r"last\.pt is a checkpoint of elsewhere, this is detcore"):
        run(one_epoch, make_task(), epochs=2, resume=True)


def test_a_setting_younger_than_the_checkpoint_was_at_its_default(one_epoch):
    saved = checkpoint.load(last := one_epoch / "out/last.pt")
    del saved["config"]["variants"], saved["optimizer"]["param_groups"][0]["initial_lr"]
    checkpoint.save(last, saved)
    with pytest.raises(UserError, match=r"variants was \[\], is \['stem'\]"):
        run(one_epoch, make_task(), epochs=2, resume=True, variants=("stem",))
    assert run(one_epoch, make_task(target=None), epochs=2, resume=True)[0].code == cli.OK
    assert weight(one_epoch) == pytest.approx(USUAL[8], abs=1e-12)


@pytest.mark.parametrize("name", ["config", "seed", "step", "generators", "world_size", "evaluations", "optimizer"])
@pytest.mark.parametrize("value", [None, "absent", [["x"]], {"a": 1}, torch.zeros(2), -3])
def test_a_checkpoint_of_other_content_is_refused_in_words(one_epoch, name, value):
    if name == "seed" and isinstance(value, int):
        return  # any number is a seed
    saved = checkpoint.load(last := one_epoch / "out/last.pt")
    saved.pop(name)
    checkpoint.save(last, saved if value == "absent" else saved | {name: value})
    with pytest.raises(UserError, match="--resume"):
        run(one_epoch, make_task(target=None), epochs=2, resume=True)


def test_a_run_that_succeeded_keeps_its_log(one_epoch):
    before = (one_epoch / "out/result_0.txt").read_bytes()
    with pytest.raises(UserError, match="has ended with success"):
        run(one_epoch, make_task(target=None), resume=True, epochs=1)
    assert (one_epoch / "out/result_0.txt").read_bytes() == before


def test_an_earlier_run_is_not_lost(one_epoch):
    """Unless --overwrite says so, and then only once the new run has its data."""
    before = (one_epoch / "out/last.pt").read_bytes()
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        run(one_epoch, make_task(target=None), epochs=1)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        run(one_epoch, make_task(open_data=no_data), overwrite=True)
    assert (one_epoch / "out/last.pt").read_bytes() == before
    assert b"success" in (one_epoch / "out/result_0.txt").read_bytes(), "it is put back"
    assert run(one_epoch, make_task(target=None), epochs=1, overwrite=True)[0].code == cli.OK


def test_a_run_that_is_refused_before_it_trains_leaves_no_record(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError):
            run(tmp_path, make_task(open_data=no_data))
        assert not list(out.iterdir())
    for name in ("result_0.txt", "progress.jsonl"):  # of a run that ended before its first checkpoint
        (out / name).write_text(f"earlier {name}")
    with pytest.raises(UserError):
        engine.train(RunConfig(output_dir=out, device="cpu"), "retinanet", no_model)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "result_0.txt": "earlier result_0.txt", "progress.jsonl": "earlier progress.jsonl",
    }  # fmt: skip
    outcome, _ = run(tmp_path, make_task())
    assert outcome.code == cli.OK and not list(out.glob("*.previous"))


def test_a_last_checkpoint_of_another_network_is_told_in_one_sentence(tmp_path):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    state = State(model, torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler(enabled=False), None)
    saved = {"model": {f"x{i}": torch.zeros(1) for i in range(90)}}
    with pytest.raises(UserError) as error:
        state.restore(saved, RunConfig(output_dir=tmp_path), World(), None)
    assert str(error.value) == (
        f"--resume: {tmp_path}/last.pt does not fit this model: missing 0.weight, 0.bias, 1.weight, ... (40 of the "
        "model's 40); unexpected x0, x1, x2, ... (90 of the file's 90)"
    )
