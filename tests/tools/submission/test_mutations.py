"""Damaged logs, results and system descriptions, 1,000 of them: no traceback, and no acceptance that is not official.

What the official checker refuses is refused here; what it accepts is accepted here, unless a finding of this package's
own says why not; where it breaks down the answer is "not checked" or a refusal, and never an acceptance.
"""

import copy
import json
import math
import random

import pytest

from detcore import UserError
from tests.tools.submission import made
from tools.submission import DOUBTFUL, NOT_CHECKED, OK, REFUSED, compare, lint, official, rcp, report, score, system
from tools.submission.logs import read_log

VALUES = [
    None, True, False, 0, -1, 1, 4, 0.34, 0.339, 1.0, 1e308, -1e308, float("nan"), float("inf"), 10**400, "", "0.35",
    "4", "success", "aborted", "closed", "open", "Closed", "retinanet", "ssd", "adam", "../../x", "\0",
    "\ud800", "a" * 3000, [], {}, [1], {"BBOX": 0.4, "SEGM": 0.4}, {"a": {}}, [[[[]]]],
]  # fmt: skip
JUNK = ["", "[" * 3000, '{"a": ' * 3000, ":::MLLOG {}", ":::MLLOG", ":::MLLOG null", "\x00\xff", ":::MLLOG [1]", "}{"]


def mutate(rng: random.Random, found: list[dict]) -> str:
    """The text of a log with one to three faults."""
    found = copy.deepcopy(found)
    for _ in range(rng.choice([1, 1, 2, 3])):
        i = rng.randrange(len(found))
        event = found[i]
        if not isinstance(event, dict):
            continue
        match rng.randrange(9):
            case 0:
                event["value"] = rng.choice(VALUES)
            case 1:
                del found[i]
            case 2:
                found.insert(rng.randrange(len(found) + 1), copy.deepcopy(event))
            case 3:
                event["time_ms"] = rng.choice([*VALUES, event["time_ms"] - 10**6, event["time_ms"] + 10**7])
            case 4:
                event["metadata"] = rng.choice(VALUES)
            case 5 if isinstance(event.get("metadata"), dict) and event["metadata"]:
                event["metadata"][rng.choice(list(event["metadata"]))] = rng.choice(VALUES)
            case 6:
                event["key"] = rng.choice([*VALUES, "run_start", "run_stop", "init_start", "eval_accuracy"])
            case 7:
                event.pop(rng.choice(list(event)))
            case _:
                j = rng.randrange(len(found))
                found[i], found[j] = found[j], found[i]
        if not found:
            break
    lines = [f":::MLLOG {json.dumps(one)}" for one in found]
    if rng.random() < 0.15:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(JUNK))
    if rng.random() < 0.1 and lines:
        lines[-1] = lines[-1][: rng.randrange(len(lines[-1]))]
    return "\n".join(lines) + "\n"


def base(rng: random.Random) -> list[dict]:
    return made.events(
        seed=rng.randrange(10**9), epochs=rng.choice([3, 4]), division=rng.choice(["closed", "closed", "open"]),
        start=made.START_MS + rng.randrange(10**9),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_single_logs(tmp_path, seed, capsys):
    """600 of the 1,000."""
    rng, path, accepted = random.Random(seed), tmp_path / "result_0.txt", 0
    for _ in range(60):
        path.write_text(mutate(rng, base(rng)), encoding="latin-1", errors="replace")
        log = read_log(path)
        named = [v for key in ("submission_division", "submission_benchmark") for v in log.values(key)]
        theirs = official.Said(False, False, "") if official.harmful(named) else official.compliance(path, "5.1.0")
        verdict = lint.check(path, "5.1.0")
        assert verdict.ok or verdict.complaints
        assert all("\n" not in words and len(words) < 1000 for words in verdict.complaints)
        if verdict.ok:
            assert theirs.ran and theirs.ok
            accepted += 1
        elif theirs.ok:
            assert log.resumed  # which the official checker overlooks where both parts say the same
        for command in (lint, score, rcp, report, compare):
            try:
                code = command.main([str(path), "--json"])
                json.loads(capsys.readouterr().out)
                assert code in (OK, REFUSED, DOUBTFUL, NOT_CHECKED)
                assert command is not lint or verdict.ok or code in (REFUSED, NOT_CHECKED)
            except UserError as error:
                assert str(path) in str(error)
    assert 5 <= accepted <= 55  # the damage is neither fatal nor harmless


@pytest.mark.parametrize("seed", range(4))
def test_convergence_of_results(tmp_path, seed):
    """200: five runs with one damaged, against the official RCP checker."""
    rng, agreed = random.Random(100 + seed), 0
    for k in range(50):
        folder = tmp_path / str(k)
        batch, epochs = rng.choice([64, 256, 288, 320, 700, 2048, 4096, 5000]), rng.choice([3, 4, 5, 7, 8])
        curve = tuple(0.3 + 0.01 * i for i in range(8))
        made.write_result(
            folder, {rng.randrange(5): {"epochs": rng.choice([3, 4, 8])}}, batch=batch, epochs=epochs, curve=curve
        )
        damaged = folder / f"result_{rng.randrange(5)}.txt"
        found = [json.loads(line.partition(":::MLLOG ")[2]) for line in damaged.read_text().splitlines()]
        if rng.random() < 0.6:
            damaged.write_text(mutate(rng, found), encoding="latin-1", errors="replace")
        theirs = official.convergence(folder, "5.1.0")
        logs = [read_log(path) for path in sorted(folder.glob("*.txt"))]
        try:
            ours = rcp.judge(logs, "5.1.0")
        except UserError:
            assert not theirs.ok or any(log.bad for log in logs)  # it reads half of an event that can't be read
            continue
        if not theirs.ran:
            assert ours.verdict in ("unknown", "fail", "pass", "scale")  # `package` and `verify` say "not checked" then
            continue
        lax = any(log.bad or log.last("global_batch_size") is None for log in logs)
        assert (ours.verdict in ("pass", "scale")) == theirs.ok or (lax and ours.verdict == "fail")
        if theirs.ok and ours.verdict != "fail":
            assert ours.factor == pytest.approx(theirs.value[1], rel=1e-12)
            agreed += 1
    assert agreed > 5


@pytest.mark.parametrize("seed", range(2))
def test_system_descriptions(tmp_path, seed):
    """200: what passes here passes the official checker, and can be joined into the table of results."""
    rng, path, sound = random.Random(200 + seed), tmp_path / "s.json", 0
    for _ in range(100):
        fields = made.description()
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice([*fields, "status", "division", "accelerators_per_node", "more"])
            fields[name] = rng.choice([*VALUES, "FILL IN: x", "Available cloud"])
            if rng.random() < 0.3:
                del fields[name]
        text = json.dumps(fields)
        if rng.random() < 0.1:
            text = rng.choice([text[: rng.randrange(len(text))], *JUNK, "[]", "null"])
        path.write_text(text, errors="replace")
        try:
            problems, said = system.check_description(path, "5.1.0")
        except UserError as error:
            assert str(path) in str(error)
            continue
        theirs = official.system_description(path, "5.1.0")
        assert (said.ran, said.ok) == (theirs.ran, theirs.ok)
        if not problems and said.ok:
            sound += 1
            assert all(isinstance(fields[name], str) for name in system.TABLE_FIELDS)
        system.against_logs(json.loads(text), [read_log(made.write_log(tmp_path / "log.txt"))])
    assert 10 < sound < 95


def test_own_convergence_rule_for_all_batches():
    """The verdict on any five whole epochs is the official one, for every batch size between and beyond the points."""
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

    checker = RCP_Checker("training", "5.1.0", "retinanet", False)
    rng = random.Random(1)
    for _ in range(300):
        batch = rng.choice([rng.randrange(8, 6000), 256, 320, 768, 2560, 4096])
        epochs = [rng.choice([3, 4, 5, 6, 8, 9, 15, 1e9]) for _ in range(5)]
        point, _ = rcp.reference("retinanet", batch, "5.1.0")
        ours = rcp.judge_epochs("retinanet", batch, tuple(math.inf if e == 1e9 else e for e in epochs), "5.1.0")
        if point is None or epochs.count(1e9) > 1:
            assert ours.verdict == "fail"
            continue
        passed, factor = checker._eval_submission_record(point, list(epochs), "")
        assert (ours.verdict in ("pass", "scale")) == passed and (not passed or ours.factor == pytest.approx(factor))


@pytest.mark.parametrize("known, least", [((4, 4, 4, 4), 1), ((3, 4, 4, 4), 4), ((4, 4, 4), 4), ((3, 3, 3), 6)])
def test_what_the_next_runs_must_take(known, least):
    """By trying them all: `least` epochs are enough, one fewer is not."""
    rest = 5 - len(known)
    words = rcp.judge_epochs("retinanet", 256, known, "5.1.0").needs
    if least > 1:
        assert f"must take at least {least} epochs" in words
        less = rcp.judge_epochs("retinanet", 256, (*known, *[least - 1] * rest), "5.1.0")
        assert less.verdict == "fail"
    assert rcp.judge_epochs("retinanet", 256, (*known, *[least] * rest), "5.1.0").verdict == "pass"
