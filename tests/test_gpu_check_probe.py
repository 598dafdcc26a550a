"""What tools/gpu_check.py measures of steps and operations, on a CPU: parts probe and train, kernels by family."""

import gc
import importlib
import math
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from detcore.device import native
from detcore.training import engine

TOOLS = str(Path(__file__).parents[1] / "tools")
sys.path.insert(0, TOOLS)
try:
    core, infer, ops, probe, profiles, ssd, table, train = (
        importlib.import_module(f"gpu_check_{name}")
        for name in ("core", "infer", "ops", "probe", "profile", "ssd", "table", "train")
    )
finally:
    sys.path.remove(TOOLS)


@pytest.fixture(autouse=True)
def as_it_was():
    """What steps and parts set for their process is put back."""
    with native.using("auto"):
        yield
    gc.unfreeze()


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU part is that of a machine without a GPU")


def context(out: Path, gpu: bool = False) -> core.Context:
    return core.Context(out, gpu, not gpu, None, 300.0, time.monotonic())


def keep(out: Path, part: str, rows: dict) -> None:
    """Leaves rows of a part in the JSON of a folder."""
    state = core.load(out)
    state["parts"].setdefault(part, {}).setdefault("rows", {}).update(rows)
    core.save(out, state)


class TestProbe:
    def test_every_operation_is_measured_and_printed(self, tmp_path):
        here = context(tmp_path)
        core.run_jobs("floor", ops.floor(here), here)
        assert core.run_jobs("probe", probe.probe(here), here) == 0
        state = core.load(tmp_path)
        rows = state["parts"]["probe"]["rows"]
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
        printed = table.table(state)
        assert max(map(len, printed.splitlines())) <= 100 and "layout: none" in printed
        assert all(key in printed for key in rows.keys() - left_out), "no key is cut"

    def test_gflop_by_hand(self):
        """layer3: 32 images of 50 x 50 cells, 512 outputs, each of 16 inputs and 3 x 3 places, 2 operations each."""
        by_hand = 32 * 50 * 50 * 512 * 16 * 9 * 2 / 1e9
        weight, out = torch.empty(512, 16, 3, 3, device="meta"), torch.empty(32, 512, 50, 50, device="meta")
        assert probe.gflop(weight, out) == pytest.approx(by_hand) == pytest.approx(11.7965, abs=1e-4)

    def test_gflop_of_a_measured_row(self, tmp_path):
        conv = next(conv for conv in probe.GROUPED if conv.name == "layer3 512x50")
        bench = probe.Bench(context(tmp_path))
        row = bench.conv(conv, "weight gradient", "32 groups", "")  # on a CPU 2 images of 2 x 2 cells
        assert row["gflop"] == pytest.approx(2 * 2 * 2 * 512 * 16 * 9 * 2 / 1e9)
        assert row["mb"] == pytest.approx((2 * 2 * 512 * 4 + 512 * 16 * 9) * 4 / 1e6)
        assert row["tflop_s"] == pytest.approx(row["gflop"] / row["ms"])

    @pytest.mark.parametrize("stride", [1, 2])
    def test_gradients_are_those_of_autograd(self, stride):
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
    def test_the_fused_operation_is_asked_for_the_same(self, tmp_path, monkeypatch, conv):
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

    def test_the_heads_by_kernels_of_our_own(self, tmp_path, monkeypatch):
        def ways(x, weight, grad):
            return {way: lambda: F.conv2d(x, weight, padding=1) for way in probe.HEADS}

        monkeypatch.setitem(sys.modules, "gpu_check_conv3x3", SimpleNamespace(ways=ways))
        rows = {key: measure() for key, measure in probe.Bench(context(tmp_path)).heads()}
        assert len(rows) == 2 * 8 and rows["tower P3 quantise input"]["gflop"] == 0
        assert rows["class P3 8-bit input gradient"]["gflop"] == pytest.approx(2 * 4 * 4 * 1024 * 256 * 9 * 2 / 1e9)

    def test_each_number_of_trials_is_tried_afresh(self, tmp_path, monkeypatch):
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

    def test_what_a_library_does_not_offer_is_left_out_and_the_rest_is_said(self):
        def fails(error):
            raise error

        with pytest.raises(core.Skip, match=r"not offered here: RuntimeError: no engine$"):
            probe.attempt(lambda: fails(RuntimeError("no engine. And more")))
        for error in (RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("of 2 GiB")):
            with pytest.raises(type(error), match=str(error)):
                probe.attempt(lambda error=error: fails(error))
        with pytest.raises(TypeError):
            probe.attempt(lambda: fails(TypeError("an argument too many")))

    def test_bytes_are_told_where_they_limit(self, tmp_path):
        keep(tmp_path, "floor", {"copy": {"gb_s": 2000.0}, "bf16": {"tflop_s": 700.0}})
        bench = probe.Bench(context(tmp_path, gpu=True))
        narrow, wide = bench.worth(1.0, 7.0, 1000.0, "bf16"), bench.worth(1.0, 350.0, 100.0, "bf16")
        assert narrow["gb_s"] == 1000 and narrow["floor_ms"] == 0.5 and narrow["percent_of_matmul"] == pytest.approx(1)
        assert "gb_s" not in wide and wide["floor_ms"] == 0.5 and wide["percent_of_matmul"] == pytest.approx(50)

    def test_what_a_step_wins_stands_beside_the_prediction(self, tmp_path):
        bench = probe.Bench(context(tmp_path, gpu=True))
        wanted = [(probe.GROUPED[0], "forward"), (probe.GROUPED[3], "weight gradient")]
        key, add = bench.step("merged groups", wanted, ("32 groups", "merged"), "merged_groups")
        rows = {bench.key(*wanted[0], "32 groups"): 0.5, bench.key(*wanted[0], "merged"): 0.3,
                bench.key(*wanted[1], "32 groups"): 2.0}  # fmt: skip
        keep(tmp_path, "probe", {name: {"ms": ms} for name, ms in rows.items()})
        with pytest.raises(
            core.Skip, match=r"1 of its rows are missing, the first: layer2\.0 256x200 bf16 merged weight"
        ):
            add()
        keep(tmp_path, "probe", {bench.key(*wanted[1], "merged"): {"ms": 1.5}})
        assert key == "step: merged groups" and add()["ms"] == pytest.approx(3 * 0.2 + 0.5)
        assert add()["predicted_ms"] == (3.0, 5.0)


class TestTrain:
    def test_keys_are_told_apart_and_the_main_row_is_the_first(self, tmp_path):
        here = context(tmp_path, gpu=True)
        keys = [key for key, _ in train.train(here)]
        assert next(iter(ssd.ssd300(here)))[0] == "training bf16 b128 graph native"
        assert len(keys) == len(set(keys)) and keys[:2] == ["bf16 b32 graph native", "bf16 b32 compiled+graph native"]
        assert {f"bf16 b32 graph native +{name}" for name in native.VARIANTS} <= set(keys)
        assert {"bf16 b32 graph native +all but fp8_heads", "bf16 b32 graph native +all",
                "bf16 b32 graph native cudnn_benchmark_limit 0"} <= set(keys)  # fmt: skip

    def test_a_short_part_compiles_last(self, tmp_path):
        keys = [key for key, _ in train.train(context(tmp_path, gpu=True))]
        short = [key for key, _ in train.train(replace(context(tmp_path, gpu=True), budget=60.0))]
        assert short[0] == keys[0] and sorted(short) == sorted(keys)
        assert all("compiled" in key for key in short[-3:]) and "compiled" not in short[1]

    def test_every_variant_has_a_prediction_in_one_place(self, tmp_path):
        here = context(tmp_path, gpu=True)
        assert native.VARIANTS.keys() == train.PREDICTED_GAIN_MS.keys() - {"cudnn_benchmark_limit"}
        case = train.CASES[0]

        def predicted(*names, **more):
            return train.predicted_gain(replace(case, variants=names, **more), here)

        assert predicted("merged_groups") == (3.0, 5.0) and predicted() == (0, 0) and predicted(limit=0) == (0.0, 4.0)
        assert predicted("frozen_stage") == (2.6, 2.6), "alone it has its own"
        assert predicted("frozen_stage", "conv_epilogues") == predicted("conv_epilogues") == (2.9, 2.9)
        assert predicted(*train.NARROW) == pytest.approx((11.2, 15.9))
        assert predicted(*native.VARIANTS) == pytest.approx((10.2, 25.9))
        assert predicted("merged_groups", times=2) is None, "they are of 32 images"

    def test_the_documents_predict_the_same(self):
        text = (Path(TOOLS).parent / "single_stage_detector/README.md").read_text(encoding="utf-8")
        told = dict(re.findall(r"^\| `(\w+)` \| .* \| ([-\d. to]+) \|$", text, re.MULTILINE))
        limit = re.search(r"`--cudnn-benchmark-limit 0` .*: ([-\d. to]+) ms", text)
        predicted = {name: table.between(limits) for name, limits in train.PREDICTED_GAIN_MS.items()}
        assert told | {"cudnn_benchmark_limit": limit[1]} == predicted

    @pytest.mark.parametrize(
        ("off", "names", "precision", "fails"),
        [
            ((0.0, 0.0), ("stem",), "bf16", ""), ((0.007, 0.03), ("stem",), "bf16", ""),
            ((0.009, 0.0), ("stem",), "bf16", "loss 1.009 differs by 0.009"),
            ((0.0, 0.04), ("stem",), "bf16", "later_loss 1.04 differs by 0.04"),
            ((0.04, 0.04), ("stem", "fp8_heads"), "bf16", ""),
            ((0.0, 0.06), ("fp8_heads",), "bf16", "later_loss 1.06 differs by 0.06"),
            ((2e-4, 0.0), ("stem",), "fp32", "loss 1.0002 differs by 0.0002"),
        ],
    )  # fmt: skip
    def test_losses_that_rounding_does_not_explain_fail_a_row(
        self, tmp_path, monkeypatch, off, names, precision, fails
    ):
        here = context(tmp_path, gpu=True)
        main = replace(train.CASES[0], precision=precision)
        monkeypatch.setattr(train, "cases", lambda context: (main,))
        keep(tmp_path, "train", {main.key(here): {"ms": 100.0, "loss": 1.0, "later_loss": 1.0}})
        row = {"ms": 97.0, "loss": 1 + off[0], "later_loss": 1 + off[1]}
        monkeypatch.setattr(train, "train_row", lambda *arguments: dict(row))
        found = train.case_row(replace(main, variants=names, what="+"), here, None)
        assert found["ms"] == 97 and found.get("error", "").startswith(fails) and bool(fails) == ("error" in found)

    @no_gpu
    def test_a_loss_that_is_not_finite_fails_its_row(self, tmp_path, monkeypatch):
        here = context(tmp_path)
        monkeypatch.setattr(train.TrainStep, "losses", lambda self: (2.0, math.nan))
        core.run_jobs("train", [next(iter(train.train(here)))], here)
        part = core.load(tmp_path)["parts"]["train"]
        (row,) = part["rows"].values()
        assert part["status"] == "failed" and row["error"] == "a loss is not finite: 2.0, after 5 updates nan"

    def test_a_variant_that_computes_something_else_is_seen(self, tmp_path):
        here = context(tmp_path, gpu=True)
        row = {"ms": 97.0, "loss": 2.02, "later_loss": 1.0}
        assert train.beside_main(row, train.CASES[3], here) == {}, "the main row is not there"
        keep(tmp_path, "train", {"bf16 b32 graph native": {"ms": 100.0, "loss": 2.0, "later_loss": "nan"}})
        found = train.beside_main(row, train.CASES[3], here)
        assert found == {"gain_ms": 3.0, "loss_difference": pytest.approx(0.01)}
        assert train.beside_main(row, train.CASES[0], here) == {}
        assert train.beside_main(row, replace(train.CASES[3], precision="fp16"), here) == {}

    @no_gpu
    def test_a_row_with_its_kernels_and_a_variant_beside_it(self, tmp_path):
        here = context(tmp_path)
        main, _, variant = jobs = list(train.train(here))
        core.run_jobs("train", (jobs[0], jobs[2]), here)
        state = core.load(tmp_path)
        rows = state["parts"]["train"]["rows"]
        kernels = rows[main[0]]["profile"]
        assert kernels["layout"] == {} and kernels["families"]["convolution/gemm"]["ms"] > 0
        assert len(kernels["next"]) == 3 and kernels["ms"] == pytest.approx(
            sum(f["ms"] for f in kernels["families"].values())
        )
        row = rows[variant[0]]
        assert row["later_loss"] < 0.95 * row["loss"], "five updates must show"
        assert max(row["loss_difference"], row["later_loss_difference"]) < 1e-3
        assert row["variants"] == list(train.NARROW) and row["predicted_gain_ms"] is None
        printed = table.table(state)
        assert max(map(len, printed.splitlines())) <= 100 and "kept only if confirmed" in printed
        assert f"kernels of a step, {main[0]}" in printed and "layout: none" in printed

    @no_gpu
    def test_a_row_in_a_process_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(TOOLS)
        here = context(tmp_path)
        config = train.retinanet(here, 1, "fp32", "eager", "reference", cudnn_benchmark_limit=0)
        row = train.apart(config, "eager", here, core.Stopwatch(here), 1.0, False)
        assert row["images_per_s"] > 0 and row["ops"] == "reference"


@no_gpu
def test_inference_runs_no_training_step(tmp_path, monkeypatch):
    """On a GPU its warm-up would try cuDNN's algorithms for every gradient, for nothing."""
    here = context(tmp_path)
    monkeypatch.setattr(engine, "make_train_step", lambda *arguments: pytest.fail("a step is made"))
    jobs = dict(infer.inference(here))
    for key in ("forward fp32 b2 eager native", "forward+postprocess fp32 b2 eager reference"):
        assert jobs[key]()["images_per_s"] > 0
    inference = next(job for job in ssd.ssd300(here) if job[0].startswith("inference"))
    assert inference[1]()["images_per_s"] > 0
    with pytest.raises(pytest.fail.Exception, match="a step is made"):
        jobs["evaluation pause fp32 b2 eager native"]()


def test_kernels_find_their_families():
    copy = "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}"
    names = {
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolution/gemm",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "convolution/gemm",
        "void cutlass::Kernel<cutlass::gemm::Gemm<cutlass::layout::NoPermute, TransposedOperand>>": "convolution/gemm",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>": "layout",
        "void cudnn::ops::nhwcToNchwKernel<__half, __half, float, true, false>": "layout",
        "void cudnn::ops::nchwAddPaddingKernel<float, float, float>": "layout",
        "void cudnn::engines_precompiled::nhwcToFoldedNhwcKernel<__nv_bfloat16>": "layout",
        "transpose_readWrite_alignment_kernel<float2>": "layout",
        "void permutationKernelPLC3<float>": "layout",
        f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{copy}>>": "layout",
        f"void at::native::vectorized_elementwise_kernel<4, {copy}>": "memcpy",
        f"void at::native::unrolled_elementwise_kernel<{copy}, std::array<char*, 2ul>>": "memcpy",
        "triton_poi_fused_convolution_permute_transpose_kernel_3": "convolution/gemm",
        "aten::transpose": "other",
        "void detcore::focal_kernel<c10::BFloat16>(c10::BFloat16 const*, long)": "loss",
        "void detcore::(anonymous namespace)::highest_kernel(float const*, long*)": "matching",
        "void detcore::bias_relu_kernel<c10::BFloat16>(int)": "batchnorm/elementwise",
        "void detcore::pool_bias_relu_kernel<c10::BFloat16>(int)": "batchnorm/elementwise",
        "void detcore::nms_kernel(float const*)": "other",
        "weight_gradient_kernel": "convolution/gemm",
        "narrow_kernel": "quantise",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "nccl",
        "Memcpy DtoD (Device -> Device)": "memcpy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "batchnorm/elementwise",
        "something_else": "other",
    }
    assert {name: profiles.family(name) for name in names} == names


def test_the_next_three_things_are_those_furthest_above_their_floor():
    rows = {
        "convolution/gemm": {"ms": 60.0, "share": 0.6, "floor_ms": 50.0},
        "loss": {"ms": 30.0, "share": 0.3, "floor_ms": 2.0},
        "memcpy": {"ms": 9.0, "share": 0.09, "floor_ms": 0.0},
        "other": {"ms": 1.0, "share": 0.01, "floor_ms": None},
    }
    assert [words.partition(":")[0] for words in profiles.next_things(rows)] == ["loss", "convolution/gemm", "memcpy"]


def test_annotations_are_not_counted_beside_what_they_span():
    def run():
        with torch.profiler.record_function("Optimizer.step#Adam.step"):
            return torch.ones(1000) + 1

    found = profiles.traced(run, False, times=2)
    assert "aten::add" in found and "Optimizer.step#Adam.step" not in found
    assert found["aten::add"][0] > 0 and found["aten::add"][1] == 1


def test_the_table_prints_variants_and_layout_kernels():
    times = {"ms": 12345.67, "p10_ms": 123.456, "p90_ms": 123.456, "images_per_s": 12345.6, "images_per_s_p10": 1.0,
             "images_per_s_p90": 1.0}  # fmt: skip
    families = {"layout": {"ms": 12.345, "share": 0.1, "floor_ms": 0.0}}
    name = "void cudnn::ops::nchwToNhwcKernel<" + "__half, " * 15 + ">"
    kernels = {"ms": 100.0, "families": families, "layout": {name: 12.345}, "next": ["a"]}
    beside = {"gain_ms": -1234.56, "loss_difference": 1e-10, "later_loss_difference": 12.0, "variants": []}
    rows = {
        "bf16 b32 graph native": times | {"profile": kernels},
        "bf16 b32 graph native cudnn_benchmark_limit 0": times | beside | {"predicted_gain_ms": [0.0, 4.0]},
        "bf16 b32 graph native +fp8_heads": times | beside | {"predicted_gain_ms": None},
        "bf16 b32 graph native +all": times | beside | {"predicted_gain_ms": [14.7, 33.35]},
        "bf16 b32 eager reference": times | {"profile": {"error": "the profiler recorded no kernel"}},
    }
    operation = times | {"tflop_s": 1234.5, "percent_of_matmul": 123.4, "gb_s": 4321.0, "first_s": 12.34}
    single = {
        "layer2.0 256x200 bf16 32 groups weight gradient": operation | {"layout": [name]},
        "step: merged groups": {"ms": 3.456, "predicted_ms": [3.0, 5.0]},
    }
    text = table.table({"parts": {"train": {"rows": rows}, "probe": {"rows": single}}})
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("!!! LAYOUT KERNEL") == 2 and "!!! LAYOUT KERNEL, 12.345 ms: void cudnn" in text
    assert "0 to 4" in text and "14.7 to 33.4" in text and "-1234.56" in text and "layout: none" not in text
    assert "won a step: merged groups: 3.46 ms (predicted for the whole variant: 3 to 5)" in text
    assert "kernels of a step, bf16 b32 eager reference: the profiler recorded no kernel" in text
    assert text.count("+fp8_heads") == 1, "a variant is a row of its own table alone"
