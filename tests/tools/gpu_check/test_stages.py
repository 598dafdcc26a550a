"""What a call of tools.gpu_check does in which order, and what of earlier calls it keeps; without a GPU."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.tools.gpu_check.common import context, options
from tools.gpu_check import __main__ as check
from tools.gpu_check import jobs, machine, process, stages, state, table
from tools.gpu_check.benchmarks.single_stage_detector import train


def folder_of(tmp_path: Path, parts: dict, **more) -> None:
    """A folder with the JSON of a check on a GPU at the commit `old`."""
    state.save(
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
    check.check(chosen, check.stages_to_run(chosen, True), True, process.Log(tmp_path / "log"), time.monotonic())
    return calls


def test_the_stages_fit_into_their_minutes_and_the_core_comes_first():
    assert sum(stage.seconds for stage in stages.STAGES) == 8 * 60
    assert stages.STAGES[: len(stages.FIRST)] == stages.CORE[:-1] and sum(stage.seconds for stage in stages.CORE) <= 220
    assert {stage.part for stage in stages.STAGES} == set(check.PARTS)
    assert [stage.part for stage in stages.CORE] == [
        "build", "tests", "floor", "efficientdet", "maskrcnn", "probe", "ssd300", "train",
    ]  # fmt: skip
    assert sum(stage.seconds for stage in stages.STAGES if stage.part == "losses") >= 30


def test_the_main_shape_is_one_process_of_train_and_the_compiler_another(tmp_path):
    """Its first case is the core list's, so that its trials are not paid twice; all else comes later."""
    chosen = check.arguments(["--list"])
    keys = [key for key, _ in train.train(check.make_context(chosen, True))]
    [main, compiled, rest] = [stage for stage in stages.STAGES if stage.part == "train"]
    parts = [[key for key in keys if state.matches(key, stage.cases)] for stage in (main, compiled)]
    assert parts[0][0] == keys[0] == "bf16 b32 graph native" and parts[1] == ["bf16 b32 compiled+graph native"]
    others = set(keys) - set(parts[0]) - set(parts[1])
    assert rest.cases == () and compiled.seconds >= 90
    assert all(not key.startswith("bf16 b32 ") or key.startswith("bf16 b32 compiled ") for key in others)
    place = stages.STAGES.index(main)
    assert place == len(stages.FIRST) and stages.STAGES[place + 1] == compiled
    assert [s.cases for s in check.stages_to_run(options(tmp_path, "--only", "train"), True)] == [
        main.cases,
        compiled.cases,
        (),
    ]
    for gpu, words in ((True, ["--quick"]), (False, [])):
        chosen = check.stages_to_run(options(tmp_path, *words), gpu)
        assert len({stage.part for stage in chosen}) == len(chosen) and not any(stage.cases for stage in chosen)


def test_rows_of_another_commit_are_kept_and_marked(tmp_path, monkeypatch):
    hung = {"error": "no end", "hung": True}
    rows = {"a": {"ms": 1.0}, "bad": {"error": "x"}, "hung": hung, "cut": {"passed": 1, "unfinished": True}}
    folder_of(tmp_path, {"floor": part_of({"copy": {"ms": 1.0}}), "ops": part_of(rows, status="failed")})
    given(tmp_path, monkeypatch)
    saved = state.load(tmp_path)
    assert saved["commit"] == machine.commit() and saved["parts"]["floor"] == part_of(
        {"copy": {"ms": 1.0, "commit": "old"}}
    )
    assert list(saved["parts"]["ops"]["rows"]) == list(rows) and saved["parts"]["ops"]["anew"] == ["bad", "cut"]
    measured = []
    todo = [(key, lambda key=key: measured.append(key) or {"ms": 2.0}) for key in rows]
    jobs.run_jobs("ops", todo, context(tmp_path))
    assert measured == ["bad", "cut"]
    saved = state.load(tmp_path)
    assert "anew" not in saved["parts"]["ops"] and "commit" not in saved["parts"]["ops"]["rows"]["bad"]
    text = table.table(saved)
    assert "*: rows of commit old" in text and "HUNG hung*" in text and "; 2 of another commit*" in text
    assert not check.keep(saved, "ops", named=True) and saved["parts"]["ops"]["anew"] == ["a", "bad", "cut"]
    stages.mark_rows(saved | {"commit": "new"}, "old")
    assert "commit" not in saved["parts"]["floor"]["rows"]["copy"]
    assert saved["parts"]["ops"]["rows"]["bad"]["commit"] == "new"


def test_a_row_stays_until_its_new_one_is_there(tmp_path, monkeypatch):
    folder_of(tmp_path, {"ops": part_of({"a": {"ms": 1.0}, "b": {"ms": 1.0}}, seconds=7)}, commit=machine.commit())
    monkeypatch.setattr(check, "parts_of_cases", lambda options: ["ops"])
    assert given(tmp_path, monkeypatch, "--case", "a", "--minutes", "0.05") == []
    entry = state.load(tmp_path)["parts"]["ops"]
    assert entry["rows"] == {"a": {"ms": 1.0}, "b": {"ms": 1.0}} and entry["anew"] == ["a"] and entry["seconds"] == 7
    assert [name for name, *_ in given(tmp_path, monkeypatch)].count("ops") == 1, "it is still to be measured"

    def cut():
        raise state.OutOfTime("cut")

    jobs.run_jobs("ops", [("a", cut)], context(tmp_path, cases=("a",)))
    assert state.load(tmp_path)["parts"]["ops"]["rows"]["a"] == {"ms": 1.0}
    todo = [(key, lambda: {"ms": 2.0}) for key in ("a", "b")]
    jobs.run_jobs("ops", todo, context(tmp_path, cases=("a",)))
    entry = state.load(tmp_path)["parts"]["ops"]
    assert [row["ms"] for row in entry["rows"].values()] == [2.0, 1.0] and check.done(entry) and "anew" not in entry
    jobs.run_jobs("ops", todo, context(tmp_path, cases=("a",)))
    assert entry["done"] == state.load(tmp_path)["parts"]["ops"]["done"] == [[["a"], 0], [[], 0]]


def test_the_build_of_another_commit_is_done_again_first(tmp_path, monkeypatch):
    folder_of(tmp_path, {"build": part_of({"build_ext --inplace": {"libraries": "x"}})})
    assert [call[0] for call in given(tmp_path, monkeypatch, "--only", "floor")] == ["build", "floor"]
    assert state.load(tmp_path)["parts"]["build"]["anew"] == ["build_ext --inplace"]


def test_another_kind_of_machine_begins_anew_beside_a_copy(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for number, more in enumerate(({"card": "B"}, {"gpu": False}, {"quick": True}), 1):
        folder_of(out, {"floor": part_of({"copy": {"ms": 1.0}})}, **more)
        monkeypatch.setattr(check, "clocks", lambda when: {"when": when, "card": "A"})
        given(out, monkeypatch, "--only", "floor")
        assert "another kind of machine: all begun anew; a copy: " in capsys.readouterr().out
        assert state.load(out)["parts"] == {}
        aside = json.loads((tmp_path / "work" / f"gpu_check_before_{number}.json").read_text())
        assert aside["parts"]["floor"]["rows"] == {"copy": {"ms": 1.0}}
    folder_of(out, {"floor": part_of({"copy": {"ms": 1.0}})})
    monkeypatch.setattr(check, "clocks", lambda when: {"when": when, "missing": "no nvidia-smi"})
    given(out, monkeypatch, "--only", "floor")
    assert state.load(out)["card"] == "A" and state.load(out)["parts"]["floor"]["rows"]


def test_a_stopped_part_gets_the_time_of_those_that_are_done(tmp_path, monkeypatch):
    """Its one long job would begin anew at each call and never end."""
    parts = {name: {"status": "passed", "rows": {}, "done": [[[], 0]]} for name in check.PARTS}
    parts["bccd"] = {"status": "stopped", "rows": {}}
    state.save(tmp_path, {"version": 1, "commit": machine.commit(), "quick": False, "gpu": True, "parts": parts})
    assert given(tmp_path, monkeypatch) == [("bccd", pytest.approx(480 - check.GRACE - check.ENDING, abs=2), (), 0)]


def test_a_core_that_is_through_is_not_begun_again(tmp_path, monkeypatch):
    parts = {name: {"status": "passed", "rows": {"x": {"ms": 1.0}}, "done": [[[], 0]]} for name in check.PARTS}
    parts["train"]["done"] = [[[], 1]]
    state.save(tmp_path, {"version": 1, "commit": machine.commit(), "quick": False, "gpu": True, "parts": parts})
    main, compiled, rest = [stage.cases for stage in stages.STAGES if stage.part == "train"]
    assert [call[0::2] for call in given(tmp_path, monkeypatch)] == [
        ("train", main),
        ("train", compiled),
        ("train", rest),
    ]


def test_goes_on_with_the_json_of_another_folder(tmp_path):
    state.save(tmp_path, {"version": 1, "commit": "abc", "parts": {"floor": {"status": "passed", "rows": {}}}})
    words = ["--only", "none", "--work", str(tmp_path), "--go-on"]
    assert check.main(["--out", str(tmp_path / "new"), *words, str(tmp_path / state.NAME)]) == 0
    assert state.load(tmp_path / "new") == state.load(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        check.main(["--out", str(tmp_path / "other"), *words, str(tmp_path / "none.json")])


def test_named_parts_share_all_the_time(tmp_path, monkeypatch):
    end = check.GRACE + check.ENDING
    assert given(tmp_path, monkeypatch, "--only", "bccd", "--minutes", "6") == [
        ("bccd", pytest.approx(360 - end, abs=2), (), 0)
    ]

    def time_of(name: str) -> float:
        return sum(stage.seconds for stage in stages.STAGES if stage.part == name)

    calls = given(tmp_path, monkeypatch, "--only", "bccd,floor")
    assert [call[0] for call in calls] == ["floor", "bccd"]
    assert calls[0][1] == pytest.approx(480 * time_of("floor") / (time_of("floor") + time_of("bccd")), abs=2)


def test_the_core_list_by_name(tmp_path, monkeypatch):
    calls = [(name, cases, first) for name, _, cases, first in given(tmp_path, monkeypatch, "--only", "core")]
    assert calls == [(stage.part, stage.cases, stage.first) for stage in stages.CORE]


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
    saved = state.load(tmp_path)
    found = {name: path for name, path in saved["preflight"].items() if path}
    assert found == {name: str(path) for name, path in tools.items()} and list(saved["preflight"]) == list(
        machine.WITHOUT
    )
    said = "on this machine found: gcc, nvcc, git; missing: Python.h (no torch.compile, no Triton); ptxas ("
    printed, text = capsys.readouterr().out, " ".join(table.table(saved).split())
    assert said in printed and said in text and "compute-sanitizer (the part sanitizer is left out)" in text
    (tmp_path / "Python.h").touch()
    assert machine.place("Python.h") == str(tmp_path / "Python.h")


def test_the_cases_of_a_gpu_can_be_listed_without_one(capsys):
    assert check.main(["--list", "--gpu"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "train: bf16 b32 compiled+graph native" in listed and "losses: reference against native" in listed
    assert {line.partition(": ")[0] for line in listed} == set(check.PARTS), "each can say, none with a !"
    with pytest.raises(SystemExit, match="2"):
        check.main(["--gpu", "--out", "nowhere"])
