"""The Triton kernels of 3x3 convolutions: their own lines executed by Triton's interpreter on the CPU, and on a GPU.

The interpreter reads an environment variable when a kernel is defined, so it runs in a process of its own, once for all
cases. It rounds to 8 bits and to bfloat16 in another way than GPUs do, and multiplies no bfloat16: `quantise` is exact
on a GPU only, and 16-bit kernels are run in float16. What they become for a GPU is compiled here, and read.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detcore.ops import conv3x3 as ops
from detcore.ops.conv3x3 import BACKWARD, FORWARD, conv3x3, in_8_bits, quantise_reference

pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")

ROOT = Path(__file__).parents[3]
INTERPRETER = """
import sys, torch
from detcore.ops import conv3x3_kernels
cases = torch.load(sys.argv[1])
torch.save({name: getattr(conv3x3_kernels, f)(*arguments) for name, (f, arguments) in cases.items()}, sys.argv[2])
"""
SMALL = (32, 32, 32, 2, 4)
PROMOTED = (64, 64, 32, 2, 4, True)
REFERENCES = {"convolve": ops.convolve_reference, "weight_gradient": ops.weight_gradient_reference}
SHAPES = [(2, 16, 5, 7, 27), (1, 48, 3, 3, 130), (3, 32, 1, 9, 16), (1, 160, 6, 1, 40)]
"""N, C, H, W, K: rows and columns of one, channels that fill no tile, and more than one tile."""


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, weight, gradient of the output, bias, a scale), float32."""
    n, channels, height, width, outputs = shape
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(n, channels, height, width, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / channels**0.5
    grad = torch.randn(n, outputs, height, width, generator=generator)
    return x, weight, grad, torch.randn(outputs, generator=generator), torch.tensor([0.25])


def channels_last(*given: Tensor) -> list[Tensor]:
    return [t.contiguous(memory_format=torch.channels_last) for t in given]


def all_cases() -> dict[str, tuple[str, tuple]]:
    """Name: (function, arguments)."""
    cases: dict[str, tuple[str, tuple]] = {}
    for shape in SHAPES:
        x, weight, grad, bias, scale = tensors(shape)
        small_x, small_weight = quantise_reference(x, FORWARD)[0], quantise_reference(weight, FORWARD)[0]
        small_grad = quantise_reference(grad, BACKWARD)[0]
        back = ops.flipped(small_weight, shape[1], small_grad.shape[1])
        half_x, half_weight, half_grad = (t.half() for t in channels_last(x, weight, grad))
        name = "x".join(map(str, shape))
        plain, whole = (None, None, False, torch.float32), (scale, bias, True, torch.float16)
        cases |= {
            f"8-bit {name}": ("convolve", (small_x, small_weight, *plain, SMALL)),
            f"8-bit scale, bias, ReLU {name}": ("convolve", (small_x, small_weight, *whole, SMALL)),
            f"8-bit promoted {name}": ("convolve", (small_x, small_weight, *plain, PROMOTED)),
            f"8-bit own tiles {name}": ("convolve", (small_x, small_weight, *plain)),
            f"8-bit input gradient {name}": ("convolve", (small_grad, back, *plain, SMALL)),
            f"16-bit {name}": ("convolve", (half_x, half_weight, *whole, SMALL)),
            f"8-bit weight gradient {name}": ("weight_gradient", (small_grad, small_x, scale, SMALL)),
            f"8-bit weight gradient own tiles {name}": ("weight_gradient", (small_grad, small_x, None)),
            f"16-bit weight gradient {name}": ("weight_gradient", (half_grad, half_x, scale, SMALL)),
        }
    return cases


CASES = all_cases()


def quantise_cases() -> dict[str, tuple[str, tuple]]:
    """The same for `quantise`: numbers that the format has, so that any rounding keeps them, and special ones."""
    cases: dict[str, tuple[str, tuple]] = {}
    for dtype, name in ((FORWARD, "e4m3"), (BACKWARD, "e5m2")):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        numbers = torch.where(numbers.isfinite(), numbers, 0)
        given = {
            "narrow": numbers.view(2, 16, 2, 4) * 2**-30,
            "padded channels": numbers[:243].view(1, 27, 3, 3),
            "many programs": numbers[torch.arange(40 * 300 * 5) % 256].view(5, 40, 3, 100) * 2**20,
            "half": torch.randint(-8, 9, (3, 8, 7, 5)).half(),
            "bfloat16": torch.randint(-8, 9, (1, 300, 7, 1)).bfloat16(),
            "zero": torch.zeros(1, 16, 2, 2),
            "NaN": torch.tensor([1.0, float("nan"), 2.0, float("inf")]).view(1, 4, 1, 1),
            "infinity": torch.tensor([1.0, -float("inf"), 2.0, 4.0]).view(1, 4, 1, 1),
        }
        for kind, x in given.items():
            arguments = (*channels_last(x), dtype, ops.padded(x.shape[1]), ops.TOP[dtype])
            cases[f"{name} {kind}"] = ("quantise", arguments)
    return cases


QUANTISED = quantise_cases()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, Tensor]:
    """What the interpreter makes of every case, and of `quantise`."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(CASES | QUANTISED, folder / "cases.pt")
    command = [sys.executable, "-c", INTERPRETER, str(folder / "cases.pt"), str(folder / "found.pt")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter is older than numpy 2.4 (triton-lang/triton, issue 9171)")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


def on_gpu(function: str, arguments: tuple) -> Tensor | tuple[Tensor, Tensor]:
    from detcore.ops import conv3x3_kernels

    there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    found = getattr(conv3x3_kernels, function)(*there)
    return found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)


def check(name: str, found: Tensor, rtol: float) -> None:
    function, arguments = CASES[name]
    expected = REFERENCES[function](*(a for a in arguments if type(a) is not tuple))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.float(), expected.float(), rtol=rtol, atol=rtol * expected.abs().max().item())


def check_quantised(name: str, found: tuple[Tensor, Tensor]) -> None:
    x, dtype, *_ = QUANTISED[name][1]
    small, scale = quantise_reference(x, dtype)
    assert found[0].dtype == dtype and found[0].shape == small.shape
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[1].isnan(), scale.isnan()) and torch.equal(found[1].nan_to_num(), scale.nan_to_num())
    if not scale.isnan():
        assert torch.equal(found[0].float(), small.float())
        assert torch.equal(found[0][:, : x.shape[1]].float() * found[1], x.float())


@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreted, name):
    check(name, interpreted[name], 1e-3 if "ReLU" in name or "16-bit" in name else 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    """Tensor cores sum 8-bit products in about 14 bits."""
    check(name, on_gpu(*CASES[name]), 1e-2 if name.startswith("8-bit") else 2e-3)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantise_interpreted(interpreted, name):
    check_quantised(name, interpreted[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTISED)
def test_quantise_on_a_gpu(name):
    check_quantised(name, on_gpu(*QUANTISED[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_a_gpu_rounds_as_the_reference(dtype):
    x = torch.randn(4, 40, 33, 17, generator=torch.Generator().manual_seed(0))
    found, scale = on_gpu("quantise", (*channels_last(x), dtype, 48, ops.TOP[dtype]))
    expected, expected_scale = quantise_reference(x, dtype)
    assert torch.equal(scale, expected_scale) and torch.equal(found.float(), expected.float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_on_a_gpu(dtype):
    x, weight, grad, bias, scale = (t.to(dtype) for t in tensors((2, 64, 17, 33, 136)))
    arguments = (*channels_last(x, weight), None, bias.float(), True, dtype)
    found, expected = on_gpu("convolve", arguments), ops.convolve_reference(*arguments)
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-3)
    arguments = (*channels_last(grad, x), scale.float())
    found, expected = on_gpu("weight_gradient", arguments), ops.weight_gradient_reference(*arguments)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.gpu
def test_recorded_on_a_gpu():
    """Forward and backward replayed with other values give what they give eagerly, and what the CPU emulates."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 136, 3, padding=1)
    there = torch.nn.Conv2d(64, 136, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)
    there.load_state_dict(conv.state_dict())
    x = torch.zeros(2, 64, 19, 9, device="cuda").to(memory_format=torch.channels_last).requires_grad_()

    def work(layer: torch.nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
        out = conv3x3(x, layer.weight, layer.bias, in_8_bits(layer), relu=True)
        return out, *torch.autograd.grad(out.square().mean(), [x, layer.weight, layer.bias])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work(there, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work(there, x)
    new = torch.randn(2, 64, 19, 9)
    with torch.no_grad():
        x.copy_(new)
    graph.replay()
    found = [t.detach().clone() for t in recorded]
    eager = work(there, x)
    assert torch.equal(found[0], eager[0]) and torch.equal(found[1], eager[1])  # the library's sums may differ
    for a, b, c in zip(found, eager, work(conv, new.requires_grad_()), strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()
        assert (b.cpu() - c).norm() <= 0.05 * c.norm()


def compiled(name: str, types: dict[str, str], constants: dict[str, int], cut: tuple):
    """A kernel for compute capability 9.0, as Triton specialises it for the model's sizes."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from detcore.ops import conv3x3_kernels

    kernel = getattr(conv3x3_kernels, name)
    names = kernel.arg_names
    constants = constants | {"ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth}
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    sixteenfold = [*types, "part"]
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in sixteenfold}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("kind", "dtypes", "outputs", "channels", "instruction"),
    [
        ("convolve", (FORWARD, "fp8e4nv", "fp8e4nv"), 256, 256, "m64n256k32.f32.e4m3.e4m3"),
        ("convolve", (BACKWARD, "fp8e5", "fp8e4nv"), 256, 256, "m64n256k32.f32.e5m2.e4m3"),
        ("convolve", (BACKWARD, "fp8e5", "fp8e4nv"), 256, 2384, "m64n128k32.f32.e5m2.e4m3"),
        ("convolve", (torch.bfloat16, "bf16", "bf16"), 2376, 256, "m64n256k16.f32.bf16.bf16"),
        ("weight_gradient", (BACKWARD, "fp8e5", "fp8e4nv"), 2384, 256, "m64n256k16.f32.f16.f16"),
        ("weight_gradient", (torch.bfloat16, "bf16", "bf16"), 2376, 256, "m64n256k16.f32.bf16.bf16"),
    ],
)
def test_compiles_to_tensor_core_instructions(
    tmp_path, monkeypatch, kind, dtypes, outputs, channels, instruction
):  # fmt: skip
    """With the tiles of the model's sizes: the right instruction, in the memory of an H100, all sums in registers."""
    from triton import knobs

    from detcore.ops import conv3x3_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, a, b = dtypes
    if kind == "convolve":
        cut = conv3x3_kernels.convolution_tiles(dtype, outputs, channels)
        types = {"x": f"*{a}", "weight": f"*{b}", "out": "*bf16", "scale": "*fp32", "bias": "*fp32"}
        constants = {"BIAS": True, "RELU": False, "SCALE": True, "PROMOTE": cut.promote}
    else:
        cut = conv3x3_kernels.weight_gradient_tiles(outputs, channels)
        types, constants = {"grad": f"*{a}", "x": f"*{b}", "partial": "*fp32"}, {"HALF": dtype.itemsize == 1}
    made = compiled(f"{kind}_kernel", types, constants | {"CHANNELS": channels, "OUTPUTS": outputs}, cut)
    assert f"wgmma.mma_async.sync.aligned.{instruction}" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage, usage
