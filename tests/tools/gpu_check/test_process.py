"""The processes of a check: parts whose processes die, hang, lose the CUDA context or are cut; without a GPU."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tools.gpu_check.common import FILES, no_gpu, options
from tools.gpu_check import __main__ as check
from tools.gpu_check import jobs, process, stages, state

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("words", "whole", "lost"),
    [
        ("RuntimeError: CUDA error: unspecified launch failure", True, True),
        ("torch.AcceleratorError: CUDA error: an illegal instruction was encountered", True, True),
        ("CUDA driver error: misaligned address", True, True),
        ("RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True, True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", True, True),
        ("AcceleratorError: CUDA error: invalid configuration argument", True, False),
        ("AcceleratorError: CUDA error: invalid configuration argument", False, True),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", True, False),
        ("ValueError: wrong", False, True),
    ],
)
def test_a_lost_context_is_told_by_its_words_or_by_the_gpu(monkeypatch, words, whole, lost):
    monkeypatch.setattr(jobs, "answers", lambda: whole)
    assert jobs.lost_context(words, gpu=True) == lost
    assert not jobs.lost_context("ValueError: wrong", gpu=False)


def test_a_gpu_that_reports_an_error_of_before_still_answers(monkeypatch):
    """Of a launch that was refused the next call hears, and only that."""
    calls = []

    def ones(size, device):
        calls.append(device)
        if len(calls) == 1 or broken:
            raise RuntimeError("CUDA error: invalid configuration argument")
        return torch.tensor([1.0, 1.0])

    monkeypatch.setattr(jobs.torch, "ones", ones)
    broken = False
    assert jobs.answers() and calls == ["cuda", "cuda"]
    broken = True
    assert not jobs.answers()


CHILD = """
import json, os, sys, time
from pathlib import Path
def option(name): return sys.argv[sys.argv.index(name) + 1]
out, work, name = Path(option("--out")), Path(option("--work")), option("--child")
file = out / "gpu_check.json"
def write(state):
    (out / "part").write_text(json.dumps(state))
    os.replace(out / "part", file)
def job(key, measure):
    state = json.loads(file.read_text())
    entry = state["parts"].setdefault(name, {})
    rows = entry.setdefault("rows", {})
    if key in rows:
        return
    entry["running"] = key
    write(state)
    rows[key] = measure()
    del entry["running"]
    write(state)
def dies(): os._exit(7)
def hangs(): time.sleep(100)
def cut():
    mark = work / name
    if not mark.exists():
        mark.touch()
        time.sleep(100)
    return {"ms": 1.0}
for key in KEYS:
    job(key, {"dies": dies, "hangs": hangs, "cut": cut}.get(key, lambda: {"ms": 1.0}))
state = json.loads(file.read_text())
state["parts"][name].update(status="passed", reason="", done=[[[], 0]])
write(state)
"""
"""In place of tools.gpu_check as a part's process; it does not wait for torch."""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """child(keys): the parts' processes have these jobs; parts are watched closely."""
    monkeypatch.setattr(process, "GRACE", 0.0)
    monkeypatch.setattr(process, "REFRESH", 0.05)
    monkeypatch.setattr(process, "ENDING", 0.5)

    def make(*keys: str) -> None:
        script = tmp_path / "child.py"
        script.write_text(CHILD.replace("KEYS", repr(keys)))
        monkeypatch.setattr(process, "COMMAND", [sys.executable, str(script)])

    return make


def run_ops(tmp_path: Path, seconds: float, patience: float | None = None) -> tuple[dict, list[str]]:
    """(the part `ops` after a call, the keys that were running whenever the table was to be refreshed)."""
    seen, out = [], tmp_path / "out"
    out.mkdir(exist_ok=True)
    state.save(out, state.load(out))

    def refresh() -> None:
        seen.append(state.load(out)["parts"].get("ops", {}).get("running"))

    part = replace(check.PARTS["ops"], patience=patience)
    process.run_part(part, seconds, options(out, "--quick"), process.Log(tmp_path / "log"), refresh)
    return state.load(out)["parts"]["ops"], seen


def test_a_part_outlives_its_process(tmp_path, child):
    child("dies", "fine")
    part, _ = run_ops(tmp_path, 60.0)
    assert part["rows"] == {
        "dies": {"error": "the process died in it, code 7 (see gpu_check.log)"}, "fine": {"ms": 1.0},
    }  # fmt: skip


def test_a_job_that_hangs_is_ended_marked_and_passed_over(tmp_path, child):
    child("a", "hangs", "b")
    part, seen = run_ops(tmp_path, 60.0, patience=1.0)
    assert list(part["rows"]) == ["a", "hangs", "b"] and part["rows"]["hangs"]["hung"] and "running" not in part
    assert "no end after" in part["rows"]["hangs"]["error"] and seen.count("hangs") >= 3
    saved = {"parts": {"ops": part | {"status": "failed", "done": []}}}
    assert not check.keep(saved, "ops", named=False) and list(saved["parts"]["ops"]["rows"]) == ["a", "hangs", "b"]
    assert not check.keep(saved, "ops", named=True, cases=["hangs"]) and saved["parts"]["ops"]["anew"] == ["hangs"]


@pytest.mark.parametrize(("ran", "patience", "hung"), [(29.0, 30.0, False), (31.0, 30.0, True), (50.0, 120.0, False)])
def test_a_job_that_its_parts_end_cuts_off_has_hung_if_it_had_time(ran, patience, hung):
    entry = {"running": "x", "rows": {"y": {"ms": 1.0}}}
    assert process.judge(entry, None, ran, patience) == hung
    assert ("x" in entry["rows"]) == hung and entry["status"] == ("failed" if hung else "stopped")


def test_a_row_that_was_to_be_measured_again_and_died_is_replaced():
    entry = {"running": "x", "rows": {"x": {"ms": 1.0, "commit": "old"}, "y": {"ms": 1.0}}, "anew": ["x", "y"]}
    assert process.judge(entry, 7, 1.0, 30.0)
    assert list(entry["rows"]["x"]) == ["error"] and entry["anew"] == ["y"], "else it would be begun again and again"


def test_a_part_that_is_through_may_be_slow_to_end():
    entry = {"rows": {"x": {"ms": 1.0}}, "status": "passed", "through": True}
    assert not process.judge(entry, None, 50.0, 30.0) and entry == {"rows": {"x": {"ms": 1.0}}, "status": "passed"}


@no_gpu
def test_every_kind_of_part_cut_once_goes_on_in_the_next_call(tmp_path, child, monkeypatch):
    monkeypatch.setattr(check, "GRACE", 0.0)
    monkeypatch.setattr(check, "ENDING", 0.0)
    monkeypatch.setattr(check, "LEAST", 0.5)
    names = list({part.patience: name for name, part in check.PARTS.items() if part.cpu}.values())  # one of each kind
    monkeypatch.setattr(stages, "STAGES", tuple(check.Stage(name, 1) for name in names))
    child("whole", "cut")
    out = tmp_path / "out"
    check.main(["--out", str(out), "--work", str(tmp_path / "work"), "--quick", "--minutes", f"{2 * len(names) / 60}"])
    parts = state.load(out)["parts"]
    assert sorted(parts) == sorted(names) and sorted(file.name for file in out.iterdir()) == FILES
    for part in parts.values():
        assert part["status"] == "stopped" and list(part["rows"]) == ["whole"]
        assert part["reason"] == "out of time in 'cut'; call again to go on"
    assert (out / "table.txt").read_text().count("stopped") == len(names)
    check.main(["--out", str(out), "--work", str(tmp_path / "work"), "--quick", "--minutes", "3"])
    parts = state.load(out)["parts"]
    assert all(list(part["rows"]) == ["whole", "cut"] and part["status"] == "passed" for part in parts.values())
    assert sorted(file.name for file in out.iterdir()) == FILES


@no_gpu
@pytest.mark.slow
def test_the_real_parts_cut_and_gone_on_with(tmp_path):
    out, words = tmp_path / "out", ("--work", tmp_path / "work", "--quick", "--minutes")
    for minutes in ("0.3", "0.6", "25", "25", "25"):  # on busy processors a part is cut again
        command = [sys.executable, "-m", "tools.gpu_check", "--out", out, *words, minutes]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1520)
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(file.name for file in out.iterdir()) == FILES
        parts = state.load(out)["parts"]
        if passed := all(part["status"] == "passed" for part in parts.values()):
            break
    assert passed
    assert parts["train"]["rows"]["fp32 b2 eager reference"]["images_per_s"] > 0
    for program in ("ssd300", "efficientdet", "maskrcnn"):
        rows = parts[program]["rows"]
        assert all(rows[f"{part} fp32 b2 eager reference"]["images_per_s"] > 0 for part in ("training", "inference"))
