"""The part `tests`: groups of tests that crash, hang, lose the CUDA context or are cut, and go on."""

import os
import time
from pathlib import Path

import pytest

from tests.tools.gpu_check.common import context
from tools.gpu_check import jobs, state
from tools.gpu_check import tests as groups

FILES = {
    "crashes": """
import os
def test_a(): pass
def test_dies(): os.kill(os.getpid(), 11)
def test_b(): assert 1 == 2, "one is not two"
""",
    "poisoned": """
import pytest
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
@pytest.mark.skip(reason="no")
def test_skipped(): pass
""",
    "hangs": """
import time
def test_first(): pass
def test_hangs(): time.sleep(100)
def test_last(): pass
""",
    "teardown": """
import pytest
@pytest.fixture
def bad():
    yield
    raise ValueError("too late")
def test_fine(bad): pass
""",
    "broken": "import no_such_module\n",
}


@pytest.fixture
def write(tmp_path):
    """write(name, ...): {name: [its file of FILES]}, each with a pytest.ini beside it."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def make(*names: str) -> dict[str, list[str]]:
        for name in names:
            (tmp_path / f"test_{name}.py").write_text(FILES[name])
        return {name: [str(tmp_path / f"test_{name}.py")] for name in names}

    return make


def run(out: Path, chosen: dict[str, list[str]], budget: float = 100.0) -> state.Row:
    state.save(out, state.load(out) | {"parts": state.load(out)["parts"] or {"tests": {"rows": {}}}})
    return groups.run_groups(context(out, gpu=True, budget=budget), "tests", "ops", chosen, ["--rootdir", str(out)])


def short(names: list[str]) -> list[str]:
    return [name.partition("::")[2] or Path(name).name for name in names]


def test_each_group_has_its_own_result(tmp_path, write, capsys):
    row = run(tmp_path, write("crashes", "poisoned", "teardown", "broken"))
    counts = {name: (r["passed"], r["failed"], r["skipped_tests"], r["not_run"]) for name, r in row["groups"].items()}
    assert counts == {
        "crashes": (1, 2, 0, 0),
        "poisoned": (1, 1, 1, 0),
        "teardown": (0, 1, 0, 0),
        "broken": (0, 1, 0, 0),
    }
    said = {short([test])[0]: words for test, words in row["failures"]}
    assert said["test_dies"] == "its process died, code -11" and "illegal memory access" in said["test_lost"]
    assert said["test_b"].endswith("assert 1 == 2") or "one is not two" in said["test_b"]
    assert "no_such_module" in said["test_broken.py"] and "too late" in said["test_fine"]
    assert row["error"].startswith("5 failed: ") and row["passed"] == 2 and "outcomes" not in row
    printed = capsys.readouterr().out
    assert "AssertionError: one is not two" in printed and "poisoned: the CUDA context was lost" in printed


def test_a_test_that_hangs_is_ended_and_the_rest_goes_on(tmp_path, write, monkeypatch):
    monkeypatch.setattr(groups, "PATIENCE", 20.0)
    started = []
    real = groups.Group.start

    def start(group):
        real(group)
        started.append(group.name)
        if len(started) > 1:
            return
        while group.test is None or not group.test.endswith("test_hangs"):
            group.read()
            time.sleep(0.05)
        group.since -= 100.0  # it has hung for long

    monkeypatch.setattr(groups.Group, "start", start)
    row = run(tmp_path, write("hangs"))
    assert row["groups"]["hangs"] == {"passed": 2, "failed": 1, "skipped_tests": 0, "not_run": 0}
    [[test, words]] = row["failures"]
    assert short([test]) == ["test_hangs"] and words == "hung: no end after 20 s" and started == ["hangs"] * 2


def test_a_group_that_always_dies_is_given_up(tmp_path, write, monkeypatch):
    monkeypatch.setattr(groups, "STARTS", 1)
    row = run(tmp_path, write("crashes"))
    assert row["groups"]["crashes"]["error"] == "given up after 1 processes" and row["not_run"] == 1
    assert "crashes: given up" in row["error"]


def test_what_is_cut_keeps_its_results_and_goes_on_without_them(tmp_path, write, monkeypatch):
    chosen = write("hangs", "crashes")
    monkeypatch.setattr(state.Context, "left", lambda self: 100.0 - 100.0 * waiting())

    def waiting() -> bool:
        """Whether one group hangs and the other is through."""
        lines = [file.read_text() for file in sorted((tmp_path / "work" / "tests").glob("*/outcomes*.jsonl"))]
        return any("test_hangs" in text for text in lines) and any('"end"' in text for text in lines)

    with pytest.raises(state.OutOfTime, match="tests not run") as cut:
        run(tmp_path, chosen)
    row = cut.value.row
    assert row["groups"]["hangs"] == {"passed": 1, "failed": 0, "skipped_tests": 0, "not_run": 2}
    assert {name: short(list(tests)) for name, tests in row["outcomes"].items()} == {
        "hangs": ["test_first"], "crashes": ["test_a", "test_dies", "test_b"],
    }  # fmt: skip
    state.leave(context(tmp_path), "tests", "ops", row)

    monkeypatch.undo()
    (tmp_path / "test_hangs.py").write_text(FILES["hangs"].replace("time.sleep(100)", "pass"))
    (tmp_path / "test_crashes.py").write_text("def test_a(): raise SystemError\n")  # it is not run again
    row = run(tmp_path, chosen)
    assert (row["passed"], row["failed"], row["not_run"]) == (4, 2, 0) and row["groups"]["hangs"]["passed"] == 3
    assert sorted(short([test for test, _ in row["failures"]])) == ["test_b", "test_dies"]
    assert sorted(short([test for test, _ in row["slowest"]])) == ["test_hangs", "test_last"]

    saved = state.load(tmp_path)
    saved["parts"]["tests"]["anew"] = ["ops"]  # such as after a repair
    state.save(tmp_path, saved)
    row = run(tmp_path, {"crashes": chosen["crashes"]})
    assert (row["passed"], row["failed"]) == (0, 1), "all are run again"


def test_every_file_with_gpu_tests_is_in_one_group():
    files = groups.gpu_test_files()
    found = groups.grouped(files)
    assert sorted(file for job in found.values() for own in job.values() for file in own) == sorted(files)
    assert list(found) == ["ops", "steps"]
    assert set(found["ops"]) == {"triton", "detcore", "efficientdet", "single_stage_detector", "ssd300"}
    assert found["ops"]["triton"] == ["tests/detcore/ops/test_conv3x3_kernels.py"], "it compiles for long"
    assert found["steps"]["training"] == ["tests/test_gpu.py"]
    assert found["steps"]["graphs"] == [f"tests/detcore/device/test_graphs_{name}.py" for name in ("gpu", "variants")]
    assert set(found["steps"]) == {"graphs", "training", "others"}


def test_without_a_gpu_they_are_left_out(tmp_path):
    nowhere = context(tmp_path)
    jobs.run_jobs("tests", groups.tests(nowhere), nowhere)
    part = state.load(tmp_path)["parts"]["tests"]
    assert part["status"] == "skipped" and part["reason"] == "the gpu tests want a GPU"
    assert os.listdir(tmp_path) == [state.NAME]
