"""What a call of tools/gpu_check.py does in which order, and what of earlier calls it keeps; without a GPU."""

import importlib
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
try:
    check, core, table, machine, process, train = (
        importlib.import_module(f"gpu_check{name}")
        for name in ("", "_core", "_table", "_machine", "_process", "_train")
    )
finally:
    sys.path.remove(str(ROOT / "tools"))


def context(out: Path, budget: float = 60.0, **more) -> core.Context:
    return core.Context(out, False, True, None, budget, time.monotonic(), work=out / "work", **more)


def options(out: Path, *words: str) -> Namespace:
    return check.arguments(["--out", str(out), "--work", str(out.parent / "work"), *words])


def folder_of(tmp_path: Path, parts: dict, **more) -> None:
    """A folder with the JSON of a check on a GPU at the commit `old`."""
    core.save(
        tmp_path, {"version": 1, "commit": "old", "quick": False, "gpu": True, "card": "A", "parts": parts} | more
    )


def part_of(rows: dict, **more) -> dict:
    return {"status": "passed", "rows": rows, "done": [[[], 0]]} | more


def given(tmp_path: Path, monkeypatch, *words: str) -> list[tuple]:
    """(part, seconds, cases, first) of a check whose parts take no time and leave what is there."""
    calls = []
    monkeypatch.setattr(
        check, "run_part", lambda part, s, o, log, r, cases, first: calls.append((part.name, s, cases, first))
    )
    chosen = options(tmp_path, *words)
    check.check(chosen, check.stages_of(chosen, True), True, process.Log(tmp_path / "log"), time.monotonic())
    return calls


def test_the_stages_fit_into_their_minutes_and_the_core_comes_first():
    assert sum(stage.seconds for stage in check.STAGES) == 8 * 60
    assert check.STAGES[: len(check.FIRST)] == check.CORE[:-1] and sum(stage.seconds for stage in check.CORE) <= 220
    assert {stage.part for stage in check.STAGES} == set(check.PARTS)
    assert [stage.part for stage in check.CORE] == ["build", "tests", "floor", "probe", "ssd300", "train"]
    assert sum(stage.seconds for stage in check.STAGES if stage.part == "losses") >= 30


def test_the_main_shape_is_one_process_of_train_and_the_compiler_another(tmp_path):
    """Its first case is the core list's, so that its trials are not paid twice; all else comes later."""
    chosen = check.arguments(["--list"])
    keys = [key for key, _ in train.train(check.make_context(chosen, True))]
    [main, compiled, rest] = [stage for stage in check.STAGES if stage.part == "train"]
    parts = [[key for key in keys if core.matches(key, stage.cases)] for stage in (main, compiled)]
    assert parts[0][0] == keys[0] == "bf16 b32 graph native" and parts[1] == ["bf16 b32 compiled+graph native"]
    others = set(keys) - set(parts[0]) - set(parts[1])
    assert rest.cases == () and compiled.seconds >= 90
    assert all(not key.startswith("bf16 b32 ") or key.startswith("bf16 b32 compiled ") for key in others)
    place = check.STAGES.index(main)
    assert place == len(check.FIRST) and check.STAGES[place + 1] == compiled
    assert [s.cases for s in check.stages_of(options(tmp_path, "--only", "train"), True)] == [
        main.cases,
        compiled.cases,
        (),
    ]
    for gpu, words in ((True, ["--quick"]), (False, [])):
        stages = check.stages_of(options(tmp_path, *words), gpu)
        assert len({stage.part for stage in stages}) == len(stages) and not any(stage.cases for stage in stages)


def test_rows_of_another_commit_are_kept_and_marked(tmp_path, monkeypatch):
    hung = {"error": "no end", "hung": True}
    rows = {"a": {"ms": 1.0}, "bad": {"error": "x"}, "hung": hung, "cut": {"passed": 1, "unfinished": True}}
    folder_of(tmp_path, {"floor": part_of({"copy": {"ms": 1.0}}), "ops": part_of(rows, status="failed")})
    given(tmp_path, monkeypatch)
    state = core.load(tmp_path)
    assert state["commit"] == machine.commit() and state["parts"]["floor"] == part_of(
        {"copy": {"ms": 1.0, "commit": "old"}}
    )
    assert list(state["parts"]["ops"]["rows"]) == list(rows) and state["parts"]["ops"]["anew"] == ["bad", "cut"]
    measured = []
    jobs = [(key, lambda key=key: measured.append(key) or {"ms": 2.0}) for key in rows]
    core.run_jobs("ops", jobs, context(tmp_path))
    assert measured == ["bad", "cut"]
    state = core.load(tmp_path)
    assert "anew" not in state["parts"]["ops"] and "commit" not in state["parts"]["ops"]["rows"]["bad"]
    text = table.table(state)
    assert "*: rows of commit old" in text and "HUNG hung*" in text and "; 2 of another commit*" in text
    assert not check.keep(state, "ops", named=True) and state["parts"]["ops"]["anew"] == ["a", "bad", "cut"]
    check.mark_rows(state | {"commit": "new"}, "old")
    assert "commit" not in state["parts"]["floor"]["rows"]["copy"]
    assert state["parts"]["ops"]["rows"]["bad"]["commit"] == "new"


def test_a_row_stays_until_its_new_one_is_there(tmp_path, monkeypatch):
    folder_of(tmp_path, {"ops": part_of({"a": {"ms": 1.0}, "b": {"ms": 1.0}}, seconds=7)}, commit=machine.commit())
    monkeypatch.setattr(check, "parts_of_cases", lambda options: ["ops"])
    assert given(tmp_path, monkeypatch, "--case", "a", "--minutes", "0.05") == []
    entry = core.load(tmp_path)["parts"]["ops"]
    assert entry["rows"] == {"a": {"ms": 1.0}, "b": {"ms": 1.0}} and entry["anew"] == ["a"] and entry["seconds"] == 7
    assert [name for name, *_ in given(tmp_path, monkeypatch)].count("ops") == 1, "it is still to be measured"

    def cut():
        raise core.OutOfTime("cut")

    core.run_jobs("ops", [("a", cut)], context(tmp_path, cases=("a",)))
    assert core.load(tmp_path)["parts"]["ops"]["rows"]["a"] == {"ms": 1.0}
    jobs = [(key, lambda: {"ms": 2.0}) for key in ("a", "b")]
    core.run_jobs("ops", jobs, context(tmp_path, cases=("a",)))
    entry = core.load(tmp_path)["parts"]["ops"]
    assert [row["ms"] for row in entry["rows"].values()] == [2.0, 1.0] and check.done(entry) and "anew" not in entry
    core.run_jobs("ops", jobs, context(tmp_path, cases=("a",)))
    assert entry["done"] == core.load(tmp_path)["parts"]["ops"]["done"] == [[["a"], 0], [[], 0]]


def test_the_build_of_another_commit_is_done_again_first(tmp_path, monkeypatch):
    folder_of(tmp_path, {"build": part_of({"build_ext --inplace": {"libraries": "x"}})})
    assert [call[0] for call in given(tmp_path, monkeypatch, "--only", "floor")] == ["build", "floor"]
    assert core.load(tmp_path)["parts"]["build"]["anew"] == ["build_ext --inplace"]


def test_another_kind_of_machine_begins_anew_beside_a_copy(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for number, more in enumerate(({"card": "B"}, {"gpu": False}, {"quick": True}), 1):
        folder_of(out, {"floor": part_of({"copy": {"ms": 1.0}})}, **more)
        monkeypatch.setattr(check, "clocks", lambda when: {"when": when, "card": "A"})
        given(out, monkeypatch, "--only", "floor")
        assert "another kind of machine: all begun anew; a copy: " in capsys.readouterr().out
        assert core.load(out)["parts"] == {}
        aside = json.loads((tmp_path / "work" / f"gpu_check_before_{number}.json").read_text())
        assert aside["parts"]["floor"]["rows"] == {"copy": {"ms": 1.0}}
    folder_of(out, {"floor": part_of({"copy": {"ms": 1.0}})})
    monkeypatch.setattr(check, "clocks", lambda when: {"when": when, "missing": "no nvidia-smi"})
    given(out, monkeypatch, "--only", "floor")
    assert core.load(out)["card"] == "A" and core.load(out)["parts"]["floor"]["rows"]


def test_a_stopped_part_gets_the_time_of_those_that_are_done(tmp_path, monkeypatch):
    """Its one long job would begin anew at each call and never end."""
    parts = {name: {"status": "passed", "rows": {}, "done": [[[], 0]]} for name in check.PARTS}
    parts["bccd"] = {"status": "stopped", "rows": {}}
    core.save(tmp_path, {"version": 1, "commit": machine.commit(), "quick": False, "gpu": True, "parts": parts})
    assert given(tmp_path, monkeypatch) == [("bccd", pytest.approx(480 - check.GRACE - check.ENDING, abs=2), (), 0)]


def test_a_core_that_is_through_is_not_begun_again(tmp_path, monkeypatch):
    parts = {name: {"status": "passed", "rows": {"x": {"ms": 1.0}}, "done": [[[], 0]]} for name in check.PARTS}
    parts["train"]["done"] = [[[], 1]]
    core.save(tmp_path, {"version": 1, "commit": machine.commit(), "quick": False, "gpu": True, "parts": parts})
    main, compiled, rest = [stage.cases for stage in check.STAGES if stage.part == "train"]
    assert [call[0::2] for call in given(tmp_path, monkeypatch)] == [
        ("train", main),
        ("train", compiled),
        ("train", rest),
    ]


def test_goes_on_with_the_json_of_another_folder(tmp_path):
    core.save(tmp_path, {"version": 1, "commit": "abc", "parts": {"floor": {"status": "passed", "rows": {}}}})
    words = ["--only", "none", "--work", str(tmp_path), "--go-on"]
    assert check.main(["--out", str(tmp_path / "new"), *words, str(tmp_path / core.NAME)]) == 0
    assert core.load(tmp_path / "new") == core.load(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        check.main(["--out", str(tmp_path / "other"), *words, str(tmp_path / "none.json")])


def test_named_parts_share_all_the_time(tmp_path, monkeypatch):
    end = check.GRACE + check.ENDING
    assert given(tmp_path, monkeypatch, "--only", "bccd", "--minutes", "6") == [
        ("bccd", pytest.approx(360 - end, abs=2), (), 0)
    ]

    def time_of(name: str) -> float:
        return sum(stage.seconds for stage in check.STAGES if stage.part == name)

    calls = given(tmp_path, monkeypatch, "--only", "bccd,floor")
    assert [call[0] for call in calls] == ["floor", "bccd"]
    assert calls[0][1] == pytest.approx(480 * time_of("floor") / (time_of("floor") + time_of("bccd")), abs=2)


def test_the_core_list_by_name(tmp_path, monkeypatch):
    calls = [(name, cases, first) for name, _, cases, first in given(tmp_path, monkeypatch, "--only", "core")]
    assert calls == [(stage.part, stage.cases, stage.first) for stage in check.CORE]


def test_cases_are_looked_for_in_all_parts(tmp_path, monkeypatch, capsys):
    said = "floor: bf16\nprobe! No module\ntrain: bf16 b32 graph native\ntrain: fp16 b32 graph native\nssd300: x\n"
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said))
    found = given(tmp_path, monkeypatch, "--case", "bf16*", "--case", "x")
    assert [(name, cases) for name, _, cases, _ in found] == [
        ("floor", ("bf16*", "x")), ("train", ("bf16*", "x")), ("ssd300", ("bf16*", "x")),
    ]  # fmt: skip
    assert check.main(["--out", str(tmp_path / "new"), "--work", str(tmp_path), "--case", "bf17*"]) == 2
    assert "no case matches --case bf17*; --list prints them" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_a_gpu_machine_lacks_is_said_first(tmp_path, monkeypatch, capsys):
    tools = {"git": tmp_path / "git", "gcc": tmp_path / "gcc", "nvcc": tmp_path / "cuda" / "bin" / "nvcc"}
    for file in tools.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(machine, "CUDA", str(tmp_path / "none"))
    given(tmp_path, monkeypatch, "--only", "floor")
    state = core.load(tmp_path)
    found = {name: path for name, path in state["preflight"].items() if path}
    assert found == {name: str(path) for name, path in tools.items()} and list(state["preflight"]) == list(
        machine.WITHOUT
    )
    said = "on this machine found: gcc, nvcc, git; missing: Python.h (no torch.compile, no Triton); ptxas ("
    printed, text = capsys.readouterr().out, " ".join(table.table(state).split())
    assert said in printed and said in text and "compute-sanitizer (the part sanitizer is left out)" in text
    (tmp_path / "Python.h").touch()
    assert machine.place("Python.h") == str(tmp_path / "Python.h")


def test_the_cases_of_a_gpu_can_be_listed_without_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    assert check.main(["--list", "--gpu"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "train: bf16 b32 compiled+graph native" in listed and "losses: reference against native" in listed
    assert {line.partition(": ")[0] for line in listed} == set(check.PARTS), "each can say, none with a !"
    with pytest.raises(SystemExit, match="2"):
        check.main(["--gpu", "--out", "nowhere"])
