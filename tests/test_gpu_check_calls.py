"""The part probe of tools/gpu_check.py, on a CPU: what is wrong fails, what a library lacks does not."""

import math
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from detcore.device import native
from tests.test_gpu_check_probe import context, core, keep, ops, probe, ssd, table, train

needs_ops = pytest.mark.skipif(bool(native.load("detcore")), reason="the ops are not built")


@needs_ops
@pytest.mark.parametrize(
    ("off", "error"), [(0.1, "differs by"), (math.nan, "not finite"), (None, "")], ids=["wrong", "NaN", "refused"]
)
def test_a_fused_operation_that_is_wrong_fails_and_ours_is_no_library(tmp_path, monkeypatch, off, error):
    def fused(x, weight, bias, *place):
        if off is None:
            raise RuntimeError("no engine")
        out = F.relu(F.conv2d(x, weight, bias, *place))
        out[-1, -1, -1, -1] += off * out.max()
        return out

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    bench = probe.Bench(context(tmp_path))
    jobs = list(bench.followed(probe.FROZEN[0]))
    core.run_jobs("probe", jobs, bench.context)
    row = core.load(tmp_path)["parts"]["probe"]["rows"][jobs[1][0]]
    assert error in row["error"] if error else row["skipped"] == "not offered here: RuntimeError: no engine"

    def broken(*given):
        raise RuntimeError("ours")

    monkeypatch.setattr(probe, "bias_relu", broken)
    with pytest.raises(RuntimeError, match="ours"):
        jobs[1][1]()


@needs_ops
def test_freed_memory_is_not_a_number_before_a_fused_operation(tmp_path, monkeypatch):
    """A GPU's allocator gives it out again; here it is only seen that it was asked for, after the trials."""
    asked, fill = [], torch.full_like

    def fused(x, weight, bias, *place):
        asked.append("fused")
        return F.relu(F.conv2d(x, weight, bias, *place))

    monkeypatch.setattr(torch, "full_like", lambda t, value: asked.append(value) or fill(t, value))
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    probe.Bench(context(tmp_path)).epilogue(probe.FROZEN[0], True)
    assert asked[0] == asked[4] == "fused" and all(math.isnan(value) for value in asked[1:4])


@pytest.mark.parametrize("direction", ["forward", *probe.BOTH])
def test_merged_groups_that_compute_something_else_fail(tmp_path, monkeypatch, direction):
    bench = probe.Bench(context(tmp_path))
    assert "error" not in bench.conv(probe.GROUPED[0], direction, "merged", "")

    right = probe.narrowed

    def wrong(*given):
        return tree_map(lambda t: t if t is None else t * 1.1, right(*given))

    monkeypatch.setattr(probe, "narrowed", wrong)
    found = bench.conv(probe.GROUPED[0], direction, "merged", "")
    assert found["difference"] == pytest.approx(0.1, rel=0.01) and "differs by 0.1 " in found["error"]


def test_our_own_kernels_must_run(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no engine")

    monkeypatch.setattr(probe, "ways", lambda *tensors: dict.fromkeys(probe.HEADS, fails))
    bench = probe.Bench(context(tmp_path))
    with pytest.raises(RuntimeError, match="no engine"):
        bench.head(probe.TOWER[0], probe.HEADS[0])
    monkeypatch.setattr(native, "_no_fp8", lambda device: "no 8 bits")
    with pytest.raises(core.Skip, match="no 8 bits"):
        bench.head(probe.TOWER[0], probe.HEADS[0])


def test_rows_that_decide_nothing_are_left_for_want_of_time(tmp_path):
    here = context(tmp_path)
    jobs = [(str(i), lambda: {"ms": 1.0}) for i in range(3)]
    assert core.run_jobs("probe", probe.optional(jobs, here), here) == 0
    assert core.load(tmp_path)["parts"]["probe"]["rows"].keys() == {"0", "1", "2"}
    short = replace(here, out=tmp_path / "short", budget=probe.OPTIONAL_SECONDS / 2, began=time.monotonic())
    short.out.mkdir()
    keep(short.out, "probe", {"before": {"ms": 1.0}})
    assert core.run_jobs("probe", probe.optional(jobs, short), short) == 0
    part = core.load(short.out)["parts"]["probe"]
    assert part["rows"]["optional rows"]["skipped"].startswith("no time for 3 rows") and part["status"] == "passed"


def test_what_the_library_refuses_wins_nothing_and_is_counted(tmp_path):
    bench = probe.Bench(context(tmp_path, gpu=True))
    wanted = [(conv, "forward") for conv in probe.FROZEN]
    key, add = bench.step("frozen stage", wanted, ("bias_relu", "fused"), "frozen_stage")
    slow, fast = ([bench.key(conv, "forward", way) for conv in probe.FROZEN] for way in ("bias_relu", "fused"))
    keep(tmp_path, "probe", {key: {"ms": 2.0} for key in slow} | {key: {"ms": 1.5} for key in fast})
    keep(tmp_path, "probe", {fast[1]: {"skipped": f"{probe.REFUSED}: RuntimeError: no engine"}})
    row = add()
    assert row == {"ms": 0.5 * (1 + 3 + 3), "predicted_ms": (2.6, 2.6), "refused": 1, "pairs": 4}
    assert "; refused: 1 of 4" in table.table({"parts": {"probe": {"rows": {key: row}}}})
    keep(tmp_path, "probe", {fast[0]: {"ms": 1.0, "error": "differs"}})
    with pytest.raises(core.Skip, match="1 of its rows are missing"):
        add()
    keep(tmp_path, "probe", {key: {"skipped": f"{probe.REFUSED}: no engine"} for key in fast})
    with pytest.raises(core.Skip, match="refuses all 4"):
        add()


def test_a_value_that_is_no_number_is_no_small_difference():
    some = torch.tensor([1.0, -math.inf])
    assert ops.difference(some, some) == 0 and ops.difference(torch.tensor([math.nan, -math.inf]), some) == math.inf


def test_ssd300_has_a_row_with_variants_beside_its_main_one(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(ssd, "train_row", lambda config, *rest: measured.append((config, *rest)) or {"ms": 1.0})
    jobs = list(ssd.ssd300(context(tmp_path)))
    keys = [key for key, _ in jobs]
    assert keys[1] == f"{keys[0]} +all but fp8_heads" and "+" not in "".join(keys[2:])
    for _, measure in jobs[:2]:
        measure()
    (main, *_), (varied, *_) = measured
    assert main.variants == () and varied.variants == train.NARROW
    assert replace(varied, variants=()) == main
