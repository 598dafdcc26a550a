"""Trees in the layout of MLCommons' results repositories: packaged, verified, compared with the official verdicts."""

import json

import pytest

from detcore import UserError
from tests.tools.submission import made
from tools.submission import NOT_CHECKED, OK, REFUSED, compare, official, published, verify


@pytest.fixture
def rounds(tmp_path):
    """Rounds 3.1 and 5.1: RetinaNet under its two names, Mask R-CNN, older words for the status, placeholders."""
    old, new = tmp_path / "training_results_v3.1", tmp_path / "training_results_v5.1"
    made.write_tree(old / "Acme", "n8", "ssd", {"status": "available"}, org="PLACEHOLDER")
    scores = {"curve": [{"BBOX": 0.3 + 0.006 * i, "SEGM": 0.26 + 0.006 * i} for i in range(1, 17)]}
    made.write_tree(old / "Acme", "n12", "maskrcnn", {"status": "onprem"}, hyper=made.MASKRCNN, batch=96, epochs=14,
                    samples=(117266, 5000), **scores)  # fmt: skip
    made.write_tree(new / "Acme_Labs", "box", fields={"submitter": "Acme Labs"}, org="Acme Labs", samples=(4572, 97))
    made.write_tree(new / "Acme_Labs", "killed", changes={2: {"killed_after": 1}})
    made.write_tree(new / "Other", "scaled", batch=288)
    made.write_tree(new / "Other", "open", fields={"division": "open"}, division="open", curve=(0.1, 0.15, 0.2, 0.21))
    return tmp_path


def run(command, capsys, *words):
    code = command.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_no_disagreement_on_sound_results(rounds, capsys):
    code, found = run(published, capsys, rounds)
    assert [one["disagreement"] for one in found["results"]] == [""] * 6 and code == OK
    assert {one["ours"] for one in found["results"]} == {"accepted"}
    assert {one["name"]: one["ruleset"] for one in found["results"]}["Acme/n12/maskrcnn"] == "3.1.0"
    assert all(one["minutes"] == pytest.approx(one["theirs"]) for one in found["results"])


def test_refused_by_both(tmp_path, capsys):
    made.write_tree(tmp_path / "v5.1/A", "fast", epochs=3)
    made.write_tree(tmp_path / "v5.1/A", "late", init_s=2000)
    made.write_tree(tmp_path / "v5.1/A", "words", fields={"status": "for sale"})
    made.write_tree(tmp_path / "v5.1/A", "seeds", seed=5)
    made.write_tree(tmp_path / "v5.1/A", "batch", batch=100_000)
    made.write_tree(tmp_path / "v5.1/A", "two", changes={1: {"killed_after": 1}, 3: {"killed_after": 1}})
    made.write_tree(tmp_path / "v5.1/A", "four")[3].unlink()
    code, found = run(published, capsys, tmp_path / "v5.1")
    assert [(one["official"], one["ours"]) for one in found["results"]] == [("refused", "refused")] * 7
    assert code == OK and found["disagreements"] == 0


def test_disagreements_are_printed(tmp_path, capsys):
    """What the official checker does not look at, and what it breaks down on."""
    made.write_tree(tmp_path / "v5.1/A", "clock", changes={1: {"minutes": -5}})
    code, found = run(published, capsys, tmp_path / "v5.1")
    assert (
        code == REFUSED
        and found["results"][0]["disagreement"] == "the official package checker: accepted, ours: refused"
    )
    made.write_tree(tmp_path / "v5.1/A", "text", curve=("0.35",) * 4)
    code, found = run(published, capsys, tmp_path / "v5.1")
    assert code == NOT_CHECKED and "did not run" in found["results"][1]["disagreement"]
    assert published.main([str(tmp_path / "v5.1")]) == NOT_CHECKED
    assert "run_stop is 5.0 min before run_start" in capsys.readouterr().out


def test_verify_changes_nothing(rounds, capsys):
    def files():
        return {path: path.read_bytes() for path in rounds.rglob("*") if path.is_file()}

    before = files()
    code, found = run(verify, capsys, rounds / "training_results_v5.1")
    assert code == OK and len(found["results"]) == 4 and files() == before
    assert {name for one in found["results"] for name in one["official"]} == {"package", "system", "rcp", "summary"}


def test_verify_names_what_the_repository_checker_refuses(tmp_path, capsys):
    made.write_tree(tmp_path / "us")
    code = tmp_path / "us/benchmarks/retinanet"
    code.mkdir(parents=True)
    (code / "a.py").touch()
    (code / "sound.py").symlink_to("a.py")  # relative to the folder, which the official checker takes for broken
    assert verify.main([str(tmp_path)]) == OK
    (code / "broken.py").symlink_to("none.py")
    assert verify.main([str(tmp_path)]) == REFUSED and "broken symbolic links: " in capsys.readouterr().out
    (code / "broken.py").unlink()
    (code / "my file.py").touch()
    assert verify.main([str(tmp_path)]) == REFUSED and "my file.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../../../../../tmp/x", "/tmp/x", "a b", "", None, 5, "x" * 99])
@pytest.mark.parametrize("key", ["submission_division", "submission_benchmark"])
def test_logs_can_not_name_rule_files(tmp_path, capsys, monkeypatch, key, name):
    """The official checker loads the rule file that a log names, and rule files hold code."""
    for path in made.write_tree(tmp_path / "us"):
        found = [json.loads(line.partition(":::MLLOG ")[2]) for line in path.read_text().splitlines()]
        path.write_text(made.text([e | {"value": name} if e["key"] == key else e for e in found]))
    loaded = []
    real = official.RuleFiles.load
    monkeypatch.setattr(official.RuleFiles, "load", lambda file, Loader: loaded.append(file.name) or real(file, Loader))
    assert verify.main([str(tmp_path)]) in (REFUSED, NOT_CHECKED)
    assert all("/compliance_checker/training_5.1.0/" in path and ".." not in path for path in loaded)


@pytest.mark.parametrize("word", ["x", "y.json"])
def test_what_is_no_tree(tmp_path, word):
    (tmp_path / "y.json").touch()
    (tmp_path / "z").mkdir()
    for path in (tmp_path / word, tmp_path / "z"):
        with pytest.raises(UserError, match=r"no such folder|results/"):
            verify.main([str(path)])


def test_compare_of_rounds(rounds, tmp_path, capsys):
    page, table = tmp_path / "c.html", tmp_path / "c.csv"
    words = [rounds / "training_results_v5.1", rounds / "training_results_v3.1", "--out", page, "--csv", table]
    code, found = run(compare, capsys, *words)
    assert code == OK and len(found) == 6
    scaled = next(one for one in found if "scaled" in one["name"])
    assert scaled["score"] == pytest.approx(34.2 * 4.0555555 / 4) and scaled["minutes"] == pytest.approx(34.2)
    # An epoch trains for 0.9 of its quarter of the time.
    assert scaled["images_per_s"] == pytest.approx(1170301 * 4 / (34.2 * 60 * 0.9), rel=1e-3)
    assert scaled["rate_each"] == pytest.approx(scaled["images_per_s"] / 8)
    assert next(one for one in found if one["benchmark"] == "maskrcnn")["epochs"] == 14
    lines = table.read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("result,benchmark,ruleset") and "6.1.0" not in lines[1]
    text = page.read_text()
    assert text.count('class="bar"') == 3 * 6 and "Acme/n12/maskrcnn 3.1.0" in text and "<script" not in text


def test_compare_of_single_logs(tmp_path, capsys):
    made.write_log(tmp_path / "=cmd.txt", minutes=20)
    code, found = run(compare, capsys, tmp_path / "=cmd.txt", "--csv", tmp_path / "c.csv")
    assert code == OK and found[0]["minutes"] == 20 and found[0]["score"] is None
    assert (tmp_path / "c.csv").read_text().splitlines()[1].startswith("'=cmd.txt,retinanet")
    (tmp_path / "none.txt").write_text("hello")
    with pytest.raises(UserError, match="no MLPerf event"):
        compare.main([str(tmp_path / "none.txt")])
