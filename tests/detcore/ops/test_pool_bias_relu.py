"""Maximum, bias and ReLU in one pass, over every implementation, against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.pool_bias_relu import pool_bias_relu, pool_bias_relu_reference
from tests.detcore.ops.test_bias_relu import equal_bits, on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    *((2, c, 5, 6) for c in (1, 3, 8, 12, 16, 64)),
    *((1, 8, h, w) for h, w in ((1, 1), (1, 2), (2, 1), (1, 9), (3, 3), (4, 4), (7, 8), (16, 33))),
    *((0, 8, 4, 4), (3, 5, 1, 1)),
]
OP = torch.ops.detcore.pool_bias_relu


def check(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Bits of the op and of its reference, for values in steps of 1/8, so that many are alike and many sums are 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = on(device, (torch.randint(-12, 13, shape, generator=generator) / 8).to(dtype))
    bias = (torch.randint(-8, 9, shape[1:2], generator=generator) / 8).to(device)
    found = pool_bias_relu(x, bias)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert equal_bits(found, pool_bias_relu_reference(x, bias)), shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(implementation, dtype):
    for shape in SHAPES:
        check(shape, dtype, implementation.device)


@settings(max_examples=30)
@given(data=st.data())
def test_random_shapes(implementation, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 14), st.integers(1, 14)))
    check(shape, data.draw(st.sampled_from(DTYPES)), implementation.device)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_random_values(implementation, bias_dtype):
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(2, 64, 9, 14, generator=generator), torch.randn(64, generator=generator)
    for dtype in DTYPES:
        values = on(implementation.device, x.to(dtype)), bias.to(implementation.device, bias_dtype)
        assert equal_bits(pool_bias_relu(*values), pool_bias_relu_reference(*values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, dtype):
    """NaN at every place of a window, minus infinity everywhere in one, zeros of both signs."""
    x = torch.full((9, 16, 3, 3), -1.0, dtype=dtype)
    for place in range(9):
        x[place, :4].flatten(1)[:, place] = torch.nan
        x[place, 4:8].flatten(1)[:, place] = torch.inf
        x[place, 12:14].flatten(1)[:, place] = -0.0
    x[:, 8:12], x[:, 14:] = -torch.inf, 0.0
    x, bias = on(implementation.device, x), torch.zeros(16, device=implementation.device)
    found, expected = pool_bias_relu(x, bias), pool_bias_relu_reference(x, bias)
    assert torch.equal(found.isnan(), expected.isnan()) and found[:, :4].isnan().any(0).all()
    assert equal_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_reference_is_the_maximum_then_bias_and_relu():
    x = torch.arange(16.0).view(1, 1, 4, 4) - 8
    assert pool_bias_relu_reference(x, torch.tensor([2.0])).tolist() == [[[[0, 1], [7, 9]]]]
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.tensor([0.5, 0, -0.5])
    expected = F.max_pool2d(F.relu(x + bias.view(-1, 1, 1)), 3, 2, 1)
    assert torch.equal(pool_bias_relu_reference(x, bias), expected)


def test_gradients_and_float64_are_the_references(implementation):
    x = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, bias = x.to(implementation.device), torch.ones(3, dtype=torch.float64, device=implementation.device)
    with native.using("auto"):
        assert pool_bias_relu(x, bias).dtype == torch.float64
        assert torch.autograd.gradcheck(pool_bias_relu, [x.requires_grad_(), bias.requires_grad_()])
    values = x.detach().float().requires_grad_(), bias.detach().float()
    assert pool_bias_relu(*values).requires_grad
    with torch.no_grad():
        assert not pool_bias_relu(*values).requires_grad


def test_other_layouts_and_views_that_16_byte_accesses_cannot_read(implementation):
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)).bfloat16().to(implementation.device)
    bias = torch.linspace(-1, 1, 8, device=implementation.device)
    expected = pool_bias_relu_reference(x, bias)
    assert torch.equal(pool_bias_relu(x, bias), expected)
    odd = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(2, 5, 5, 8).permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(OP(odd, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(implementation, dtype):
    for shape in ((2, 16, 5, 4), (1, 3, 1, 7)):
        x = on(implementation.device, torch.ones(shape, dtype=dtype))
        torch.library.opcheck(OP.default, (x, torch.ones(shape[1], device=x.device)))


def test_compiles(implementation):
    x = on(implementation.device, torch.randn(1, 8, 6, 7, generator=torch.Generator().manual_seed(1)))
    bias = torch.zeros(8, device=x.device)
    torch.compiler.reset()
    found = torch.compile(lambda x: pool_bias_relu(x * 2, bias) + 1, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, pool_bias_relu(x * 2, bias) + 1)


def test_wrong_arguments(implementation):
    device = implementation.device

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return on(device, torch.ones(shape, dtype=dtype))

    for x, bias, message in (
        (tensor(8, 4, 4), tensor(8), "N, C, H, W"),
        (torch.ones(1, 8, 4, 4, device=device), tensor(8), "channels_last"),
        (tensor(1, 8, 4, 4), tensor(4), "bias must be float32"),
        (tensor(1, 8, 4, 4), tensor(8, dtype=torch.bfloat16), "bias must be float32"),
        (tensor(1, 8, 4, 4), tensor(16)[::2], "contiguous"),
        (tensor(1, 8, 0, 4), tensor(8), "no values"),
        (tensor(1, 8, 4, 4, dtype=torch.float64), tensor(8), "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(x, bias)
