"""The public runs to compare with, against the numbers they were taken from, and where a run counts as far off."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from single_stage_detector import convergence
from single_stage_detector.config import Config
from single_stage_detector.train import far_from_public_runs

GOLDEN = Path(__file__).parents[2].parent / "shared" / "spec" / "golden.json"


def test_the_table_is_the_published_one():
    if not GOLDEN.is_file():
        pytest.skip("no golden values beside this checkout")
    golden = json.loads(GOLDEN.read_text())["retinanet"]["convergence_envelope"]["settings"]
    assert len(golden) == len(convergence.settings())
    for theirs in golden:
        for after in theirs["map_after_epoch"]:
            setting = theirs["global_batch_size"], theirs["learning_rate"], theirs["warmup_epochs"]
            found = convergence.public(*setting, after["epoch"])
            assert found.same and found.runs == after["n"]
            assert (found.mean, found.sd) == pytest.approx((after["mean"], after["sd"]))
            assert (found.lowest, found.highest) == (after["min"], after["max"])


def test_a_usual_run_and_ones_that_are_far_off():
    assert convergence.far_off(256, 8.5e-5, 0, 1, 0.2402) == ""
    edge = 4 * 0.0046
    assert convergence.far_off(256, 8.5e-5, 0, 1, 0.2402 - 0.99 * edge) == ""
    words = convergence.far_off(256, 8.5e-5, 0, 1, 0.198)
    usual = "in 495 public runs of this batch size, learning rate and warm-up: far below what is usual"
    assert words == f"mAP 0.198 after epoch 1, 0.217 to 0.252 {usual}"
    assert "far above" in convergence.far_off(256, 8.5e-5, 0, 1, 0.2402 + 1.01 * edge)
    assert "far below" in convergence.far_off(256, 8.5e-5, 0, 2, math.nan)


def test_runs_of_the_batch_size_alone():
    """Their mean and spread are those of all runs together."""
    found = convergence.public(256, 7e-5, 0, 1)
    rows = [after for row in convergence.settings() if row["global_batch_size"] == 256 for after in row["map"][:1]]
    sample = [value for _, n, mean, sd, *_ in rows for value in [mean - sd, mean + sd] * n]
    assert not found.same and found.runs == sum(row[1] for row in rows) == 695
    mean = sum(sample) / len(sample)
    assert found.mean == pytest.approx(mean)
    assert found.sd == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in sample) / len(sample)))
    assert (found.lowest, found.highest) == (min(row[4] for row in rows), max(row[5] for row in rows))
    assert convergence.public(256, None, None, 1) == found
    assert "of this batch size: " in convergence.far_off(256, None, None, 1, 0.1)


def test_nothing_to_compare_with():
    assert convergence.public(8, 1e-3, 0, 1) is None and convergence.public(256, 8.5e-5, 0, 9) is None
    assert convergence.far_off(8, 1e-3, 0, 1, 0.0) == "" and convergence.far_off(256, 8.5e-5, 0, 0, 0.0) == ""


def test_the_program_warns_of_a_benchmark_run_that_is_far_off():
    """Only of the MLPerf benchmark itself; a fixed seed does not matter."""
    setting = next(row for row in convergence.settings() if row["map"][0][0] == 1)
    rate, warmup, (_, _, mean, *_) = setting["learning_rate"], setting["warmup_epochs"], setting["map"][0]
    config = Config(batch_size=setting["global_batch_size"] // 4, lr=rate, warmup_epochs=warmup, seed=3)
    assert far_from_public_runs(config, 4, 1, mean) is None
    assert re.match(r"warning: mAP 0\.010 after epoch 1, .* far below", far_from_public_runs(config, 4, 1, 0.01))
    own = replace(config, dataset="custom")
    assert far_from_public_runs(own, 4, 1, 0.01) is None
