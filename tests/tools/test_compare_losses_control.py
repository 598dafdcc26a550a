"""tools.compare_losses --control: the tolerance that two runs measure which differ by rounding alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from single_stage_detector import train as program
from tools.compare_losses import __main__ as losses

ROOT = Path(__file__).parents[2]
A = {step: {"loss": 1.0, "cls": 0.5} for step in range(1, 5)}


def beside(*differences: float) -> dict:
    """A's curve with such relative differences of the class loss in its steps."""
    return {step: {"loss": 1.0, "cls": 0.5 * (1 - d)} for step, d in enumerate(differences, 1)}


@pytest.mark.parametrize(
    ("ours", "control", "within"),
    [
        ((0, 1e-6, 1e-4, 1e-3), (0, 1e-6, 1e-4, 1e-3), True),
        ((9e-6, 9e-6, 0, 0), (0, 0, 0, 0), True),  # what single ops may
        ((2e-5, 0, 0, 0), (0, 0, 0, 1), False),  # before the control differs at all
        ((0, 0, 9e-4, 9e-4), (0, 0, 1e-4, 0), True),  # a difference goes on
        ((0, 0, 9e-4, 2e-3), (0, 0, 1e-4, 0), False),
        ((0, 0, 0, float("nan")), (0, 0, 1, 1), False),
    ],
)
def test_each_step_has_its_own_tolerance(ours, control, within):
    found = losses.compare_with_control(A, beside(*ours), beside(*control))
    assert found["within"] is within
    assert found["control"] == pytest.approx(max(control)) and found["steps"] == 4
    assert ("within" if within else "OVER") + " what rounding explains (weights 1e-07 apart" in losses.sentence(found)


def test_later_steps_are_left_out():
    found = losses.compare_with_control(A, beside(0, 0, 0.5, 0.5), beside(0, 0, 0, 0), steps=2)
    assert found["within"] and found["largest"] == 0 and found["steps"] == 2


def test_the_trainer_moves_the_weights_by_a_rounding_and_leaves_the_program_as_it_was(monkeypatch):
    built, seen = torch.nn.Linear(40, 50), []
    before = [p.detach().clone() for p in built.parameters()]
    monkeypatch.setattr(program, "build_model", lambda *given: built)
    original = program.build_model

    def main(options):
        seen.append((options, torch.are_deterministic_algorithms_enabled(), program.build_model("config", 3)))
        return 3

    monkeypatch.setattr(program, "main", main)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert losses.main(["--trainer", "1e-7", "single_stage_detector.train", "--seed", "4"]) == 3
        assert seen == [(["--seed", "4"], True, built)] and program.build_model is original
        for weight, old in zip(built.parameters(), before, strict=True):
            moved = (weight.detach() / old - 1).abs()
            assert 3e-8 < moved.mean() < 2e-7 and moved.max() < 6e-7
        assert losses.main(["--trainer", "0", "single_stage_detector.train"]) == 3
        assert program.build_model is original
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.slow
def test_trains_all_three_and_finds_them_alike(tmp_path):
    options = "--synthetic --device cpu --backbone resnet18 --image-size 64 64 --fpn-channels 16 --head-convs 1"
    words = ["a", "b", "--run", "--steps", "3", "--control", "c", "--json", "numbers.json", "--"]
    command = [sys.executable, ROOT / "tools/compare_losses.py", *words, *options.split()]
    command += ["--num-classes", "3", "--division", "open"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["within"] and found["steps"] == 3 and 0 < found["control"] < 1e-3
