"""Situations that went wrong once, each with logs of its own: what every command says of them, and its exit code."""

import json

import pytest

from detcore import UserError
from tests.tools.submission import made
from tools.submission import DOUBTFUL, NOT_CHECKED, OK, REFUSED, lint, package, rcp, score, verify


@pytest.fixture
def say(capsys):
    """say(module, words...): (exit code or the error's text, everything printed)."""

    def call(command, *words):
        capsys.readouterr()
        try:
            code = command.main([str(word) for word in words])
        except UserError as error:
            code = str(error)
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return call


@pytest.fixture
def pack(say, tmp_path):
    """pack(*words): `package` without code of the logs in tmp_path/logs."""

    def call(*words, **fields):
        (tmp_path / "s.json").write_text(json.dumps(made.description(**fields)))
        org = [] if "--org" in words else ["--org", "us"]
        return say(
            package, *org, "--system", "box", "--no-code", "--system-json", tmp_path / "s.json",
            "--out", tmp_path / "out", *words, tmp_path / "logs",
        )  # fmt: skip

    return call


def packed(tmp_path) -> list[str]:
    return sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())


EXPECTED = [*(f"us/results/box/retinanet/result_{i}.txt" for i in range(5)), "us/systems/box.json"]


def test_a_sound_result(say, pack, tmp_path):
    made.write_result(tmp_path / "logs")
    assert say(lint, tmp_path / "logs")[0] == OK and say(rcp, tmp_path / "logs")[0] == OK
    code, said = pack()
    assert code == OK and packed(tmp_path) == EXPECTED and "olympic mean: 34.200 minutes" in said
    assert say(verify, tmp_path / "out")[0] == OK


@pytest.mark.parametrize("org", ["unset", "SUBMISSION_ORG_PLACEHOLDER"])
def test_org_was_never_set(say, pack, tmp_path, org):
    """MLCommons accepts such logs, so they are packed under the name that is given; it is said everywhere."""
    made.write_result(tmp_path / "logs", org=org)
    code, said = say(lint, tmp_path / "logs")
    assert code == OK and f"submission_org is {org!r}, as if it had never been set" in said
    code, said = pack()
    assert code == OK and packed(tmp_path) == EXPECTED and "as if it had never been set" in said


def test_org_has_a_blank(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", org="University of X")
    code, _ = pack("--org", "University of X", submitter="University of X")
    assert code == OK and packed(tmp_path)[-1] == "University_of_X/systems/box.json"
    assert say(verify, tmp_path / "out")[0] == OK


KILLED = {4: {"killed_after": 2}}


def test_one_killed_run(say, pack, tmp_path):
    """As olympic scoring has it: it counts as the slowest. The same in every place."""
    made.write_result(tmp_path / "logs", KILLED)
    code, said = say(lint, tmp_path / "logs")
    assert code == REFUSED and "run_stop is missing: the run was killed or still goes on" in said
    code, said = say(score, tmp_path / "logs")
    assert code == OK and "olympic mean: 34.200 minutes" in said and "taken as the slowest" in said
    code, said = pack()
    assert code == OK and packed(tmp_path) == EXPECTED and "as olympic scoring allows for one" in said
    assert say(verify, tmp_path / "out")[0] == OK


def test_two_killed_runs(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", KILLED | {1: {"killed_after": 3}})
    code, said = say(score, tmp_path / "logs")
    assert code == REFUSED and "no score: 2 of 5 runs do not count, one may" in said
    code, said = pack()
    assert code == REFUSED and packed(tmp_path) == [] and "nothing was written" in said
    assert "package: the official checker refuses it: 2 files do not comply" in said


def test_too_fast(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", epochs=3)
    code, said = say(rcp, tmp_path / "logs")
    assert (
        code == REFUSED and "too fast to be comparable, 3.000 epochs on average against the reference's 4.000" in said
    )
    assert say(score, tmp_path / "logs")[0] == REFUSED
    code, said = pack()
    assert code == REFUSED and packed(tmp_path) == [] and "too fast to be comparable" in said
    code, said = pack("--rcp-bypass")
    assert code == OK and "rcp-bypass is set: the review committee must agree" in said
    assert (tmp_path / "out/us/results/box/retinanet/package_checker_params").read_text() == "rcp-bypass"
    assert say(verify, tmp_path / "out")[0] == OK
    # Only without a newline does the official checker know its flag; here either way.
    (tmp_path / "out/us/results/box/retinanet/package_checker_params").write_text("rcp-bypass\n")
    assert say(verify, tmp_path / "out")[0] == OK


def test_a_scaled_score(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", batch=288)
    code, said = say(score, tmp_path / "logs", "--json")
    found = json.loads(said)
    assert code == OK and found["scaling_factor"] == pytest.approx((4 + 1 / 9 * 0.5) / 4)
    assert found["score_minutes"] == pytest.approx(34.2 * found["scaling_factor"])
    assert pack()[0] == OK
    written = json.loads((tmp_path / "out/us/results/box/retinanet/scaling.json").read_text())
    assert written == {"scaling_factor": found["scaling_factor"]}
    code, said = say(verify, tmp_path / "out", "--json")
    assert code == OK and json.loads(said)["results"][0]["score_minutes"] == found["score_minutes"]


def test_learning_rates_differ(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", {2: {"hyper": made.RETINANET | {"opt_base_learning_rate": 1e-4}}})
    code, said = say(lint, tmp_path / "logs")
    assert code == DOUBTFUL and "doubt: the runs differ in opt_base_learning_rate: 8.5e-05 in 4 logs" in said
    code, said = pack()
    assert code == DOUBTFUL and packed(tmp_path) == [] and "--accept-doubts" in said
    assert pack("--accept-doubts")[0] == OK and packed(tmp_path) == EXPECTED


def test_the_clock_was_set_back(say, pack, tmp_path):
    made.write_result(tmp_path / "logs", {1: {"minutes": -5}})
    code, said = say(lint, tmp_path / "logs")
    assert code == REFUSED and "run_stop is 5.0 min before run_start" in said
    code, said = say(score, tmp_path / "logs", "--json")
    found = json.loads(said)
    assert found["runs"][1]["minutes"] is None and found["score_minutes"] == pytest.approx((34.2 + 34.3 + 34.4) / 3)
    code, said = pack()
    assert code == REFUSED and packed(tmp_path) == []


def test_the_clock_went_back_in_between(say, tmp_path):
    found = made.events()
    cut = next(i for i, event in enumerate(found) if event["key"] == "eval_start" and event["value"] == 2)
    for back, code in ((0.5, OK), (20, DOUBTFUL), (400, REFUSED)):
        moved = [event | {"time_ms": event["time_ms"] - 1000 * back * (i >= cut)} for i, event in enumerate(found)]
        (tmp_path / "log.txt").write_text(made.text(moved))
        assert say(lint, tmp_path / "log.txt")[0] == code


@pytest.mark.parametrize("epoch", [None, "4", [4], True])
def test_epoch_num_that_breaks_the_official_checkers(say, pack, tmp_path, epoch):
    for path in made.write_result(tmp_path / "logs"):
        found = [json.loads(line.partition(":::MLLOG ")[2]) for line in path.read_text().splitlines()]
        for event in found:
            if event["key"] == "eval_accuracy":
                event["metadata"]["epoch_num"] = epoch
        path.write_text(made.text(found))
    code, said = say(lint, tmp_path / "logs")
    assert code == REFUSED and f"epoch_num of 4 eval_accuracy is {epoch!r}; a number is wanted" in said
    code, said = pack()
    assert code in (REFUSED, NOT_CHECKED) and packed(tmp_path) == []
    if epoch is not True:  # which Python counts as 1
        assert code == NOT_CHECKED and "package: NOT CHECKED: the checker broke down: TypeError" in said
        assert say(score, tmp_path / "logs")[0] == NOT_CHECKED


def test_a_check_that_can_not_run_is_no_acceptance(say, pack, tmp_path, monkeypatch):
    """scipy that can't be imported: neither packed nor verified, by a code of its own."""
    import sys

    made.write_tree(tmp_path / "tree/us")
    made.write_result(tmp_path / "logs")
    for name in ("mlperf_logging.rcp_checker.rcp_checker", "mlperf_logging.package_checker.package_checker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(rcp, "_points", rcp._points.__wrapped__)  # without those of earlier tests
    monkeypatch.setitem(sys.modules, "mlperf_logging.rcp_checker", None)  # as where its own imports fail
    code, said = pack()
    assert code == NOT_CHECKED and packed(tmp_path) == [] and "NOT CHECKED" in said
    code, said = say(verify, tmp_path / "tree")
    assert code == NOT_CHECKED and "NOT RUN" in said
    assert say(rcp, tmp_path / "logs")[0] == NOT_CHECKED and say(score, tmp_path / "logs")[0] == NOT_CHECKED


LINTED = {
    "below_target": ({"curve": (0.1, 0.2, 0.3, 0.33), "status": "aborted"}, REFUSED,
        "best mAP 0.3300 (after epoch 4), the target is 0.340"),
    "closed_capital": ({"division": "Closed"}, REFUSED, "submission_division is 'Closed', 'closed' or"),
    "eval_string": ({"curve": ("0.35",) * 4}, NOT_CHECKED, "eval_accuracy is '0.35', a number without quotes"),
    "srun_prefix": ({"prefix": "0: "}, OK, "accepted"),
    "init_40min": ({"init_s": 2400}, REFUSED, "40 min of initialisation (from the first init_start"),
    "per_cent": ({"curve": (24, 29.5, 33, 34.5)}, REFUSED, "is it in per cent?"),
    "other_data": ({"samples": (292, 72)}, DOUBTFUL, "train_samples is 292; OpenImages-MLPerf has 1,170,301 images"),
    "batches": ({"samples": (4572, 97)}, OK, "accepted"),
    "old_name": ({"benchmark": "ssd"}, REFUSED, "ruleset 5.1.0 has no rules for ssd"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINTED)
def test_lint_in_words(say, tmp_path, name):
    options, wanted, words = LINTED[name]
    code, said = say(lint, made.write_log(tmp_path / "log.txt", **options))
    assert code == wanted and words in said and "v['value']" not in said and "s['" not in said


def test_lint_without_a_division(say, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(made.text([event for event in made.events() if event["key"] != "submission_division"]))
    code, said = say(lint, path)
    assert code == REFUSED and "submission_division is missing: without it no rule of a division" in said
    assert "initialisation" not in said


@pytest.mark.parametrize("ruleset, words", [
    ("6.0.0", "MLPerf retired RetinaNet after 5.1"), ("6.1.0", "MLPerf retired RetinaNet after 5.1"),
    ("4.1.0", "rulesets 2.0 to 4.1 call it ssd"),
])  # fmt: skip
def test_lint_of_a_retired_benchmark(say, tmp_path, ruleset, words):
    code, said = say(lint, made.write_log(tmp_path / "log.txt"), "--ruleset", ruleset)
    assert code == REFUSED and words in said


@pytest.mark.parametrize("encoding, code", [("utf-8-sig", OK), ("utf-16", REFUSED)])
def test_lint_of_other_encodings(say, tmp_path, encoding, code):
    path = tmp_path / "log.txt"
    path.write_text(made.text(made.events()), encoding=encoding)
    found, said = say(lint, path)
    assert found == code and (code == OK or "the file is UTF-16" in said)


def test_lint_of_folders(say, tmp_path):
    for i in range(5):
        made.write_log(tmp_path / f"job/7_{i + 1}/result_{i}.txt", seed=100 + 7 * i * i)
    code, said = say(lint, tmp_path / "job", "--json")
    assert code == OK and len(json.loads(said)["logs"]) == 5
    made.write_log(tmp_path / "other/a.log")
    assert say(lint, tmp_path / "other")[0] == OK
    (tmp_path / "empty").mkdir()
    assert "holds no result_*.txt" in say(lint, tmp_path / "empty")[0]
    assert "no such file" in say(lint, tmp_path / "none")[0]


def test_lint_compares_with_the_system(say, tmp_path):
    log, path = made.write_log(tmp_path / "log.txt", platform="4xDGXH100"), tmp_path / "s.json"
    path.write_text(json.dumps(made.description(accelerator_model_name="", division="open")))
    code, said = say(lint, log, "--system-json", path)
    assert code == REFUSED and "description's division is 'open', the logs' 'closed'" in said
    assert "submission_platform is '4xDGXH100', the system description has 1 nodes" in said
    assert "has 8 accelerators a node, and accelerator_model_name is ''" in said


def test_lint_of_seeds(say, tmp_path):
    made.write_result(tmp_path / "a", {3: {"seed": 1000}})
    code, said = say(lint, tmp_path / "a")
    assert code == REFUSED and "result_3.txt: it has seed 1000, as has" in said
    for i in range(5):
        made.write_log(tmp_path / f"b/result_{i}.txt", seed=42 + i)
    code, said = say(lint, tmp_path / "b")
    assert code == OK and "the seeds are 42, 43, ...: the closed division allows no fixed ones" in said
    path = tmp_path / "log.txt"
    path.write_text(made.text([event for event in made.events() if event["key"] != "seed"]))
    assert say(lint, path)[0] == REFUSED


def test_the_same_log_twice(say, tmp_path):
    paths = made.write_result(tmp_path / "logs")
    paths[3].write_text(paths[0].read_text())
    code, said = say(lint, tmp_path / "logs")
    assert code == REFUSED and "it is the same log as an earlier one" in said


def test_a_job_with_a_killed_trial_and_a_scaled_one(tmp_path, capsys):
    from tools.submission import trials

    for name, changes, options, words in (
        ("killed", KILLED, {}, "4 of 5 trials ended with success; olympic mean: 34.200 minutes"),
        ("scaled", {}, {"batch": 288}, "score: 34.675 minutes = olympic mean: 34.200 minutes"),
        ("clock", {1: {"minutes": -5}}, {}, "trial 2 does not count and is taken as the slowest"),
    ):
        for i, path in enumerate(made.write_result(tmp_path / name, changes, **options)):
            folder = tmp_path / name / f"7_{i + 1}"
            folder.mkdir()
            path.rename(folder / path.name)
            (folder / "exit_code").write_text("137" if i in changes and "killed_after" in changes[i] else "0")
        assert trials.main(["summary", "--logdir", str(tmp_path / name), "--stamp", "7", "--runs", "5"]) == 0
        assert words in capsys.readouterr().out
