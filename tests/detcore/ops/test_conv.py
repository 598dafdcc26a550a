"""Merged groups, and convolutions with bias, residual and ReLU inside: against the plain operations."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from detcore.device import native
from detcore.ops import conv as module
from detcore.ops.bias_relu import bias_relu_reference, conv_bias_relu
from detcore.ops.conv import conv2d, fused, merged
from tests.detcore.ops.test_bias_relu import DTYPES, LAYOUTS, SHAPES, equal_bits, saved_bytes, tensors, with_gradients


def a_conv(channels: int, groups: int = 1, kernel: int = 3, stride: int = 1, dtype=torch.float64, **more) -> nn.Conv2d:
    torch.manual_seed(channels + groups)
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=groups, **more).to(dtype)


def a_map(*shape: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (256, 32), (512, 32), (1024, 32), (192, 6), (128, 8)])
def test_merged_groups_compute_the_same(channels, groups, layout):
    conv = a_conv(channels, groups, stride=2).to(memory_format=layout)
    x, upstream = a_map(2, channels, 5, 6), a_map(2, channels, 3, 3, seed=1)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x, conv, weight, bias)

    expected = with_gradients(run, [x, conv.weight, conv.bias], upstream)
    with native.using("auto", "merged_groups"):
        found = with_gradients(run, [x, conv.weight, conv.bias], upstream)
    for own, other in zip(found, expected):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_are_the_blocks_and_zeros_between(layout):
    conv = a_conv(256, 32, dtype=torch.float32).to(memory_format=layout)
    wide, groups = merged(conv.weight, 32)
    assert groups == 4 and wide.shape == (256, 64, 3, 3) and wide.is_contiguous(memory_format=torch.channels_last)
    for row in (0, 7, 8, 70, 255):
        first = row % 64 // 8 * 8
        assert torch.equal(wide[row, first : first + 8], conv.weight[row])
        assert not wide[row, :first].any() and not wide[row, first + 8 :].any()


def test_gradients_between_the_blocks_are_left_even_where_they_are_not_finite():
    conv = a_conv(128, 32)
    wide, _ = merged(conv.weight, 32)
    inside = merged(torch.ones_like(conv.weight), 32)[0].bool()
    wide.backward(torch.where(inside, 2.0, torch.nan))
    assert torch.equal(conv.weight.grad, torch.full_like(conv.weight, 2))


@pytest.mark.parametrize(("channels", "groups"), [(128, 1), (256, 4), (256, 2), (96, 32), (192, 4), (160, 40)], ids=str)
def test_groups_that_stay_as_they_are(channels, groups):
    weight = a_conv(channels, groups).weight
    assert merged(weight, groups)[0] is weight and merged(weight, groups)[1] == groups


def test_merged_groups_are_made_in_the_type_of_autocast():
    conv = a_conv(128, 32, dtype=torch.float32)
    x, seen = a_map(1, 128, 6, 6, dtype=torch.float32), []
    with torch.autocast("cpu", torch.bfloat16):
        expected = conv2d(x, conv, conv.weight, None)
        with native.using("auto", "merged_groups"), torch.autograd.graph.saved_tensors_hooks(seen.append, lambda t: t):
            found = conv2d(x, conv, conv.weight, None)
    assert found.dtype == torch.bfloat16
    assert [t.dtype for t in seen if t.shape == (128, 64, 3, 3)] == [torch.bfloat16]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def with_epilogue(conv: nn.Conv2d, *variants: str):
    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        with native.using("auto", "conv_epilogues", *variants):
            return fused(x, conv, weight, bias, residual)

    return run


def without(conv: nn.Conv2d):
    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        convolved = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return bias_relu_reference(convolved, bias, residual)

    return run


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "conv", [a_conv(8), a_conv(8, 4), a_conv(6, kernel=1), a_conv(4, stride=2), a_conv(4, dilation=1, bias=False)]
)
def test_epilogue_gradients(conv, residual):
    x, bias = a_map(2, conv.in_channels, 5, 4), torch.linspace(-1, 1, conv.in_channels, dtype=torch.float64)
    out = without(conv)(x, conv.weight, bias)
    values = [x, conv.weight.detach(), bias, *([a_map(*out.shape, seed=3)] if residual else [])]
    upstream = a_map(*out.shape, seed=2)
    found = with_gradients(with_epilogue(conv), values, upstream)
    for own, other in zip(found, with_gradients(without(conv), values, upstream)):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(with_epilogue(conv), [v.clone().requires_grad_() for v in values])


@pytest.mark.parametrize("learning", range(4))
def test_each_gradient_alone(learning):
    conv = a_conv(4)
    values = [a_map(1, 4, 5, 5), conv.weight.detach(), torch.zeros(4, dtype=torch.float64), a_map(1, 4, 5, 5, seed=1)]
    gradients = []
    for run in (with_epilogue(conv), without(conv)):
        leaves = [v.detach().clone().requires_grad_(i == learning) for i, v in enumerate(values)]
        run(*leaves).square().sum().backward()
        assert [v.grad is not None for v in leaves] == [i == learning for i in range(4)]
        gradients.append(leaves[learning].grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stops_the_gradient_and_not_a_number_lets_it_pass(dtype):
    conv = a_conv(1, kernel=1, dtype=dtype)
    x = torch.tensor([torch.nan, 0.0, -0.0, 1.0, -1.0, torch.inf], dtype=dtype).view(1, 1, 2, 3)
    values = [x, x.new_ones(1, 1, 1, 1), x.new_zeros(1), torch.zeros_like(x)]
    upstream = torch.arange(1.0, 7, dtype=dtype).view(x.shape)
    found = with_gradients(with_epilogue(conv), values, upstream)
    expected = with_gradients(without(conv), values, upstream)
    assert torch.equal(found[0].isnan(), expected[0].isnan()) and found[0].isnan().sum() == 1
    assert equal_bits(found[0].nan_to_num(7), expected[0].nan_to_num(7))
    assert found[1].flatten().tolist() == expected[1].flatten().tolist() == [1, 0, 0, 4, 0, 6]
    assert torch.equal(found[4], expected[4])


def test_the_output_is_the_mask():
    """Nothing is kept that is not there anyway: input, weight, and what the next convolution keeps."""
    conv = a_conv(16, dtype=torch.float32)
    x = a_map(2, 16, 5, 7, dtype=torch.float32)
    out, kept = saved_bytes(lambda: with_epilogue(conv)(x, conv.weight, conv.bias))
    assert kept == 4 * (x.numel() + conv.weight.numel() + out.numel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_as_mask_does_what_the_bits_do(implementation, dtype):
    backward = torch.ops.detcore.bias_relu_backward
    for shape in SHAPES:
        for layout in LAYOUTS:
            x, bias, first = tensors(shape, dtype, layout, implementation.device)
            out, bits = torch.ops.detcore.bias_relu(x, bias, None, True)
            for more in ([], [x], [x, first]):
                expected = backward(first, bits, True, *more)
                assert all(map(equal_bits, backward(first, out, True, *more), expected)), (shape, layout, len(more))
                assert equal_bits(backward(first, out, False, *more)[0], expected[0])


def test_masks_of_a_wrong_kind_and_views_that_16_byte_accesses_cannot_read(implementation):
    x, _, first = tensors((2, 8, 3, 5), torch.bfloat16, torch.channels_last, implementation.device)
    for wrong, message in ((x.float(), "uint8 or like"), (x[:1], "lie like"), (x.contiguous(), "lie like")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.detcore.bias_relu_backward(first, wrong, False)
    for sums in (False, True):
        torch.library.opcheck(torch.ops.detcore.bias_relu_backward.default, (first, x, sums))
    odd = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(2, 3, 5, 8).permute(0, 3, 1, 2).copy_(x)
    for one, other in (((first, odd), (first, x)), ((odd, first), (x, first))):
        found, expected = (torch.ops.detcore.bias_relu_backward(*given, True) for given in (one, other))
        assert all(map(equal_bits, found, expected))


@pytest.mark.parametrize("uses", [(0,), (0, 1), (1, 2), (0, 1, 2), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_for_each_use(dtype, uses):
    conv = a_conv(8, dtype=dtype)
    values = [a_map(2, 8, 5, 4, dtype=dtype), conv.weight, conv.bias, a_map(2, 8, 5, 4, dtype=dtype, seed=1)]
    weights, results = [a_map(2, 8, 5, 4, dtype=dtype, seed=2 + i) for i in range(3)], []
    for apart in (True, False):
        leaves = [v.detach().clone().requires_grad_() for v in values]
        with native.using("auto", "conv_epilogues"):
            outs = fused(leaves[0], conv, *leaves[1:], apart=apart)
        outs = outs if apart else (outs,) * 3
        assert all(torch.equal(out, outs[0]) for out in outs)
        total = sum(((outs[i] * weights[i]).sum() for i in uses), leaves[0].sum())
        results.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 32])
def test_autocast(groups):
    conv = a_conv(128, groups, dtype=torch.float32)
    values = [a_map(2, 128, 6, 5, dtype=torch.float32, seed=i) for i in range(2)]
    values = [values[0], conv.weight.detach(), torch.linspace(-1, 1, 128), values[1]]
    upstream = a_map(2, 128, 6, 5, dtype=torch.bfloat16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(with_epilogue(conv, "merged_groups"), values, upstream)
    assert found[0].dtype == torch.bfloat16 and {t.dtype for t in found[1:]} == {torch.float32}
    expected = with_gradients(without(conv), values, upstream.float())
    for own, other in zip(found, expected):  # sums near 0 may be rounded to its other side, which opens or shuts
        assert (own.float() - other).norm() < 0.05 * other.norm()


def test_the_variants_choose_where():
    conv = a_conv(8, dtype=torch.float32)
    x = a_map(1, 8, 4, 4, dtype=torch.float32)

    def applies(*variants: str) -> bool:
        with native.using("auto", *variants):
            return fused(x, conv, conv.weight, conv.bias) is not None

    assert [applies(*v) for v in ((), ("conv_epilogues",), ("frozen_stage",))] == [False, True, False]
    with torch.no_grad():
        assert [applies(*v) for v in ((), ("conv_epilogues",), ("frozen_stage",))] == [False, True, True]
    conv.requires_grad_(False)
    assert applies("frozen_stage")
    x.requires_grad_()
    assert not applies("frozen_stage")


def test_compiled_code_is_left_to_the_compiler():
    conv = a_conv(128, 32, dtype=torch.float32)
    x = a_map(1, 128, 4, 4, dtype=torch.float32)
    torch.compiler.reset()
    with native.using("auto", "conv_epilogues", "merged_groups"):
        compiled = torch.compile(lambda x: conv_bias_relu(x, conv), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), conv_bias_relu(x, conv))


class CuDNN:
    """What stands in for it: gives something of the right shape, or refuses."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.calls, self.error = [], error
        monkeypatch.setattr(module, "_refused", set())
        monkeypatch.setattr(native, "has", lambda op, device: op == "aten::cudnn_convolution_relu")
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.add_relu)

    def relu(self, x, weight, bias, *geometry):
        self.calls.append(bias.dtype)
        if self.error:
            raise self.error
        return x.new_empty(x.shape)

    def add_relu(self, x, weight, z, alpha, bias, *geometry):
        assert alpha == 1 and z.dtype == x.dtype
        return self.relu(x, weight, bias, *geometry)


@pytest.fixture
def claimed():
    """(convolution, input), which only claim to lie on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield nn.Conv2d(8, 8, 3, padding=1, dtype=torch.bfloat16), torch.empty(1, 8, 4, 4, dtype=torch.bfloat16)


def test_cudnn_gets_a_bias_of_the_inputs_type(monkeypatch, claimed):
    cudnn, (conv, x) = CuDNN(monkeypatch), claimed
    with native.using("auto", "conv_epilogues"):
        assert fused(x, conv, conv.weight, conv.bias.float(), x).requires_grad
        with torch.no_grad():
            assert not fused(x, conv, conv.weight, conv.bias.float()).requires_grad
    assert cudnn.calls == [torch.bfloat16] * 2


def test_what_cudnn_refuses_is_remembered(monkeypatch, claimed):
    cudnn, (conv, x) = CuDNN(monkeypatch, RuntimeError("no engine")), claimed
    with native.using("auto", "conv_epilogues"):
        with pytest.warns(UserWarning, match="fuses no ReLU into the convolution of .1, 8, 4, 4. .*no engine"):
            assert fused(x, conv, conv.weight, conv.bias) is None
        with warnings.catch_warnings(action="error"):
            assert fused(x, conv, conv.weight, conv.bias) is None
        assert len(cudnn.calls) == 1
        with pytest.warns(UserWarning):
            assert fused(x[:, :, 1:], conv, conv.weight, conv.bias) is None
        cudnn.error = torch.OutOfMemoryError("full")
        with pytest.raises(torch.OutOfMemoryError):
            fused(x[:, :, 2:], conv, conv.weight, conv.bias)


def test_where_cudnn_has_no_such_convolution(monkeypatch, claimed):
    CuDNN(monkeypatch)
    conv, x = claimed
    with native.using("auto", "conv_epilogues"):
        assert fused(x, conv, conv.weight, conv.bias) is not None
        assert fused(x[:0], conv, conv.weight, conv.bias) is None
        assert fused(x.double(), conv, conv.weight.double(), conv.bias.double()) is None
        assert fused(x, conv, conv.weight, conv.bias, x.float()) is None
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            assert fused(x, conv, conv.weight, conv.bias) is None
        with torch.backends.cudnn.flags(enabled=False):
            assert fused(x, conv, conv.weight, conv.bias) is None
        monkeypatch.setattr(native, "has", lambda op, device: False)
        assert fused(x, conv, conv.weight, conv.bias) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnns_own(dtype, residual):
    """Also in memory that held NaN before: without a residual cuDNN gets the output itself, times 0."""
    conv = a_conv(64, dtype=dtype).to("cuda", memory_format=torch.channels_last)
    values = [a_map(2, 64, 20, 20, dtype=dtype), conv.weight.detach(), torch.linspace(-1, 1, 64)]
    values += [a_map(2, 64, 20, 20, dtype=dtype, seed=3)] if residual else []
    values = [v.to("cuda") for v in values]
    upstream = a_map(2, 64, 20, 20, dtype=dtype, seed=4).to("cuda")
    expected = with_gradients(without(conv), values, upstream)
    for _ in range(3):
        left = [torch.full((2, 64, 20, 20), torch.nan, device="cuda", dtype=dtype) for _ in range(8)]
        del left
        found = with_gradients(with_epilogue(conv), values, upstream)
        assert not module._refused
        for own, other in zip(found, expected):
            assert (own.float() - other.float()).norm() < 0.02 * other.float().norm()
