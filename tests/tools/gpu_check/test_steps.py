"""What is measured of steps and operations, on a CPU: parts probe and train, kernels by family."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detcore.device import native
from detcore.training import engine
from tests.tools.gpu_check.common import context, keep, no_gpu
from tools.gpu_check import columns, jobs, kernels, state, steps, table, timing
from tools.gpu_check.benchmarks.efficientdet import steps as efficientdet
from tools.gpu_check.benchmarks.single_stage_detector import inference, train
from tools.gpu_check.benchmarks.ssd300 import steps as ssd

ROOT = Path(__file__).parents[3]


def test_keys_are_told_apart_and_the_main_row_is_the_first(tmp_path):
    here = context(tmp_path, gpu=True)
    keys = [key for key, _ in train.train(here)]
    assert next(iter(ssd.ssd300(here)))[0] == "training bf16 b128 graph native"
    own = [key for key, _ in efficientdet.efficientdet(here)]
    assert own[:2] == ["training bf16 b128 graph native", "inference bf16 b8 graph native"]
    assert len(own) == len(set(own)) == 9 + len(efficientdet.PREDICTED_GAIN_MS)
    assert len(keys) == len(set(keys)) and keys[:2] == ["bf16 b32 graph native", "bf16 b32 compiled+graph native"]
    assert {f"bf16 b32 graph native +{name}" for name in train.VARIANTS} <= set(keys)
    assert {"bf16 b32 graph native +all but fp8_heads", "bf16 b32 graph native +all",
            "bf16 b32 graph native cudnn_benchmark_limit 0"} <= set(keys)  # fmt: skip


def test_a_short_part_compiles_last(tmp_path):
    keys = [key for key, _ in train.train(context(tmp_path, gpu=True))]
    short = [key for key, _ in train.train(replace(context(tmp_path, gpu=True), budget=60.0))]
    assert short[0] == keys[0] and sorted(short) == sorted(keys)
    assert all("compiled" in key for key in short[-3:]) and "compiled" not in short[1]


def test_every_variant_has_a_prediction_in_one_place(tmp_path):
    here = context(tmp_path, gpu=True)
    assert not set(train.VARIANTS) & set(efficientdet.PREDICTED_GAIN_MS)
    assert native.VARIANTS.keys() == {*train.VARIANTS, *efficientdet.PREDICTED_GAIN_MS}
    case = train.CASES[0]

    def predicted(*names, **more):
        return train.predicted_gain(replace(case, variants=names, **more), here)

    assert predicted("merged_groups") == (3.0, 5.0) and predicted() == (0, 0) and predicted(limit=0) == (0.0, 4.0)
    assert predicted("frozen_stage") == (2.6, 2.6), "alone it has its own"
    assert predicted("frozen_stage", "conv_epilogues") == predicted("conv_epilogues") == (2.9, 2.9)
    assert predicted(*steps.NARROW) == pytest.approx((11.2, 15.9))
    assert predicted(*train.VARIANTS) == pytest.approx((10.2, 25.9))
    assert predicted("merged_groups", times=2) is None, "they are of 32 images"


def test_the_documents_predict_the_same():
    def told_by(file: str) -> tuple[str, dict[str, str]]:
        text = (ROOT / file).read_text(encoding="utf-8")
        return text, dict(re.findall(r"^\| `(\w+)` \| .* \| ([-\d. to]+) \|$", text, re.MULTILINE))

    own = {name: columns.between(limits) for name, limits in efficientdet.PREDICTED_GAIN_MS.items()}
    assert told_by("efficientdet/README.md")[1] == own
    text, told = told_by("single_stage_detector/README.md")
    limit = re.search(r"`--cudnn-benchmark-limit 0` .*: ([-\d. to]+) ms", text)
    predicted = {name: columns.between(limits) for name, limits in train.PREDICTED_GAIN_MS.items()}
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
def test_losses_that_rounding_does_not_explain_fail_a_row(tmp_path, monkeypatch, off, names, precision, fails):
    here = context(tmp_path, gpu=True)
    main = replace(train.CASES[0], precision=precision)
    monkeypatch.setattr(train, "cases", lambda context: (main,))
    keep(tmp_path, "train", {main.key(here): {"ms": 100.0, "loss": 1.0, "later_loss": 1.0}})
    row = {"ms": 97.0, "loss": 1 + off[0], "later_loss": 1 + off[1]}
    monkeypatch.setattr(train, "train_row", lambda *arguments: dict(row))
    found = train.case_row(replace(main, variants=names, what="+"), here, None)
    assert found["ms"] == 97 and found.get("error", "").startswith(fails) and bool(fails) == ("error" in found)


@no_gpu
def test_a_loss_that_is_not_finite_fails_its_row(tmp_path, monkeypatch):
    here = context(tmp_path)
    monkeypatch.setattr(steps.TrainStep, "losses", lambda self: (2.0, math.nan))
    jobs.run_jobs("train", [next(iter(train.train(here)))], here)
    part = state.load(tmp_path)["parts"]["train"]
    (row,) = part["rows"].values()
    assert part["status"] == "failed" and row["error"] == "a loss is not finite: 2.0, after 5 updates nan"


def test_a_variant_that_computes_something_else_is_seen(tmp_path):
    here = context(tmp_path, gpu=True)
    row = {"ms": 97.0, "loss": 2.02, "later_loss": 1.0}
    assert train.beside_main(row, train.CASES[3], here) == {}, "the main row is not there"
    keep(tmp_path, "train", {"bf16 b32 graph native": {"ms": 100.0, "loss": 2.0, "later_loss": "nan"}})
    found = train.beside_main(row, train.CASES[3], here)
    assert found == {"gain_ms": 3.0, "loss_difference": pytest.approx(0.01)}
    assert train.beside_main(row, train.CASES[0], here) == {}
    assert train.beside_main(row, replace(train.CASES[3], precision="fp16"), here) == {}


@no_gpu
def test_a_row_with_its_kernels_and_a_variant_beside_it(tmp_path):
    here = context(tmp_path)
    main, _, variant = todo = list(train.train(here))
    jobs.run_jobs("train", (todo[0], todo[2]), here)
    saved = state.load(tmp_path)
    rows = saved["parts"]["train"]["rows"]
    profile = rows[main[0]]["profile"]
    assert profile["layout"] == {} and profile["families"]["convolution/gemm"]["ms"] > 0
    assert len(profile["next"]) == 3 and profile["ms"] == pytest.approx(
        sum(f["ms"] for f in profile["families"].values())
    )
    row = rows[variant[0]]
    assert row["later_loss"] < 0.95 * row["loss"], "five updates must show"
    assert max(row["loss_difference"], row["later_loss_difference"]) < 1e-3
    assert row["variants"] == list(steps.NARROW) and row["predicted_gain_ms"] is None
    printed = table.table(saved)
    assert max(map(len, printed.splitlines())) <= 100 and "kept only if confirmed" in printed
    assert f"kernels of a step, {main[0]}" in printed and "layout: none" in printed


@no_gpu
def test_a_row_in_a_process_of_its_own(tmp_path):
    here = context(tmp_path)
    config = train.retinanet(here, 1, "fp32", "eager", "reference", cudnn_benchmark_limit=0)
    row = train.apart(config, "eager", here, timing.Stopwatch(here), steps.Scale(1.0), False)
    assert row["images_per_s"] > 0 and row["ops"] == "reference"


@no_gpu
def test_inference_runs_no_training_step(tmp_path, monkeypatch):
    """On a GPU its warm-up would try cuDNN's algorithms for every gradient, for nothing."""
    here = context(tmp_path)
    monkeypatch.setattr(engine, "make_train_step", lambda *arguments: pytest.fail("a step is made"))
    todo = dict(inference.inference(here))
    for key in ("forward fp32 b2 eager native", "forward+postprocess fp32 b2 eager reference"):
        assert todo[key]()["images_per_s"] > 0
    job = next(job for job in ssd.ssd300(here) if job[0].startswith("inference"))
    assert job[1]()["images_per_s"] > 0
    with pytest.raises(pytest.fail.Exception, match="a step is made"):
        todo["evaluation pause fp32 b2 eager native"]()


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
        "void detcore::fuse_gather_kernel<c10::BFloat16, true>(detcore::Node)": "batchnorm/elementwise",
        "void detcore::nms_kernel(float const*)": "other",
        "weight_gradient_kernel": "convolution/gemm",
        "narrow_kernel": "quantise",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "nccl",
        "Memcpy DtoD (Device -> Device)": "memcpy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "batchnorm/elementwise",
        "something_else": "other",
    }
    assert {name: kernels.family(name) for name in names} == names


def test_the_next_three_things_are_those_furthest_above_their_floor():
    rows = {
        "convolution/gemm": {"ms": 60.0, "share": 0.6, "floor_ms": 50.0},
        "loss": {"ms": 30.0, "share": 0.3, "floor_ms": 2.0},
        "memcpy": {"ms": 9.0, "share": 0.09, "floor_ms": 0.0},
        "other": {"ms": 1.0, "share": 0.01, "floor_ms": None},
    }
    assert [words.partition(":")[0] for words in kernels.next_things(rows)] == ["loss", "convolution/gemm", "memcpy"]


def test_annotations_are_not_counted_beside_what_they_span():
    def run():
        with torch.profiler.record_function("Optimizer.step#Adam.step"):
            return torch.ones(1000) + 1

    found = kernels.traced(run, False, times=2)
    assert "aten::add" in found and "Optimizer.step#Adam.step" not in found
    assert found["aten::add"][0] > 0 and found["aten::add"][1] == 1


def test_the_table_prints_variants_and_layout_kernels():
    times = {"ms": 12345.67, "p10_ms": 123.456, "p90_ms": 123.456, "images_per_s": 12345.6, "images_per_s_p10": 1.0,
             "images_per_s_p90": 1.0}  # fmt: skip
    families = {"layout": {"ms": 12.345, "share": 0.1, "floor_ms": 0.0}}
    name = "void cudnn::ops::nchwToNhwcKernel<" + "__half, " * 15 + ">"
    profile = {"ms": 100.0, "families": families, "layout": {name: 12.345}, "next": ["a"]}
    beside = {"gain_ms": -1234.56, "loss_difference": 1e-10, "later_loss_difference": 12.0, "variants": []}
    rows = {
        "bf16 b32 graph native": times | {"profile": profile},
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
