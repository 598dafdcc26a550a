"""tools.compare_losses: the loss curves of two runs beside each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compare_losses import __main__ as losses

ROOT = Path(__file__).parents[2]


def run(*words: str | Path, code: int = 0) -> str:
    """tools.compare_losses as a user calls it; its output."""
    command = [sys.executable, "-m", "tools.compare_losses", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def curve(path: Path, values: dict[int, float]) -> Path:
    lines = [{"kind": "start"}]
    lines += [{"kind": "step", "step": s, "loss": 2 * v, "terms": {"cls": v, "box": v}} for s, v in values.items()]
    path.mkdir()
    (path / "progress.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_within_and_over_the_tolerance(tmp_path, capsys):
    a = curve(tmp_path / "a", {1: 1.0, 2: 0.9, 3: 0.8})
    b = curve(tmp_path / "b", {1: 1.0, 2: 0.909, 3: 0.4, 4: 0.1})
    assert losses.main([str(a), str(b), "--steps", "2"]) == 0
    assert "within the tolerance of 0.02: over 2 steps" in capsys.readouterr().out
    written = tmp_path / "numbers.json"
    assert losses.main([str(a), str(b / "progress.jsonl"), "--json", str(written)]) == 1
    assert "OVER the tolerance of 0.02" in capsys.readouterr().out
    found = json.loads(written.read_text())
    assert found["largest"] == 0.5 and found["at_step"] == 3 and found["steps"] == 3 and not found["within"]


def test_a_loss_that_is_not_finite_in_one_run_is_over_any_tolerance():
    finite, broken = {1: {"loss": 1.0}}, {1: {"loss": float("nan")}}
    assert losses.compare(finite, broken)["largest"] == float("inf")
    assert losses.compare(broken, broken)["largest"] == 0


def test_draws_both_curves(tmp_path):
    a, b = (curve(tmp_path / n, {1: 1.0, 2: 0.9}) for n in "ab")
    losses.main([str(a), str(b), "--figure", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert page.count('class="line') == 2 and "step 2: 1.8 and 1.8" in page


def test_nothing_to_compare(tmp_path):
    a = curve(tmp_path / "a", {1: 1.0})
    b = curve(tmp_path / "b", {2: 1.0})
    assert "no recorded step in common" in run(a, b, code=2)
    assert "progress.jsonl" in run(a, tmp_path / "none", code=2)


@pytest.mark.parametrize(("code", "fails"), [(0, False), (3, False), (1, True)])
def test_a_run_may_miss_the_target(tmp_path, monkeypatch, code, fails):
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


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([], (["--ops", "reference", "--graphs", "off"], ["--ops", "auto", "--graphs", "auto"])),
        (
            ["--b-options", "--variants fp8_heads"],
            (["--ops", "auto", "--graphs", "auto"], ["--ops", "auto", "--graphs", "auto", "--variants", "fp8_heads"]),
        ),
    ],
)
def test_b_may_have_options_of_its_own(tmp_path, monkeypatch, own, expected):
    trained = []

    def train(folder, steps, options, how, apart=0):
        trained.append((folder.name, steps, options, how, apart))
        curve(folder, {1: 1.0, 2: 0.9})

    monkeypatch.setattr(losses, "train", train)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert losses.main([a, b, "--run", "--steps", "2", "--control", c, *own, "--", "--precision", "bf16"]) == 0
    given = ["--precision", "bf16", "--seed", "1"]
    first, second = expected
    assert trained == [("a", 2, given, first, 0), ("b", 2, given, second, 0), ("c", 2, given, first, losses.APART)]


def test_options_of_b_want_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        losses.main([str(tmp_path), str(tmp_path), "--b-options", "--seed 2"])
    assert "--b-options is for --run" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_both_itself(tmp_path):
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
    assert "within the tolerance of 0.001: over 3 steps" in run(*words)
