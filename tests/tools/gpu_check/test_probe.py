"""The part probe, on a CPU: what is wrong fails, what a library lacks does not."""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from detcore.device import native
from tests.tools.gpu_check.common import context, keep
from tools.gpu_check import cases, floor, jobs, state, steps, table
from tools.gpu_check.benchmarks.single_stage_detector import conv3x3, probe
from tools.gpu_check.benchmarks.ssd300 import steps as ssd

needs_ops = pytest.mark.skipif(bool(native.load("detcore")), reason="the ops are not built")


def test_every_operation_is_measured_and_printed(tmp_path):
    here = context(tmp_path)
    jobs.run_jobs("floor", floor.floor(here), here)
    assert jobs.run_jobs("probe", probe.probe(here), here) == 0
    saved = state.load(tmp_path)
    rows = saved["parts"]["probe"]["rows"]
    left_out = {key for key, row in rows.items() if "skipped" in row}
    assert {key for key in rows if "fused" in key} | {"step: frozen stage"} <= left_out, "cuDNN's own operations"
    assert all("cudnn_convolution" in rows[key]["skipped"] for key in left_out if "fused" in key)
    others = [rows[key]["skipped"] for key in left_out if "fused" not in key]
    assert all("No module named" in reason or "refuses all 4" in reason for reason in others)
    for key in rows.keys() - left_out:
        assert math.isfinite(rows[key]["ms"]), key
        if not key.startswith("step: "):
            assert rows[key]["ms"] > 0 and rows[key]["mb"] > 0
            again = any(f" {way} " in key for way in probe.NOT_TRACED)
            assert again or (rows[key]["kernels"] and not rows[key]["layout"]), key
    judged = {key: row["difference"] for key, row in rows.items() if "difference" in row}
    assert judged.keys() == {key for key in rows if "merged " in key} - {"step: merged groups"}
    assert max(judged.values()) < 1e-4
    assert {
        "layer4 1024x25 fp32 merged weight gradient", "class P7 fp32 no bias gradients", "step: class bias",
        "conv1 of 8 channels fp32 forward", "tower P3 fp32 limit 0 forward", "max-pool fp32 with gradient",
        "product tower P3 e5m2 fast sums", "step: merged groups",
    } <= rows.keys() - left_out  # fmt: skip
    printed = table.table(saved)
    assert max(map(len, printed.splitlines())) <= 100 and "layout: none" in printed
    assert all(key in printed for key in rows.keys() - left_out), "no key is cut"


def test_gflop_by_hand():
    """layer3: 32 images of 50 x 50 cells, 512 outputs, each of 16 inputs and 3 x 3 places, 2 operations each."""
    by_hand = 32 * 50 * 50 * 512 * 16 * 9 * 2 / 1e9
    weight, out = torch.empty(512, 16, 3, 3, device="meta"), torch.empty(32, 512, 50, 50, device="meta")
    assert probe.gflop(weight, out) == pytest.approx(by_hand) == pytest.approx(11.7965, abs=1e-4)


def test_gflop_of_a_measured_row(tmp_path):
    conv = next(conv for conv in probe.GROUPED if conv.name == "layer3 512x50")
    bench = probe.Bench(context(tmp_path))
    row = bench.conv(conv, "weight gradient", "32 groups", "")  # on a CPU 2 images of 2 x 2 cells
    assert row["gflop"] == pytest.approx(2 * 2 * 2 * 512 * 16 * 9 * 2 / 1e9)
    assert row["mb"] == pytest.approx((2 * 2 * 512 * 4 + 512 * 16 * 9) * 4 / 1e6)
    assert row["tflop_s"] == pytest.approx(row["gflop"] / row["ms"])


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_those_of_autograd(stride):
    torch.manual_seed(1)
    conv = probe.Conv("x", 8, 12, 7, stride=stride, groups=4)
    x, weight, bias = torch.randn(2, 8, 7, 7), torch.randn(12, 2, 3, 3), torch.randn(12)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(x, weight, bias, stride, 1, 1, 4)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, inputs, grad)
    tensors = x.detach(), weight.detach(), bias.detach(), grad
    torch.testing.assert_close(probe.convolution(tensors, conv, 4, "forward")(), out.detach())
    torch.testing.assert_close(probe.convolution(tensors, conv, 4, probe.GRADIENTS)(), want)
    without = (*tensors[:2], None, grad)
    got = probe.convolution(without, conv, 4, "weight gradient")()
    assert got[0] is None and got[2] is None
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(probe.convolution(without, conv, 4, "input gradient")()[0], want[0])


@pytest.mark.parametrize("conv", [probe.FROZEN[2], probe.FROZEN[3]], ids=["relu", "add_relu"])
def test_the_fused_operation_is_asked_for_the_same(tmp_path, monkeypatch, conv):
    if missing := native.load("detcore"):
        pytest.skip(missing)

    def fused(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def fused_add(x, weight, z, alpha, *rest):
        return F.relu(F.conv2d(x, weight, *rest) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused_add)
    rows = dict(probe.Bench(context(tmp_path)).followed(conv))
    found = {key: measure() for key, measure in rows.items()}
    assert list(found) == [f"{conv.name} fp32 {way} forward" for way in ("bias_relu", "fused")]
    fused_row = found[f"{conv.name} fp32 fused forward"]
    assert fused_row["difference"] < 1e-5 and "error" not in fused_row


def test_the_heads_by_kernels_of_our_own(tmp_path, monkeypatch):
    def ways(x, weight, grad):
        return {way: lambda: F.conv2d(x, weight, padding=1) for way in probe.HEADS}

    monkeypatch.setattr(conv3x3, "ways", ways)
    rows = {key: measure() for key, measure in probe.Bench(context(tmp_path)).heads()}
    assert len(rows) == 2 * 8 and rows["tower P3 quantise input"]["gflop"] == 0
    assert rows["class P3 8-bit input gradient"]["gflop"] == pytest.approx(2 * 4 * 4 * 1024 * 256 * 9 * 2 / 1e9)


def test_each_number_of_trials_is_tried_afresh(tmp_path, monkeypatch):
    """cuDNN's choices are kept by thread."""
    seen = []

    def look(run, **more):
        cudnn = torch.backends.cudnn
        seen.append((threading.get_ident(), cudnn.benchmark, cudnn.benchmark_limit))
        return {"ms": 1.0}

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    bench = probe.Bench(context(tmp_path))
    monkeypatch.setattr(bench.watch, "time", look)
    for _, measure in bench.convs([(probe.GROUPED[0], "forward")], ("merged", *probe.TRIALS)):
        measure()
    assert [kind[1:] for kind in seen] == [(True, 10), (False, 10), (True, 10), (True, 0)]
    assert seen[0][0] == threading.get_ident() not in {thread for thread, *_ in seen[1:]}
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit) == before


def test_what_a_library_does_not_offer_is_left_out_and_the_rest_is_said():
    def fails(error):
        raise error

    with pytest.raises(state.Skip, match=r"not offered here: RuntimeError: no engine$"):
        probe.attempt(lambda: fails(RuntimeError("no engine. And more")))
    for error in (RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("of 2 GiB")):
        with pytest.raises(type(error), match=str(error)):
            probe.attempt(lambda error=error: fails(error))
    with pytest.raises(TypeError):
        probe.attempt(lambda: fails(TypeError("an argument too many")))


def test_bytes_are_told_where_they_limit(tmp_path):
    keep(tmp_path, "floor", {"copy": {"gb_s": 2000.0}, "bf16": {"tflop_s": 700.0}})
    bench = probe.Bench(context(tmp_path, gpu=True))
    narrow, wide = bench.worth(1.0, 7.0, 1000.0, "bf16"), bench.worth(1.0, 350.0, 100.0, "bf16")
    assert narrow["gb_s"] == 1000 and narrow["floor_ms"] == 0.5 and narrow["percent_of_matmul"] == pytest.approx(1)
    assert "gb_s" not in wide and wide["floor_ms"] == 0.5 and wide["percent_of_matmul"] == pytest.approx(50)


def test_what_a_step_wins_stands_beside_the_prediction(tmp_path):
    bench = probe.Bench(context(tmp_path, gpu=True))
    wanted = [(probe.GROUPED[0], "forward"), (probe.GROUPED[3], "weight gradient")]
    key, add = bench.step("merged groups", wanted, ("32 groups", "merged"), "merged_groups")
    rows = {bench.key(*wanted[0], "32 groups"): 0.5, bench.key(*wanted[0], "merged"): 0.3,
            bench.key(*wanted[1], "32 groups"): 2.0}  # fmt: skip
    keep(tmp_path, "probe", {name: {"ms": ms} for name, ms in rows.items()})
    with pytest.raises(state.Skip, match=r"1 of its rows are missing, the first: layer2\.0 256x200 bf16 merged weight"):
        add()
    keep(tmp_path, "probe", {bench.key(*wanted[1], "merged"): {"ms": 1.5}})
    assert key == "step: merged groups" and add()["ms"] == pytest.approx(3 * 0.2 + 0.5)
    assert add()["predicted_ms"] == (3.0, 5.0)


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
    todo = list(bench.followed(probe.FROZEN[0]))
    jobs.run_jobs("probe", todo, bench.context)
    row = state.load(tmp_path)["parts"]["probe"]["rows"][todo[1][0]]
    assert error in row["error"] if error else row["skipped"] == "not offered here: RuntimeError: no engine"

    def broken(*given):
        raise RuntimeError("ours")

    monkeypatch.setattr(probe, "bias_relu", broken)
    with pytest.raises(RuntimeError, match="ours"):
        todo[1][1]()


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

    monkeypatch.setattr(conv3x3, "ways", lambda *tensors: dict.fromkeys(probe.HEADS, fails))
    bench = probe.Bench(context(tmp_path))
    with pytest.raises(RuntimeError, match="no engine"):
        bench.head(probe.TOWER[0], probe.HEADS[0])
    monkeypatch.setattr(native, "_no_fp8", lambda device: "no 8 bits")
    with pytest.raises(state.Skip, match="no 8 bits"):
        bench.head(probe.TOWER[0], probe.HEADS[0])


def test_rows_that_decide_nothing_are_left_for_want_of_time(tmp_path):
    here = context(tmp_path)
    todo = [(str(i), lambda: {"ms": 1.0}) for i in range(3)]
    assert jobs.run_jobs("probe", probe.optional(todo, here), here) == 0
    assert state.load(tmp_path)["parts"]["probe"]["rows"].keys() == {"0", "1", "2"}
    short = replace(here, out=tmp_path / "short", budget=probe.OPTIONAL_SECONDS / 2, began=time.monotonic())
    short.out.mkdir()
    keep(short.out, "probe", {"before": {"ms": 1.0}})
    assert jobs.run_jobs("probe", probe.optional(todo, short), short) == 0
    part = state.load(short.out)["parts"]["probe"]
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
    with pytest.raises(state.Skip, match="1 of its rows are missing"):
        add()
    keep(tmp_path, "probe", {key: {"skipped": f"{probe.REFUSED}: no engine"} for key in fast})
    with pytest.raises(state.Skip, match="refuses all 4"):
        add()


def test_a_value_that_is_no_number_is_no_small_difference():
    some = torch.tensor([1.0, -math.inf])
    assert cases.difference(some, some) == 0 and cases.difference(torch.tensor([math.nan, -math.inf]), some) == math.inf


def test_ssd300_has_a_row_with_variants_beside_its_main_one(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(ssd, "train_row", lambda config, *rest: measured.append((config, *rest)) or {"ms": 1.0})
    todo = list(ssd.ssd300(context(tmp_path)))
    keys = [key for key, _ in todo]
    assert keys[1] == f"{keys[0]} +all but fp8_heads" and "+" not in "".join(keys[2:])
    for _, measure in todo[:2]:
        measure()
    (main, *_), (varied, *_) = measured
    assert main.variants == () and varied.variants == steps.NARROW
    assert replace(varied, variants=()) == main
