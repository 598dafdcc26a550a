"""tools.gpu_check where there is no GPU: its CPU part, what is cut and goes on, failures."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tools.gpu_check.common import FILES, context, no_gpu
from tools.gpu_check import __main__ as check
from tools.gpu_check import cases, jobs, programs, state
from tools.gpu_check.benchmarks.single_stage_detector import training

ROOT = Path(__file__).parents[3]


def run(*words: str | Path, code: int = 0) -> str:
    """tools.gpu_check as a user calls it; its output."""
    command = [sys.executable, "-m", "tools.gpu_check", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def written_since(moment: float) -> list[str]:
    """Files of the checkout that are younger, but for those of the build."""
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).lstat().st_mtime > moment]


@no_gpu
def test_the_cpu_part_from_end_to_end(tmp_path, capsys):
    began, out = time.time(), tmp_path / "out"
    words = ["--out", str(out), "--work", str(tmp_path / "work"), "--quick", "--only"]
    said = run(*words, "floor,ops", "--minutes", "20")  # on processors that have other work, too
    assert said.count("no GPU on this machine") == 1
    saved = json.loads((out / "gpu_check.json").read_text())
    assert saved["machine"]["device"] == "cpu" and saved["machine"]["torch"] == torch.__version__ and saved["quick"]
    assert list(saved["parts"]) == ["floor", "ops"]
    assert all(part["status"] == "passed" for part in saved["parts"].values()), said
    assert saved["parts"]["floor"]["rows"]["copy"]["gb_s"] > 0
    for row in saved["parts"]["ops"]["rows"].values():
        assert "skipped" in row or (row["difference"] <= row["tolerance"] and row["repeats_equal"])
    printed = (out / "table.txt").read_text()
    assert printed in said and max(map(len, printed.splitlines())) <= 100
    assert "published" not in printed, "nothing of the CPU is set beside published figures of GPUs"
    assert written_since(began) == []
    assert sorted(file.name for file in out.iterdir()) == FILES

    assert check.main([*words, "none"]) == 0 and printed in capsys.readouterr().out

    assert check.main([*words, "floor", "--case", "c?py"]) == 0
    before, after = saved["parts"], json.loads((out / "gpu_check.json").read_text())["parts"]
    assert [key for key, row in after["floor"]["rows"].items() if row != before["floor"]["rows"][key]] == ["copy"]
    assert {**after, "floor": None} == {**before, "floor": None}


@no_gpu
def test_a_failing_part_is_reported_and_the_others_run(tmp_path):
    annotations = tmp_path / "data" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "instances_train.json").write_text("no json")
    words = ("--out", tmp_path / "out", "--work", tmp_path / "work", "--quick", "--data", tmp_path / "data")
    words += ("--only", "floor,bccd", "--case", "copy", "--case", "graph native")
    said = run(*words, code=1)
    parts = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert parts["floor"]["status"] == "passed" and parts["bccd"]["status"] == "failed"
    assert "FAILED graph native: error:" in said and "instances_train.json" in said


def test_parts_say_what_they_lack(tmp_path):
    nowhere = replace(context(tmp_path), data=tmp_path / "none")
    for part, reason in ((training.bccd, "the bccd data is not at"), (programs.sanitizer, "a GPU")):
        function = part.__name__
        jobs.run_jobs(function, part(nowhere), nowhere)
        part = state.load(tmp_path)["parts"][function]
        assert part["status"] == "skipped" and reason in part["reason"]


SANITIZER = """#!/bin/sh
echo "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING"
case "$2 $*" in
    racecheck*test_nms.py) echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 9 ;;
    racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
    synccheck*test_match.py) echo "========= Device not supported" ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


def test_the_sanitizer_goes_through_each_tool_and_file(tmp_path, monkeypatch):
    binary = tmp_path / "bin" / "compute-sanitizer"
    binary.parent.mkdir()
    binary.write_text(SANITIZER)
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    rows = {}
    for key, measure in programs.sanitizer(replace(context(tmp_path), gpu=True)):
        try:
            rows[key] = measure()
        except state.Skip as reason:
            rows[key] = {"skipped": str(reason)}
    files = sorted(file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").glob("*/ops/test_*.py"))
    for without in (
        "conv3x3",
        "largest",
        "paste",
    ):  # none of our kernels for GPUs in them
        files.remove(f"detcore/ops/test_{without}.py")
    assert list(rows) == [f"{tool} {file}" for tool in ("memcheck", "racecheck", "synccheck") for file in files]
    bad = [key for key, row in rows.items() if "error" in row]
    assert bad == ["racecheck detcore/ops/test_nms.py"] and rows[bad[0]]["errors"] == 1
    assert "does not support this device" in rows["synccheck detcore/ops/test_match.py"]["skipped"]


def test_unknown_parts_are_refused(tmp_path):
    assert "--only trian: choose from build, tests" in run("--out", tmp_path, "--only", "ops,trian", code=2)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    done = []

    def measure(key):
        return lambda: done.append(key) or {"ms": 1.0}

    def todo(*keys):
        return [(key, measure(key)) for key in keys]

    assert jobs.run_jobs("floor", todo("a", "b"), context(tmp_path)) == 0
    assert jobs.run_jobs("floor", todo("a", "b", "c"), context(tmp_path)) == 0
    assert done == ["a", "b", "c"]
    part = state.load(tmp_path)["parts"]["floor"]
    assert part["status"] == "passed" and list(part["rows"]) == ["a", "b", "c"] and "running" not in part
    assert part["done"] == [[[], 0]]


def test_the_first_cases_are_a_selection_of_their_own(tmp_path):
    def todo():
        return [(key, lambda: {"ms": 1.0}) for key in ("a 1", "a 2", "b 1")]

    def entry():
        return state.load(tmp_path)["parts"]["train"]

    jobs.run_jobs("train", todo(), context(tmp_path, first=1))
    assert list(entry()["rows"]) == ["a 1"] and entry()["status"] == "passed"
    assert check.done(entry(), (), 1) and not check.done(entry())
    assert not check.keep(state.load(tmp_path), "train", named=False)
    jobs.run_jobs("train", todo(), context(tmp_path, cases=("b*", "none")))
    assert list(entry()["rows"]) == ["a 1", "b 1"] and not check.done(entry())
    jobs.run_jobs("train", todo(), context(tmp_path))
    assert list(entry()["rows"]) == ["a 1", "b 1", "a 2"] and check.done(entry())
    assert check.keep(state.load(tmp_path), "train", named=False)
    saved = state.load(tmp_path)
    assert not check.keep(saved, "train", named=False, cases=["a *"])
    assert saved["parts"]["train"]["anew"] == ["a 1", "a 2"] and len(saved["parts"]["train"]["rows"]) == 3
    assert not check.done(saved["parts"]["train"], (), 1)


def test_time_is_estimated_by_the_last_job(tmp_path):
    """The first one pays for trials that the others find done."""
    clock = [0.0]

    def takes(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds) or {"ms": 1.0}

    todo = [("first", takes(30.0)), ("second", takes(5.0)), ("third", takes(5.0)), ("late", takes(5.0))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.time, "monotonic", lambda: clock[0])
        jobs.run_jobs("train", todo, replace(context(tmp_path, budget=44.0), began=0.0))
    part = state.load(tmp_path)["parts"]["train"]
    assert list(part["rows"]) == ["first", "second", "third"] and part["status"] == "stopped"


def test_an_unfinished_row_is_taken_up_again(tmp_path):
    def cut():
        state.leave(context(tmp_path), "tests", "ops", {"passed": 1})
        raise state.OutOfTime("cut", {"passed": 2, "error": "1 failed"})

    def goes_on():
        return {"passed": 1 + state.load(tmp_path)["parts"]["tests"]["rows"]["ops"]["passed"]}

    jobs.run_jobs("tests", [("ops", cut), ("steps", goes_on)], context(tmp_path))
    saved = state.load(tmp_path)
    assert saved["parts"]["tests"]["rows"] == {"ops": {"passed": 2, "error": "1 failed", "unfinished": True}}
    assert not check.keep(saved, "tests", named=False) and not check.keep(saved, "tests", named=True)
    state.save(tmp_path, saved)
    jobs.run_jobs("tests", [("ops", goes_on)], context(tmp_path))
    row = state.load(tmp_path)["parts"]["tests"]["rows"]["ops"]
    assert row["passed"] == 3 and "unfinished" not in row


def test_errors_skips_and_the_end_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])

    def fails():
        raise ValueError("first line\nsecond")

    def skips():
        raise state.Skip("not here")

    def slow():
        clock[0] += 20.0
        return {"ms": 1.0}

    jobs.run_jobs("one", [("fails", fails), ("skips", skips)], context(tmp_path))
    jobs.run_jobs("two", [("slow", slow), ("late", slow)], context(tmp_path, budget=24.0))
    jobs.run_jobs("three", [("skips", skips)], context(tmp_path))
    parts = state.load(tmp_path)["parts"]
    assert parts["one"]["status"] == "failed" and parts["one"]["rows"]["fails"]["error"] == "ValueError: first line"
    assert parts["two"]["status"] == "stopped" and list(parts["two"]["rows"]) == ["slow"]
    assert parts["three"]["status"] == "skipped" and parts["three"]["reason"] == "not here"
    assert not check.keep({"parts": parts}, "two", named=False) and "anew" not in parts["two"]
    assert check.keep({"parts": parts}, "three", named=False)
    assert not check.keep({"parts": parts}, "one", named=False) and parts["one"]["anew"] == ["fails"]
    assert not check.keep({"parts": parts}, "three", named=True) and parts["three"]["anew"] == ["skips"]


def test_a_broken_gpu_context_ends_the_process_but_not_the_part(tmp_path):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    todo = [("broken", broken), ("fine", lambda: {"ms": 1.0})]
    assert jobs.run_jobs("ops", todo, context(tmp_path)) == state.CONTEXT_LOST
    assert jobs.run_jobs("ops", todo, context(tmp_path)) == 0
    rows = state.load(tmp_path)["parts"]["ops"]["rows"]
    assert "illegal memory access" in rows["broken"]["error"] and rows["fine"]["ms"] == 1.0
    assert state.load(tmp_path)["parts"]["ops"]["status"] == "failed"


def test_differences_of_results():
    a = {"cls": torch.tensor(2.0), "boxes": [torch.tensor([1, 2, 3, 4]), None]}
    b = {"cls": torch.tensor(2.002), "boxes": [torch.tensor([1, 2, 3, 5]), None]}
    assert cases.difference(a, b) == pytest.approx(0.25) and cases.difference(a, a) == 0
    with pytest.raises(ValueError, match="shapes"):
        cases.difference(torch.zeros(2), torch.zeros(3))
