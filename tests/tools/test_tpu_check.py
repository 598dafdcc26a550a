"""What tools.tpu_check makes of the runs that it compares; the runs themselves are tests/test_tpu.py's."""

import pytest

from tools import tpu_check


def seen(**changes) -> dict:
    return {
        "device": "TPU", "torch": "2.14.1", "losses": [17.0, 16.0, 15.0], "seconds": [9.0, 0.5, 0.4],
        "compiled": [2, 3, 3], "statistics": ["torch.float32", [0.5, 1.0], [2.0, 3.0]],
        "loss_dtype": ["torch.float32"], "refused": "the shape changed", "checkpoint": True, "on_the_host": [],
        "scores": [0.9, 0.8],
    } | changes  # fmt: skip


def bad(precision="fp32", **changes) -> list[str]:
    return [what for what, _, right in tpu_check.compare(precision, seen(**changes), seen()) if not right]


def test_equal_runs_are_right():
    assert bad() == bad("bf16") == bad(compiled=[None] * 3) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"losses": [17.01, 16.0, 15.0]}, "loss of step 1"),
        ({"losses": [17.0, 16.0, 15.5]}, "losses of 3 steps"),
        ({"losses": [17.0, 16.0, float("nan")]}, "losses of 3 steps"),
        ({"loss_dtype": ["torch.bfloat16"]}, "loss, type"),
        ({"statistics": ["torch.bfloat16", [0.5, 1.0], [2.0, 3.0]]}, "running statistics, type"),
        ({"statistics": ["torch.float32", [0.5, 1.1], [2.0, 3.0]]}, "running statistics (at most"),
        ({"scores": [0.9, 0.7]}, "best scores, evaluation"),
        ({"refused": ""}, "a batch of another shape"),
        ({"checkpoint": False}, "checkpoint"),
        ({"compiled": [2, 3, 4]}, "programs compiled"),
        ({"on_the_host": ["aten::nonzero"]}, "operations left to the CPU"),
    ],
)
def test_each_difference_is_found(changes, words):
    (found,) = bad(**changes)
    assert found.startswith(words)


def test_report_and_exit_code(monkeypatch, tmp_path, capsys):
    def steps(kind, python, device, precision, *more):
        return seen(losses=[17.0, 16.0, 14.0 if (device, precision) == ("tpu", wrong) else 15.0])

    monkeypatch.setattr(tpu_check, "steps", steps)
    words = ["--python", "xla=a", "--python", "tpu=b", "--json", str(tmp_path / "report.json")]
    wrong = ""
    assert tpu_check.main(words) == 0
    assert capsys.readouterr().out.count("4 steps of 2 micro-batches") == 1
    wrong = "bf16"
    assert tpu_check.main([*words, "--only", "tpu"]) == 1
    said = capsys.readouterr().out
    assert "BAD losses of 3 steps" in said and "NOT as it must be" in said
    assert (tmp_path / "report.json").is_file()
