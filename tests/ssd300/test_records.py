"""What the summary says where a setting was left to the program."""

import json

import pytest
import torch

from detcore import backend
from ssd300.config import Config
from ssd300.records import Records


def summary(config: Config, best: float | None) -> list[dict]:
    """Data of the lines of a run that ends after its only evaluation."""
    records = Records(config)
    records("start", {"config": {"seed": 77}})
    records("end", {"time_s": 1.0, "best": best})
    return [json.loads(line.removeprefix("DLLL "))["data"] for line in config.json_summary.read_text().splitlines()]


@pytest.mark.parametrize(("precision", "amp"), [("auto", False), ("bf16", True), ("tf32", False)])
def test_seed_and_precision_are_those_in_use(tmp_path, precision, amp):
    said = summary(Config(json_summary=tmp_path / "s.json", device="cpu", precision=precision), None)[0]
    assert said["seed"] == 77 and said["AMP"] is amp and said["no cuda"] is True


@pytest.mark.parametrize("best", [0.25, -1.0, None])
def test_the_best_is_that_of_the_whole_run(tmp_path, best):
    assert summary(Config(json_summary=tmp_path / "s.json", device="cpu"), best)[-1]["mAP"] == best


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_gpu_computes_in(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert backend.resolve("auto", "auto") == ("cuda", expected)
    assert backend.resolve("cuda", "tf32") == ("cuda", "tf32")
    assert backend.resolve("cpu", "auto") == ("cpu", "fp32")
