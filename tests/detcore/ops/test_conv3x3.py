"""8-bit 3x3 convolutions: rounding, scales and gradients, against float64 within what the formats' bits allow."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.device import native
from detcore.ops import conv3x3 as ops
from detcore.ops.conv3x3 import BACKWARD, FORWARD, conv3x3, in_8_bits, quantise

LARGEST = {FORWARD: 448.0, BACKWARD: 57344.0}
RELATIVE = {FORWARD: 2**-4, BACKWARD: 2**-3}
"""Rounding to the nearest with 3 and 2 bits of mantissa is wrong by half of the last bit at most."""
ABSOLUTE = {FORWARD: 2**-10, BACKWARD: 2**-17}
"""Half of the smallest number, where numbers are closer to zero than the formats' exponents reach."""


def values(dtype: torch.dtype) -> Tensor:
    """Every finite number of an 8-bit format, [1, 16, 16, 1] with zeros in the place of the others."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return torch.where(numbers.isfinite(), numbers, 0).view(1, 16, 16, 1)


def error(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The most by which each value of a tensor can be changed by `quantise`, float64."""
    scale = quantise(x, dtype)[1].double()
    return torch.maximum(RELATIVE[dtype] * x.double().abs(), ABSOLUTE[dtype] * scale)


def layer(channels: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, 3, padding=1)


@pytest.mark.parametrize("power", [-100, -9, 0, 1, 60])
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_what_the_format_has_stays_exact(dtype, power):
    x = values(dtype) * 2.0**power
    small, scale = quantise(x, dtype)
    assert scale.item() == 2.0**power
    assert torch.equal(small.float() * scale, x)
    assert small.dtype == dtype and small.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("largest", [1.0, 448.0, 449.0, 1e-30, 3e38, 57344.0, 57345.0, 0.0173])
def test_the_scale_is_the_smallest_power_of_two_without_overflow(dtype, largest):
    torch.manual_seed(0)
    x = torch.rand(2, 16, 3, 5) * largest
    x[1, 3, 2, 2] = -largest
    small, scale = quantise(x, dtype)
    assert torch.frexp(scale)[0].item() == 0.5  # a power of two
    assert LARGEST[dtype] / 2 < x.abs().max().item() / scale.item() <= LARGEST[dtype]
    assert ((small.double() * scale.double() - x.double()).abs() <= error(x, dtype)).all()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("largest", [0.0, 1e-45])
def test_next_to_nothing_becomes_zero_and_divides_by_nothing(dtype, largest):
    small, scale = quantise(torch.full((1, 16, 2, 2), largest), dtype)
    assert scale.item() == 2.0**-126
    assert torch.equal(small.float(), torch.zeros(1, 16, 2, 2))


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_not_hidden(dtype, bad):
    x = torch.ones(1, 16, 4, 4)
    x[0, 7, 1, 2] = bad
    small, scale = quantise(x, dtype)
    assert scale.isnan().all()
    assert (small.float() * scale).isnan().all()


@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_outputs_and_gradients(where, bad):
    torch.manual_seed(0)
    conv, x = layer(16, 8), torch.randn(1, 16, 5, 5)
    grad = torch.randn(1, 8, 5, 5)
    {"x": x, "weight": conv.weight.data, "grad": grad}[where][0, 0, 2, 2] = bad
    x.requires_grad_()
    out = conv3x3(x, conv.weight, conv.bias, in_8_bits(conv), relu=False)
    assert out.isnan().all() == (where != "grad")
    out.backward(grad)
    assert x.grad.isnan().all() == (where != "x")
    assert conv.weight.grad.isfinite().all() == (where == "weight")


def test_channels_are_padded_with_zeros():
    torch.manual_seed(0)
    x = torch.randn(2, 27, 3, 4)
    small, scale = quantise(x, FORWARD)
    assert small.shape == (2, 32, 3, 4) and small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small[:, :27].float(), (x / scale).to(FORWARD).float())
    assert torch.equal(small[:, 27:].float(), torch.zeros(2, 5, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(16, 16, (5, 7)), (20, 27, (1, 9)), (64, 8, (6, 1))])
def test_forward_and_gradients_are_within_the_error_of_their_bits(channels, outputs, size, dtype):
    torch.manual_seed(channels)
    conv = layer(channels, outputs)
    x = torch.randn(2, channels, *size).to(dtype).requires_grad_()
    grad = (1e-5 * torch.randn(2, outputs, *size)).to(dtype)
    out = conv3x3(x, conv.weight, conv.bias, in_8_bits(conv))
    out.backward(grad)
    assert (out.dtype, x.grad.dtype, conv.weight.grad.dtype) == (dtype, dtype, torch.float32)

    exact_x, weight, g = x.detach().double(), conv.weight.detach().double(), grad.double()
    dx, dw, dg = error(x.detach(), FORWARD), error(conv.weight.detach(), FORWARD), error(grad, BACKWARD)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b, padding=1)

    def turned(w: Tensor) -> Tensor:
        return w.flip(2, 3).transpose(0, 1)

    def over_pixels(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(b, conv.weight.shape, a, padding=1)

    last_bit = torch.finfo(dtype).eps  # of the result, which is rounded once more
    bias = conv.bias.detach().double().view(-1, 1, 1)
    for found, of, a, da, b, db in (
        (out.detach() - bias, product, exact_x, dx, weight, dw),
        (x.grad, product, g, dg, turned(weight), turned(dw)),
        (conv.weight.grad, over_pixels, g, 0 * dg, exact_x, 0 * dx),
    ):
        exact, size_of_all = of(a, b), of(a.abs() + da, b.abs() + db)
        bound = size_of_all - of(a.abs(), b.abs()) + (last_bit + 1e-6) * (size_of_all + bias.abs().max())
        off = (found.double() - exact).abs()
        assert (off <= bound).all()
        rounded = off.square().mean().sqrt() > 0.01 * exact.square().mean().sqrt()
        assert rounded == (of is product)  # 8 bits, or not
    assert torch.allclose(conv.bias.grad.double(), g.sum((0, 2, 3)), rtol=1e-5, atol=0)


def test_emulation_sums_products_of_8_bit_numbers():
    torch.manual_seed(1)
    conv, x = layer(16, 24), torch.randn(2, 16, 6, 5)
    (small, scale), (weight, weight_scale) = quantise(x, FORWARD), quantise(conv.weight.detach(), FORWARD)
    exact = F.conv2d(small.double() * scale, weight.double() * weight_scale, conv.bias.double(), padding=1)
    found = conv3x3(x, conv.weight, conv.bias, in_8_bits(conv))
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_relu_follows_the_bias():
    torch.manual_seed(2)
    conv, x = layer(16, 24), torch.randn(2, 16, 6, 5)
    plain, rectified = (conv3x3(x, conv.weight, conv.bias, in_8_bits(conv), relu) for relu in (False, True))
    assert torch.allclose(rectified, F.relu(plain), rtol=1e-6, atol=1e-6) and (rectified == 0).any()


@pytest.mark.parametrize("outputs", [16, 27])
def test_flipped_weights_give_the_input_gradient(outputs):
    torch.manual_seed(3)
    x = torch.randn(2, 20, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, 32, 3, 3, dtype=torch.float64)
    grad = torch.randn(2, outputs, 5, 4, dtype=torch.float64)
    (exact,) = torch.autograd.grad(F.conv2d(x, weight[:, :20], padding=1), x, grad)
    found = F.conv2d(F.pad(grad, (0, 0, 0, 0, 0, 32 - outputs)), ops.flipped(weight, 20, 32), padding=1)
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


def test_ops_keep_torchs_rules():
    torch.manual_seed(4)
    x, weight = torch.randn(2, 20, 3, 4), torch.randn(27, 20, 3, 3)
    torch.library.opcheck(ops.quantise, (x, BACKWARD), test_utils="test_faketensor")
    small, scale = quantise(x, FORWARD)
    grad = quantise(torch.randn(2, 27, 3, 4), BACKWARD)[0]
    arguments = (small, quantise(weight, FORWARD)[0], scale, torch.ones(27), True, torch.bfloat16)
    torch.library.opcheck(ops.convolve, arguments, test_utils="test_faketensor")
    torch.library.opcheck(ops.weight_gradient, (grad, small, scale), test_utils="test_faketensor")
    # What checks that inputs stay as they are cannot compare 8-bit numbers.
    every = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.convolve, (x, weight, None, None, False, torch.float32), test_utils=every)
    torch.library.opcheck(ops.weight_gradient, (torch.randn(2, 27, 3, 4), x, scale), test_utils=every)


def test_compiler_traces_it():
    torch.manual_seed(5)
    conv, x = layer(16, 24), torch.randn(2, 16, 6, 5)

    def loss() -> Tensor:
        return conv3x3(x, conv.weight, conv.bias, in_8_bits(conv), relu=True).square().sum()

    (eager,) = torch.autograd.grad(loss(), conv.weight)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(), conv.weight)
    assert torch.equal(eager, compiled)


def test_the_variant_is_refused_where_nothing_computes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    native._no_fp8.cache_clear()
    with native.using("auto", "fp8_heads"):
        assert native.fp8_heads("cpu")
        with pytest.raises(UserError, match=r"fp8_heads: Some GPU .* capability 8\.9"):
            native.fp8_heads("cuda")
        with pytest.raises(UserError, match="no code for tensors on xla"):
            native.fp8_heads("xla")
    with native.using("reference", "fp8_heads"):
        assert not native.fp8_heads("cpu")
    assert not native.fp8_heads("cuda")
    native._no_fp8.cache_clear()
