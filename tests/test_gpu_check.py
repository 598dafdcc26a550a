"""tools/gpu_check.py where there is no GPU: its CPU part, resuming, failures, the table; tools/compare_losses.py."""

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
try:
    check, core, table = (importlib.import_module(name) for name in ("gpu_check", "gpu_check_core", "gpu_check_table"))
    ops, runs = (importlib.import_module(f"gpu_check_{name}") for name in ("ops", "runs"))
    losses = importlib.import_module("compare_losses")
finally:
    sys.path.remove(str(ROOT / "tools"))

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU part is that of a machine without a GPU")


def run(*words: str | Path, code: int = 0) -> str:
    """tools/gpu_check.py or compare_losses.py as a user calls it; its output."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def context(out: Path, budget: float = 60.0) -> core.Context:
    return core.Context(out, False, True, None, budget, time.monotonic())


def written_since(moment: float) -> list[str]:
    """Files of the checkout that are younger, but for those of the build."""
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).lstat().st_mtime > moment]


@no_gpu
def test_the_cpu_part_from_end_to_end(tmp_path):
    began, out = time.time(), tmp_path / "out"
    said = run("tools/gpu_check.py", "--out", out, "--quick", "--only", "floor,ops,train,ssd300")
    assert said.count("no GPU on this machine") == 1
    state = json.loads((out / "gpu_check.json").read_text())
    assert state["machine"]["device"] == "cpu" and state["machine"]["torch"] == torch.__version__ and state["quick"]
    assert list(state["parts"]) == ["floor", "ops", "train", "ssd300"]
    assert all(part["status"] in ("passed", "skipped") for part in state["parts"].values())
    assert state["parts"]["floor"]["rows"]["copy"]["gb_s"] > 0
    assert state["parts"]["train"]["rows"]["fp32 b2 eager reference"]["images_per_s"] > 0
    ssd = state["parts"]["ssd300"]["rows"]
    assert all(ssd[f"{part} fp32 b2 eager reference"]["images_per_s"] > 0 for part in ("training", "inference"))
    for row in state["parts"]["ops"]["rows"].values():
        assert "skipped" in row or (row["difference"] <= row["tolerance"] and row["repeats_equal"])
    printed = (out / "table.txt").read_text()
    assert printed in said and max(map(len, printed.splitlines())) <= 100
    assert "published" not in printed, "nothing of the CPU is set beside published figures of GPUs"
    assert written_since(began) == []

    again = run("tools/gpu_check.py", "--out", out, "--quick", "--only", "none")
    assert printed in again


@no_gpu
def test_a_failing_part_is_reported_and_the_others_run(tmp_path):
    annotations = tmp_path / "data" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "instances_train.json").write_text("no json")
    words = ("--out", tmp_path / "out", "--quick", "--data", tmp_path / "data", "--only", "floor,bccd")
    said = run("tools/gpu_check.py", *words, code=1)
    parts = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert parts["floor"]["status"] == "passed" and parts["bccd"]["status"] == "failed"
    assert "FAILED graph native: error: " in said and "instances_train.json" in said


def test_parts_say_what_they_lack(tmp_path):
    nowhere = core.Context(tmp_path, False, True, tmp_path / "none", 60.0, time.monotonic())
    for function, reason in (("bccd", "the bccd data is not at"), ("tests", "a GPU"), ("sanitizer", "a GPU")):
        core.run_jobs(function, getattr(runs, function)(nowhere), nowhere)
        part = core.load(tmp_path)["parts"][function]
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
    for key, measure in runs.sanitizer(replace(context(tmp_path), gpu=True)):
        try:
            rows[key] = measure()
        except core.Skip as reason:
            rows[key] = {"skipped": str(reason)}
    files = sorted(file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").glob("*/ops/test_*.py"))
    assert list(rows) == [f"{tool} {file}" for tool in ("memcheck", "racecheck", "synccheck") for file in files]
    bad = [key for key, row in rows.items() if "error" in row]
    assert bad == ["racecheck detcore/ops/test_nms.py"] and rows[bad[0]]["errors"] == 1
    assert "does not support this device" in rows["synccheck single_stage_detector/ops/test_match.py"]["skipped"]


def test_junit_files_are_summed_up(tmp_path):
    report = tmp_path / "tests.xml"
    cases = '<testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase>'
    report.write_text(f"<testsuite>{cases}<testcase classname='t' name='c'><skipped/></testcase></testsuite>")
    found = runs.summary(report)
    assert (found["passed"], found["failed"], found["skipped_tests"]) == (1, 1, 1) and found["failures"] == ["t::b"]
    assert "1 failed: t::b" in found["error"]
    report.write_text("<testsuite/>")
    assert runs.summary(report)["error"] == "pytest found no test"
    assert "tests/test_gpu.py" in runs.gpu_test_files()


def test_unknown_parts_are_refused(tmp_path):
    assert "--only trian: choose from build, tests" in run(
        "tools/gpu_check.py", "--out", tmp_path, "--only", "ops,trian", code=2
    )
    assert list(tmp_path.iterdir()) == []


def test_the_parts_fit_into_ten_minutes():
    assert sum(part.seconds for part in check.PARTS) <= 600


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    done = []

    def measure(key):
        return lambda: done.append(key) or {"ms": 1.0}

    def jobs(*keys):
        return [(key, measure(key)) for key in keys]

    assert core.run_jobs("floor", jobs("a", "b"), context(tmp_path)) == 0
    assert core.run_jobs("floor", jobs("a", "b", "c"), context(tmp_path)) == 0
    assert done == ["a", "b", "c"]
    part = core.load(tmp_path)["parts"]["floor"]
    assert part["status"] == "passed" and list(part["rows"]) == ["a", "b", "c"] and "running" not in part


def test_errors_skips_and_the_end_of_the_time(tmp_path):
    def fails():
        raise ValueError("first line\nsecond")

    def skips():
        raise core.Skip("not here")

    def slow():
        time.sleep(0.2)
        return {"ms": 1.0}

    core.run_jobs("one", [("fails", fails), ("skips", skips)], context(tmp_path))
    core.run_jobs("two", [("slow", slow), ("late", slow)], context(tmp_path, budget=0.3))
    core.run_jobs("three", [("skips", skips)], context(tmp_path))
    parts = core.load(tmp_path)["parts"]
    assert parts["one"]["status"] == "failed" and parts["one"]["rows"]["fails"]["error"] == "ValueError: first line"
    assert parts["two"]["status"] == "stopped" and list(parts["two"]["rows"]) == ["slow"]
    assert parts["three"]["status"] == "skipped" and parts["three"]["reason"] == "not here"
    assert not check.keep({"parts": parts}, "two", named=False) and list(parts["two"]["rows"]) == ["slow"]
    assert check.keep({"parts": parts}, "three", named=False)
    assert not check.keep({"parts": parts}, "one", named=False) and list(parts["one"]["rows"]) == ["skips"]
    assert not check.keep({"parts": parts}, "three", named=True) and "three" not in parts


def test_a_broken_gpu_context_ends_the_process_but_not_the_part(tmp_path):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    jobs = [("broken", broken), ("fine", lambda: {"ms": 1.0})]
    assert core.run_jobs("ops", jobs, context(tmp_path)) == core.CONTEXT_LOST
    assert core.run_jobs("ops", jobs, context(tmp_path)) == 0
    rows = core.load(tmp_path)["parts"]["ops"]["rows"]
    assert "illegal memory access" in rows["broken"]["error"] and rows["fine"]["ms"] == 1.0
    assert core.load(tmp_path)["parts"]["ops"]["status"] == "failed"


CHILD = """
import os, signal, sys, time
sys.path.insert(0, {tools!r})
from pathlib import Path
from gpu_check_core import Context, run_jobs
out = Path(sys.argv[sys.argv.index("--out") + 1])
def dies(): os.kill(os.getpid(), signal.SIGSEGV)
def hangs(): time.sleep(100)
jobs = [("dies", dies), ("fine", lambda: {{"ms": 1.0}}), *([("hangs", hangs)] if {hangs} else [])]
sys.exit(run_jobs("ops", jobs, Context(out, False, True, None, 60.0, time.monotonic())))
"""


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_part_outlives_its_process(tmp_path, monkeypatch, hangs):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tools=str(ROOT / "tools"), hangs=hangs))
    monkeypatch.setattr(check, "__file__", str(script))
    monkeypatch.setattr(check, "GRACE", 0.0)
    options = Namespace(out=tmp_path, quick=True, data=None)
    check.run_part(check.PARTS[3], 25.0 if hangs else 60.0, options, check.Log(tmp_path / "log"))
    part = core.load(tmp_path)["parts"]["ops"]
    assert part["status"] == "failed" and part["rows"]["fine"]["ms"] == 1.0
    assert part["rows"]["dies"] == {"error": "the process died in it, code -11 (see gpu_check.log)"}
    assert ("out of time in 'hangs'" in part["reason"]) == hangs


def test_results_of_another_commit_are_not_mixed(tmp_path, monkeypatch, capsys):
    core.save(tmp_path, {"version": 1, "commit": "old", "quick": True, "gpu": False, "parts": {"peers": {"rows": {}}}})
    monkeypatch.setattr(check, "run_part", lambda part, *_: None)
    options = check.arguments(["--out", str(tmp_path), "--quick", "--only", "floor"])
    check.check(options, False, check.Log(tmp_path / "log"))
    assert "all begun anew" in capsys.readouterr().out
    state = core.load(tmp_path)
    assert state["parts"] == {} and state["commit"] == core.commit()


def budgets(tmp_path: Path, monkeypatch, *words: str) -> dict[str, float]:
    """The seconds that each part is given by a check whose parts take no time and leave what is there."""
    given = {}
    monkeypatch.setattr(check, "run_part", lambda part, seconds, *_: given.update({part.name: seconds}))
    check.check(check.arguments(["--out", str(tmp_path), *words]), True, check.Log(tmp_path / "log"))
    return given


def test_a_stopped_part_gets_the_time_of_those_that_are_done(tmp_path, monkeypatch):
    """Its one long job would begin anew at each call and never end."""
    parts = {part.name: {"status": "passed", "rows": {}} for part in check.PARTS}
    parts["bccd"] = {"status": "stopped", "rows": {}}
    core.save(tmp_path, {"version": 1, "commit": core.commit(), "quick": False, "gpu": True, "parts": parts})
    given = budgets(tmp_path, monkeypatch)
    assert given == {"bccd": pytest.approx(600 - check.GRACE, abs=2)}


def test_named_parts_share_all_the_time(tmp_path, monkeypatch):
    given = budgets(tmp_path, monkeypatch, "--only", "bccd", "--minutes", "8")
    assert given == {"bccd": pytest.approx(480 - check.GRACE, abs=2)}
    given = budgets(tmp_path, monkeypatch, "--only", "floor,bccd")
    seconds = {part.name: part.seconds for part in check.PARTS}
    assert given["floor"] == pytest.approx(600 * seconds["floor"] / (seconds["floor"] + seconds["bccd"]), abs=2)


def full_state() -> dict:
    """What a check on a large GPU could leave, with numbers as wide as they get."""
    times = {"ms": 12345.678, "p10_ms": 1.0, "p90_ms": 99999.9, "n": 100}
    speed = times | {"images_per_s": 12345.6, "images_per_s_p10": 12345.6, "images_per_s_p90": 12345.6}
    speed |= {"peak_gib": 139.9, "x_published": 12.34, "percent_of_flop_floor": 123.4}
    op = times | {"reference_ms": 99999.999, "speedup": 1234.5, "mb": 123456.7, "difference": 1e-300}
    families = {
        "batchnorm/elementwise": {"ms": 1234.56, "share": 0.5, "floor_ms": 0.0},
        "other": {"ms": 1, "share": 0.1, "floor_ms": None},
    }
    tests = {"passed": 1234, "failed": 12, "skipped_tests": 3, "error": "12 failed: " + "tests.test_x::test_y, " * 20}
    parts = {
        "tests": {"status": "failed", "seconds": 80.0, "rows": {"pytest -m gpu": tests}},
        "floor": {"status": "passed", "rows": {"copy": times | {"gb_s": 4300.0}, "bf16": times | {"tflop_s": 790.1}}},
        "ops": {"status": "passed", "rows": {"a very long name of an operation": op | {"percent_of_floor": 99.9}}},
        "train": {"status": "passed", "rows": {"bf16 b32 compiled+graph reference": speed}},
        "peers": {"status": "stopped", "reason": "out of time", "rows": {"torchvision bf16 b32 compiled parts": speed}},
        "inference": {"status": "passed", "rows": {"forward+postprocess bf16 b128 eager reference": speed}},
        "ssd300": {"status": "passed", "rows": {"training bf16 b128 compiled+graph reference": speed}},
        "profile": {"status": "passed", "rows": {"x": {"ms": 1.0, "families": families, "next": ["a" * 200]}}},
        "losses": {"status": "passed", "rows": {"x": {"largest": 1e-9, "steps": 200, "tolerance": 0.02}}},
        "bccd": {"status": "passed", "rows": {"graph native": {
            "AP": 0.48, "AP50": 0.84, "epochs": 18, "seconds": 12345.6, "seconds_to_AP_0.4": 123.4,
            "median_images_per_s": 12345.6}}},
    }  # fmt: skip
    clock = {"when": "start", "driver": "580.159.03", "sm_mhz": "1980", "memory_mhz": "3201", "temperature_c": "55"}
    machine = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "cuda": "13.0", "python": "3.12.3"}
    return {"version": 1, "machine": machine, "commit": "0123456789ab+changes", "clocks": [clock], "parts": parts}


def test_the_table_fits_and_tells_published_from_measured():
    text = table.table(full_state())
    assert max(map(len, text.splitlines())) <= 100
    assert "291.2 images/s a H100, of 8 (published MLPerf result, not measured here)" in text
    assert "our target on one H100: 400 images/s, bf16, batch 32 (a target, not measured)" in text
    assert "our targets on one H100, images/s: training 2500, inference 6000 (targets, not measured)" in text
    assert "published for one A100, images/s: training 724, inference 970 (not measured here)" in text
    assert "FAILED pytest -m gpu: 12 failed" in text and "out of time" in text
    assert "bf16 790 TFLOP/s" in text and "copy 4,300 GB/s" in text


def test_differences_of_results():
    a = {"cls": torch.tensor(2.0), "boxes": [torch.tensor([1, 2, 3, 4]), None]}
    b = {"cls": torch.tensor(2.002), "boxes": [torch.tensor([1, 2, 3, 5]), None]}
    assert ops.difference(a, b) == pytest.approx(0.25) and ops.difference(a, a) == 0
    with pytest.raises(ValueError, match="shapes"):
        ops.difference(torch.zeros(2), torch.zeros(3))


class TestCompareLosses:
    def curve(self, path: Path, values: dict[int, float]) -> Path:
        lines = [{"kind": "start"}]
        lines += [{"kind": "step", "step": s, "loss": 2 * v, "terms": {"cls": v, "box": v}} for s, v in values.items()]
        path.mkdir()
        (path / "progress.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return path

    def test_within_and_over_the_tolerance(self, tmp_path, capsys):
        a = self.curve(tmp_path / "a", {1: 1.0, 2: 0.9, 3: 0.8})
        b = self.curve(tmp_path / "b", {1: 1.0, 2: 0.909, 3: 0.4, 4: 0.1})
        assert losses.main([str(a), str(b), "--steps", "2"]) == 0
        assert "within the tolerance of 0.02: over 2 steps" in capsys.readouterr().out
        written = tmp_path / "numbers.json"
        assert losses.main([str(a), str(b / "progress.jsonl"), "--json", str(written)]) == 1
        assert "OVER the tolerance of 0.02" in capsys.readouterr().out
        found = json.loads(written.read_text())
        assert found["largest"] == 0.5 and found["at_step"] == 3 and found["steps"] == 3 and not found["within"]

    def test_a_loss_that_is_not_finite_in_one_run_is_over_any_tolerance(self):
        finite, broken = {1: {"loss": 1.0}}, {1: {"loss": float("nan")}}
        assert losses.compare(finite, broken)["largest"] == float("inf")
        assert losses.compare(broken, broken)["largest"] == 0

    def test_draws_both_curves(self, tmp_path):
        a, b = (self.curve(tmp_path / n, {1: 1.0, 2: 0.9}) for n in "ab")
        losses.main([str(a), str(b), "--figure", str(tmp_path / "both.html")])
        page = (tmp_path / "both.html").read_text()
        assert page.count('class="line') == 2 and "step 2: 1.8 and 1.8" in page

    def test_nothing_to_compare(self, tmp_path):
        a = self.curve(tmp_path / "a", {1: 1.0})
        b = self.curve(tmp_path / "b", {2: 1.0})
        assert "no recorded step in common" in run("tools/compare_losses.py", a, b, code=2)
        assert "progress.jsonl" in run("tools/compare_losses.py", a, tmp_path / "none", code=2)

    @pytest.mark.parametrize(("code", "fails"), [(0, False), (3, False), (1, True)])
    def test_a_run_may_miss_the_target(self, tmp_path, monkeypatch, code, fails):
        """So few steps reach none; none is asked for unless the options do."""
        called = []
        result = subprocess.CompletedProcess([], code, "", "what was wrong")
        monkeypatch.setattr(losses.subprocess, "run", lambda command, **_: called.append(command) or result)
        options = ["--synthetic", "--no-pretrained", "--target-map", "0.5"]
        try:
            losses.train(tmp_path, 3, options, ["--ops", "reference"])
        except losses.UserError as error:
            assert fails and "what was wrong" in str(error)
        else:
            assert not fails
        words = called[0][called[0].index("single_stage_detector.train") + 1 :]
        assert words[:5] == ["--target-map", "none", *options[:3]]

    @pytest.mark.slow
    def test_runs_both_itself(self, tmp_path):
        options = [
            "--synthetic",
            "--device",
            "cpu",
            "--backbone",
            "resnet18",
            "--image-size",
            "64",
            "64",
            "--fpn-channels",
            "16",
        ]
        options += ["--head-convs", "1", "--num-classes", "3", "--division", "open"]
        words = (tmp_path / "a", tmp_path / "b", "--run", "--steps", "3", "--tolerance", "0.001", "--", *options)
        assert "within the tolerance of 0.001: over 3 steps" in run("tools/compare_losses.py", *words)
