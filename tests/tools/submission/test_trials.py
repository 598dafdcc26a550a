"""tools/trials.py on files as a job leaves them; compliance by the official checker itself."""

import json
import os
import random
import re
from types import SimpleNamespace

import pytest

from detcore import UserError
from tools.submission import trials

DEAD = "rank 2 (host n2, pid 12, step 40, phase training step) gave no sign of life for 30 s: it was killed, or"
TABLE = """  rank  host              pid       step      phase         still for  state
  0     n1                10        41        training step     31 s  running
  2     n2                12        40        training step     32 s  no sign of life
"""


@pytest.fixture(scope="module")
def tool():
    return trials


def watchdog(rank: int, words: str, table: str = "") -> str:
    return f"watchdog on rank {rank}: {words}.\n{table}  stacks of this rank: x/stacks_rank{rank}.txt; exit code 6\n"


class Folder:
    """A trial of 2 nodes with 2 ranks each."""

    def __init__(self, path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def put(self, exits: dict[int, int], logs: dict[int, str], order=None):
        for rank, text in logs.items():
            (self.path / f"rank_{rank}.log").write_text(text)
        order = order or {}
        lines = [f"{r} n{1 + r // 2} {code} {1000 + order.get(r, 10)}\n" for r, code in exits.items()]
        (self.path / "exits.txt").write_text("".join(lines))
        return self


@pytest.fixture
def trial(tmp_path):
    return Folder(tmp_path / "trial")


@pytest.fixture
def explain(tool, trial, capsys):
    def call(code, nodes="n1,n2", ranks=2):
        args = ["--code", str(code), "--nodes", nodes, "--ranks-per-node", str(ranks)]
        assert tool.main(["explain", str(trial.path), *args]) == 0
        text = capsys.readouterr().out
        return text.splitlines()[0], text

    return call


def test_check_accepts_a_good_log(tool, tmp_path, write_log, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, said = write_log(tmp_path / "a b.log"), tmp_path / "x" / "said.out"
    log.write_text("epoch 1 [##\x00\xff]\n" + log.read_text().replace(":::MLLOG", "0: :::MLLOG", 3))
    for _ in range(2):
        assert tool.main(["check", str(log), "--ruleset", "5.1.0", "--append", str(said)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"compliance of {log}, ruleset 5.1.0: SUCCESS"
    text = said.read_text()
    assert text.count(f"===== {log} =====") == 2 and text.count("INFO - SUCCESS") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.log", "x"]


@pytest.mark.parametrize("key", ["cache_clear", "seed", "run_stop", "eval_accuracy", "submission_org"])
def test_check_says_what_is_missing(tool, tmp_path, write_log, key):
    log = write_log(tmp_path / "log", leave_out=(key,), status=None if key == "run_stop" else "success")
    verdict = tool.check(log, "5.1.0")
    assert verdict.ok == (key == "seed")  # which is the package checker's affair
    assert verdict.ok or (f"FAILED: {key} is missing" in verdict.line and "\n" not in verdict.line)


def test_check_says_which_test_failed(tool, tmp_path, write_log):
    low = tool.check(write_log(tmp_path / "low", metric=0.2, status="aborted"), "5.1.0")
    assert not low.ok and "best mAP 0.2000 (after epoch 4), the target is 0.340: 4 evaluations" in low.line
    log = write_log(tmp_path / "sgd")
    log.write_text(log.read_text().replace('"adam"', '"sgd"'))
    assert """opt_name is "sgd", 'adam' is wanted""" in tool.check(log, "5.1.0").line
    log.write_text(log.read_text()[:-60])
    assert "a line looks like an event and can't be read" in " ".join(tool.check(log, "5.1.0").complaints)


def test_check_names_the_error_before_the_warnings(tool, tmp_path, write_log):
    log = write_log(tmp_path / "log")
    twice = [line for line in log.read_text().splitlines(True) if '"submission_org"' in line]
    log.write_text("".join([*twice, log.read_text()]))
    verdict = tool.check(log, "5.1.0")
    assert verdict.ok and "SUCCESS with 1 warning: submission_org stands there 2 times" in verdict.line
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "cache_clear" not in line))
    verdict = tool.check(log, "5.1.0")
    assert "FAILED: cache_clear is missing" in verdict.line and "more" not in verdict.line


def test_check_of_a_resumed_run(tool, tmp_path, write_log):
    write_log(tmp_path / "log", status=None)
    line = tool.check(write_log(tmp_path / "log", append=True), "5.1.0").line
    assert "FAILED: the run was resumed, so its log has 2 parts" in line


@pytest.mark.parametrize("ruleset", ["6.0.0", "6.1.0", "4.1.0"])
@pytest.mark.parametrize("division", ["closed", "open"])
def test_check_of_a_ruleset_without_this_benchmark(tool, tmp_path, write_log, ruleset, division):
    verdict = tool.check(write_log(tmp_path / "log", division=division), ruleset)
    assert not verdict.ok and "no rules for retinanet" in verdict.line and "5.0.0, 5.1.0" in verdict.line
    assert "Traceback" not in verdict.output


def test_check_of_an_old_name_under_its_ruleset(tool, tmp_path, write_log):
    log = write_log(tmp_path / "log", benchmark="ssd")
    assert "no rules for ssd" in tool.check(log, "5.1.0").line
    assert "no rules" not in tool.check(log, "4.0.0").line


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("", "", "SUCCESS"), ('"open"', '"closed"', "FAILED"), ('"adam"', '"sgd"', "FAILED"),
        ('"key": "eval_stop"', '"key": "other"', "FAILED"),
    ],
)  # fmt: skip
def test_check_of_a_log_of_efficientdet(tool, tmp_path, write_log, before, after, word):
    log = write_log(tmp_path / "log", benchmark="efficientdet", division="open", metric=0.25)
    log.write_text(log.read_text().replace(before, after) if before else log.read_text())
    line = tool.check(log, "5.1.0").line
    assert "rules_efficientdet.yaml" in line and word in line, line


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ('{"BBOX": 0.4, "SEGM": 0.3}', "SUCCESS"), ('{"BBOX": 0.4, "SEGM": 1.5}', "FAILED"),
        ('{"BBOX": 0.4, "SEGM": null}', "FAILED"), ("{}", "FAILED"), ("-0.1", "FAILED"), ("1", "SUCCESS"),
    ],
)  # fmt: skip
def test_check_of_scores_of_several_targets(tool, tmp_path, write_log, value, word):
    log = write_log(tmp_path / "log", benchmark="efficientdet", division="open", metric=0.25)
    text, count = re.subn(r'("key": "eval_accuracy", "value": )0\.25', rf"\g<1>{value}", log.read_text())
    log.write_text(text)
    line = tool.check(log, "5.1.0").line
    assert count and "rules_efficientdet.yaml" in line and word in line, line


def test_check_of_a_benchmark_that_only_this_project_has_rules_for(tool, tmp_path, write_log):
    log = write_log(tmp_path / "log", benchmark="ssd300", division="open", metric=0.25)
    more = {"opt_momentum": 0.9, "opt_learning_rate_warmup_steps": 300, "opt_learning_rate_decay_factor": 0.1}
    more["opt_learning_rate_decay_boundary_epochs"] = [43, 54]
    lines = [line.replace('"adam"', '"sgd"') for line in log.read_text().splitlines()]
    one = next(line for line in lines if '"seed"' in line)
    event = json.loads(one.partition(":::MLLOG ")[2])
    extra = [":::MLLOG " + json.dumps({**event, "key": key, "value": value}) for key, value in more.items()]
    at = lines.index(one)
    log.write_text("\n".join([*lines[:at], *extra, *lines[at:]]) + "\n")
    verdict = tool.check(log, "5.1.0")
    assert verdict.ok, verdict.line
    assert verdict.line == f"events of {log}, rules_ssd300.yaml (no MLPerf ruleset has this benchmark): SUCCESS"
    whole = log.read_text()
    log.write_text(whole.replace('"open"', '"closed"'))
    assert "FAILED" in tool.check(log, "5.1.0").line
    log.write_text(re.sub(r'.*"key": "init_stop".*\n', "", whole))  # a rule that the benchmarks share
    assert "FAILED" in tool.check(log, "5.1.0").line
    adam = whole.replace('"sgd"', '"adam"')  # which has no momentum
    log.write_text(adam)
    assert "FAILED" in tool.check(log, "5.1.0").line
    log.write_text("".join(line for line in adam.splitlines(True) if "opt_momentum" not in line))
    verdict = tool.check(log, "5.1.0")
    assert verdict.ok, verdict.line


def test_check_names_the_log_as_the_host_does(tool, tmp_path, write_log, capsys):
    log, out = write_log(tmp_path / "a/result_2.txt"), tmp_path / "compliance.out"
    assert tool.main(["check", str(log), "--append", str(out), "--called", "/host/S_3/result_2.txt"]) in (0, 1)
    assert "\ncompliance of /host/S_3/result_2.txt, ruleset" in capsys.readouterr().out
    assert str(log) not in out.read_text() and set(tool.read_verdicts(out)) == {"S_3", "result_2.txt"}


def test_check_of_what_is_no_log(tool, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Traceback\n")
    for name, words in (("none", "no such file"), ("empty", "empty"), ("text", "no MLPerf event")):
        verdict = tool.check(tmp_path / name, "5.1.0")
        assert not verdict.ok and words in verdict.line
    with pytest.raises(UserError, match=r"'5\.1'.*5\.1\.0"):
        tool.check(tmp_path / "text", "5.1")


def test_check_survives_a_checker_that_breaks(tool, tmp_path, write_log, monkeypatch):
    from mlperf_logging.compliance_checker import mlp_compliance

    def broken(*_):
        raise KeyError("v")

    monkeypatch.setattr(mlp_compliance, "main", broken)
    verdict = tool.check(write_log(tmp_path / "log"), "5.1.0")
    assert not verdict.ok and not verdict.ran and "did not finish (KeyError: 'v')" in verdict.line


def test_a_full_disk_does_not_hide_the_verdict(tool, tmp_path, write_log, capsys):
    log = write_log(tmp_path / "log")
    assert tool.main(["check", str(log), "--append", "/dev/full"]) == 0
    streams = capsys.readouterr()
    assert "SUCCESS" in streams.out and "disk full" in streams.err


def test_killed_rank(trial, explain):
    logs = {0: "step 1\n" + watchdog(0, DEAD, TABLE), 1: watchdog(1, DEAD), 2: "step 1\nstep 2\n", 3: watchdog(3, DEAD)}
    trial.put({0: 6, 1: 6, 2: 137, 3: 6}, logs)
    (trial.path / "stacks_rank0.txt").touch()
    first, text = explain(137)
    assert "rank 2 on node n2 was killed by SIGKILL (exit code 137)" in first and "dmesg on n2" in first
    assert "  | step 1\n  | step 2\n" in text and text.count("no sign of life") == 1  # in the table
    assert "exit codes: 6 (ended by the watchdog): ranks 0, 1, 3; 137 (SIGKILL): rank 2" in text
    assert "stacks_rank0.txt" in text
    (trial.path / "srun.log").write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    first, text = explain(137)
    assert "out of memory, as Slurm says" in first and "  | slurmstepd: error: Detected" in text


def test_vanished_node(trial, explain):
    trial.put({0: 6, 1: 6}, {0: "a\n" + watchdog(0, DEAD), 1: watchdog(1, DEAD), 2: "last words\n", 3: ""})
    first, text = explain(6)
    assert "node n2 is gone (ranks 2, 3; no exit code of any)" in first and "gave no sign of life" in first
    assert "  | last words" in text and "none: ranks 2, 3" in text


def test_vanished_node_with_rank_0_and_the_store(trial, explain):
    words = (
        "rank 0 (host n1, pid 10, step 4, phase evaluation) holds the watchdog's store, out of reach for 30 s (reset)"
    )
    trial.put({2: 6, 3: 6}, {0: "", 1: "", 2: watchdog(2, words), 3: watchdog(3, words)})
    first, _ = explain(6)
    assert "node n1 is gone (ranks 0, 1;" in first


def test_stopped_process_on_a_living_node(trial, explain):
    trial.put({0: 6, 1: 6, 3: 6}, {r: watchdog(r, DEAD) if r != 2 else "step 40\n" for r in range(4)})
    first, _ = explain(6)
    assert (
        "rank 2 on node n2 was lost (no exit code; step 40, phase training step): gave no sign of life" in first
        and "so the node lives" in first
    )


ALONE = DEAD.replace("rank 2", "rank 1")  # where each node has one rank


def test_a_stopped_process_that_is_alone_on_its_node(trial, explain):
    """Nothing tells the process from its node; nobody says that the node is gone."""
    trial.put({0: 6}, {0: watchdog(0, ALONE), 1: "step 40\n"})
    first, _ = explain(6, ranks=1)
    assert "rank 1 on node n2 was lost (no exit code; step 40, phase training step): gave no sign of life" in first
    assert "is gone" not in first and "alone on n2, so that this can be the process or its node" in first
    (trial.path / "srun.log").write_text("srun: error: n2: task 1: Killed\n")
    first, _ = explain(6, ranks=1)
    assert "rank 1 on node n2 was lost" in first and "n2 answered when what was left was killed" in first
    (trial.path / "srun.log").write_text("slurmstepd: error: *** STEP 3.0 ON n1 CANCELLED DUE TO NODE FAILURE ***\n")
    assert "node n2 is gone (rank 1; no exit code of any)" in explain(6, ranks=1)[0]


def test_a_stopped_process_alone_on_its_node_that_run_sub_killed(trial, explain):
    trial.put({0: 6}, {0: watchdog(0, ALONE), 1: "step 40\n"})
    with (trial.path / "exits.txt").open("a") as file:
        file.write("1 n2 137 1015\n")
    (trial.path / "killed.txt").write_text("1015\n")
    first, _ = explain(6, ranks=1)
    assert "rank 1 on node n2 was lost (no exit code" in first and "so the node lives" in first and "gone" not in first


def test_whom_run_sub_killed_is_not_said_to_have_been_killed(trial, explain):
    """It kills what is left soon after the watchdogs' end; the stopped rank leaves 137 then."""
    logs = {r: watchdog(r, DEAD) if r != 2 else "step 40\n" for r in range(4)}
    trial.put({0: 6, 1: 6, 2: 137, 3: 6}, logs, order={2: 15})
    assert "killed by SIGKILL" in explain(6)[0]
    (trial.path / "killed.txt").write_text("1015\n")
    first, text = explain(6)
    assert "rank 2 on node n2 was lost (no exit code" in first and "no sign of life" in first and "SIGKILL" not in first
    assert "run.sub killed the ranks that had not ended by themselves" in text and "none: rank 2" in text


def test_frames_of_cpp_code_are_no_last_words(trial, explain):
    frames = "".join(f"frame #{i}: <unknown function> + 0x{i}\n" for i in range(20)) + "<omitting python frames>\n"
    thrown = "Exception raised from sendBytes at Utils.hpp:761 (most recent call first):\n"
    trial.put({0: 6, 1: 6, 3: 6}, {r: watchdog(r, DEAD) if r != 2 else f"telling\n{thrown}{frames}" for r in range(4)})
    _, text = explain(6)
    assert "| telling" in text and "frame #" not in text and "Exception raised" not in text


def test_killed_because_another_hung(trial, explain):
    """run.sub lets every process print its stacks and kills them 45 s after the first one failed."""
    words = "rank 1 (host n1, pid 9, step 7, phase s) stood still for 40 s (the stacks in x show where). A slow disk"
    logs = {r: watchdog(r, words) for r in (0, 2, 3)} | {1: "line\nTimeout (0:01:05)!\n"}
    first, _ = explain(6) if trial.put({0: 6, 1: 137, 2: 6, 3: 131}, logs, order={1: 60, 3: 60}) else None
    assert "rank 1 on node n1 hung (exit code 137; step 7, phase s)" in first


def test_hanging_rank(trial, explain):
    words = (
        "rank 1 (host n1, pid 9, step 7, phase waiting for data) stood still for 40 s (the stacks in "
        "x/stacks_rank1.txt show where). A slow disk, a stuck loader or a network fault are usual"
    )
    trial.put(dict.fromkeys(range(4), 6), {r: f"line of {r}\n{watchdog(r, words)}" for r in range(4)})
    first, text = explain(6)
    assert "rank 1 on node n1 hung (exit code 6; step 7, phase waiting for data): stood still for 40 s" in first
    assert "  | line of 1" in text and "6 (ended by the watchdog): ranks 0 to 3" in text


def test_crash_with_a_verdict_of_the_others(trial, explain):
    trace = (
        "Traceback (most recent call last):\n  File 'x', line 1, in f\nZeroDivisionError: by zero\nhint: report it\n"
    )
    words = "rank 3 (host n2, pid 9, step 7, phase s) ended with an error: ZeroDivisionError: by zero. Its own output"
    trial.put({0: 6, 1: 6, 2: 6, 3: 1}, {r: watchdog(r, words) for r in range(3)} | {3: trace})
    first, text = explain(1)
    assert "rank 3 on node n2 crashed (exit code 1, crash): ZeroDivisionError: by zero" in first
    assert "  | hint: report it" in text


def test_the_first_crash_counts_and_not_those_it_caused(trial, explain):
    trace = "Traceback (most recent call last):\n  File 'x', line 1, in f\n{}\nhint: report it\n"
    peer = trace.format("RuntimeError: [gloo/transport] Connection closed by peer [127.0.1.1]:4")
    logs = {0: peer, 1: peer, 2: trace.format("IndexError: 7"), 3: peer}
    trial.put(dict.fromkeys(range(4), 1), logs, order={2: 11})
    first, _ = explain(1)
    assert "rank 2 on node n2 crashed" in first and "IndexError: 7" in first


def test_bad_input_of_all_is_said_once(trial, explain):
    trial.put(dict.fromkeys(range(4), 2), dict.fromkeys(range(4), "error: --lr=x is no number\n"))
    first, text = explain(2)
    assert "ranks 0 to 3 on nodes n1, n2 ended (exit code 2, bad input): --lr=x is no number" in first
    assert text.count("error: --lr=x") == 1


def test_not_finite(trial, explain):
    logs = {r: f"error: rank {r} stops: the loss of another rank is not finite, its own message\n" for r in range(4)}
    logs[3] = "error: rank 3: the loss is not finite at step 9 (epoch 1): cls = nan; image ids [4]. Look\n"
    trial.put(dict.fromkeys(range(4), 5), logs)
    first, _ = explain(5)
    assert "rank 3 on node n2 met a loss that is not finite" in first and "image ids [4]" in first


def test_stopped_and_target_not_reached(trial, explain):
    trial.put(dict.fromkeys(range(4), 4), {0: "Stopped by SIGUSR1: best AP 0.1 after epoch 2. Go on with --resume.\n"})
    first, _ = explain(4)
    assert "ranks 0 to 3" in first and "stopped on request" in first and "Stopped by SIGUSR1" in first
    (trial.path / "rank_1.log").write_text(
        "slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED AT x DUE TO TIME LIMIT ***\n"
    )
    assert "stopped on request at its time limit" in explain(4)[0]
    trial.put(dict.fromkeys(range(4), 3), {0: "Target 0.34 NOT reached in 2 epochs: best AP 0.1\n"})
    assert "no failure: Target 0.34 NOT reached" in explain(3)[0]


def test_some_ranks_left_no_exit_code(trial, explain):
    trial.put({0: 4, 1: 4}, dict.fromkeys(range(4), "x\n"))
    assert "ranks 2, 3 on node n2 left no exit code; they were killed" in explain(4)[0]
    (trial.path / "srun.log").write_text("slurmstepd: error: *** STEP 3.0 ON n1 CANCELLED DUE TO NODE FAILURE ***\n")
    assert "node n2 vanished: ranks 2, 3" in explain(4)[0]


def test_nothing_started(trial, explain):
    trial.put({}, {0: ":::SYSJSON {}\n"})
    assert "no rank wrote a line" in explain(1)[0]
    (trial.path / "rank_0.log").unlink()
    first, text = explain(1)
    assert "no rank wrote a line" in first and "rank 0 left no log" in text
    trial.put({}, {0: "slurmstepd: error: pyxis: child 1 failed with error code: 1\n"})
    assert "pyxis: child 1 failed" in explain(1)[0]


def test_wrong_program(trial, explain):
    text = "run_and_time.sh: BENCHMARK=x: there is no /a/x/train.py\n"
    trial.put(dict.fromkeys(range(4), 2), dict.fromkeys(range(4), text))
    assert "BENCHMARK=x: there is no" in explain(2)[0]


def test_one_torchrun_for_all_ranks_of_a_machine(trial, explain):
    text = """step 1
E1122 08:50:00.55 25313 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1
Traceback (most recent call last):
  File "run.py", line 1142, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
  <NO_OTHER_FAILURES>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_08:50:00
  host      : n1
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 25321)  (SIGKILL)
"""
    trial.put({0: 1}, {0: text})
    first, said = explain(1, "n1", 2)
    assert "rank 1 on node n1 was killed by SIGKILL" in first
    assert "  | step 1\n" in said and "ChildFailedError" not in said
    trial.put({0: 4}, {0: "Stopped by SIGTERM: no evaluation yet\n"})
    assert "rank 0 on node n1 stopped on request" in explain(4, "n1", 2)[0]


def test_huge_binary_and_cut_logs(trial, explain):
    noise = random.Random(0).randbytes(300_000)
    stacks = b'Current thread 0x1 (most recent call first):\n  File "a.py", line 3 in wait\n'
    event = b':::MLLOG {"key": "x"}\n'
    end = b"\x1b[31mred\x1b[0m\nbar 1%\rbar 2%\nsame\nsame\n" + b"x" * 5000 + b"\n" + stacks + event + b"cut li"
    trial.put({0: 6, 1: 139, 2: 6, 3: 6}, {})
    (trial.path / "rank_1.log").write_bytes(noise + b"\n" + end)
    (trial.path / "exits.txt").open("ab").write(b"\x00\xff garbage\n2 n")
    first, text = explain(139)
    assert "rank 1 on node n1 was killed by SIGSEGV" in first
    assert "  | red\n  | bar 2%\n  | same\n  | " + "x" * 240 + "\n  | cut li\n" in text
    assert "thread" not in text and "MLLOG" not in text and len(text) < 5000
    assert all(line.isprintable() for line in text.splitlines())


def test_full_disk(tool, trial, explain, monkeypatch):
    trial.put({0: 2}, {0: "error: x: No space left on device\n"})
    full = SimpleNamespace(f_bavail=1, f_frsize=4096, f_files=9, f_favail=5)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    lines = explain(2)[1].splitlines()
    assert "No space left" in lines[0] and "is full (0.0 MiB free)" in lines[1]
    full.f_bavail, full.f_favail = 2**30, 0
    assert "no more files" in explain(2)[1]


def test_explain_without_a_folder(tool, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tool.main(["explain", str(tmp_path / "x"), "--code", "1", "--nodes", "n1", "--ranks-per-node", "1"])


@pytest.fixture
def job(tool, tmp_path, write_log, capsys):
    """job({k: (exit code or None, options of write_log or None)}, runs): the summary's lines and its JSON."""

    def run(trials, runs=5, checks=True):
        for k, (code, options) in trials.items():
            folder = tmp_path / f"s_{k}"
            folder.mkdir(exist_ok=True)
            for part, some in enumerate(options if isinstance(options, list) else [options]):
                if some is not None:
                    write_log(folder / f"result_{k - 1}.txt", **{"seed": k, **some}, append=part > 0)
            if code is not None:
                (folder / "exit_code").write_text(f"{code}\n")
            if checks:
                log = folder / f"result_{k - 1}.txt"
                tool.append_verdict(tmp_path / "compliance_s.out", log, tool.check(log, "5.1.0"))
        capsys.readouterr()
        words = ["--logdir", str(tmp_path), "--stamp", "s", "--runs", str(runs), "--json", str(tmp_path / "j")]
        assert tool.main(["summary", *words]) == 0
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "j").read_text())

    return run


MINUTES = {1: 30.0, 2: 31.5, 3: 29.25, 4: 33.0, 5: 28.0}


def test_summary_of_five_successes(job):
    lines, record = job({k: (0, {"minutes": m}) for k, m in MINUTES.items()})
    assert lines[0].split() == ["trial", "outcome", "minutes", "epochs", "metric", "compliance", "log"]
    assert lines[2].split()[:6] == ["2", "success", "31.500", "4", "0.3450", "SUCCESS"]
    assert "5 of 5 trials ended with success; olympic mean: 30.250 minutes" in lines[-1]
    assert record["olympic_mean_minutes"] == pytest.approx((29.25 + 30 + 31.5) / 3)
    assert [t["epochs"] for t in record["trials"]] == [4] * 5


def test_summary_with_one_failure_and_with_two(job):
    trials = {k: (0, {"minutes": m}) for k, m in MINUTES.items()}
    trials[3] = (137, {"status": None})
    lines, record = job(trials)
    assert lines[3].split()[:5] == ["3", "failed", "(137,", "SIGKILL)", "-"] and "FAILED" in lines[3]
    assert record["olympic_mean_minutes"] == pytest.approx((30 + 31.5 + 33) / 3)
    assert "trial 3 does not count and is taken as the slowest" in lines[-1]
    lines, record = job(trials | {1: (3, {"metric": 0.3, "status": "aborted"})})
    assert "target not reached" in lines[1] and "no score: only 3 of 5 trials count (not 1, 3)" in lines[-1]
    assert record["olympic_mean_minutes"] is None


def test_summary_of_everything_else(job, tmp_path):
    trials = {
        1: (4, {"status": "aborted"}),
        2: (0, [{"status": None}, {}]),
        3: (0, {"status": "aborted", "metric": {"BBOX": 0.38, "SEGM": 0.34}}),
        4: (None, {"status": None}),
        6: (143, {}),
        7: (2, None),
    }
    lines, record = job(trials, runs=7, checks=False)
    outcomes = [t["outcome"] for t in record["trials"]]
    assert outcomes == [
        "stopped", "success, resumed", "failed (0, no success in log)", "running", "not started",
        "failed (143, SIGTERM)", "failed (2, bad input)",
    ]  # fmt: skip
    assert record["trials"][1]["minutes"] is None and record["trials"][2]["metric"] == "BBOX 0.3800 SEGM 0.3400"
    assert record["trials"][6]["log"] == "missing" and "not checked" in lines[1]
    assert "trial 6: its log ends with success" in lines[-2] and "1 of 7" in lines[-1]
    assert "no score: MLPerf scores 5 trials, this job had 7" in lines[-1]


def test_summary_does_not_count_resumed_and_refused_logs(job):
    trials = {k: (0, {"minutes": m}) for k, m in MINUTES.items()}
    _, record = job(trials | {1: (0, [{"status": "aborted"}, {}])})
    assert [t["counts"] for t in record["trials"]] == [False, True, True, True, True]
    lines, record = job(trials | {1: (0, [{"status": "aborted"}, {}]), 2: (0, {"leave_out": ("cache_clear",)})})
    assert record["trials"][1]["outcome"] == "success" and record["trials"][1]["compliance"] == "FAILED"
    assert "no score: only 3 of 5" in lines[-1]


def test_summary_reads_the_log_of_rank_0_where_there_is_no_result_file(job, tmp_path, write_log):
    (tmp_path / "s_1").mkdir()
    write_log(tmp_path / "s_1/rank_0.log", minutes=2)
    (tmp_path / "s_1/exit_code").write_text("0")
    (tmp_path / "s_1.log").symlink_to("s_1/rank_0.log")
    lines, _ = job({}, runs=1)
    assert lines[1].split()[1:3] == ["success", "2.000"] and lines[1].endswith("s_1.log")
    (tmp_path / "compliance_s.out").write_text("compliance of /results/s_1.log, ruleset 5.1.0: FAILED: x\n")
    assert "FAILED" in job({}, runs=1)[0][1]


def test_summary_says_what_interrupted_a_trial(job, tmp_path):
    (tmp_path / "s_1").mkdir()
    (tmp_path / "s_1/interrupted.txt").write_text("interrupted by Slurm (node lost): sacct -D -j 7\n")
    lines, _ = job({1: (143, None)}, runs=1, checks=False)
    assert "trial 1: interrupted by Slurm (node lost): sacct -D -j 7" in lines
