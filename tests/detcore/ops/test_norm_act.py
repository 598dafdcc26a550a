"""Batch normalisation with its activation, over every implementation, against torch's own in float64."""

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.activation import index_of
from detcore.ops.norm_act import norm_act, norm_act_reference

OP, BACKWARD = torch.ops.detcore.norm_act, torch.ops.detcore.norm_act_backward
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
SHAPES = [
    *((2, c, 3, 5) for c in (1, 3, 8, 16, 64, 72, 144, 224, 264)),
    *((n, c, h, w) for n, c, h, w in ((2, 8, 1, 1), (1, 5, 1, 2), (3, 24, 9, 11), (1, 2, 17, 8), (5, 40, 13, 7))),
]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MOMENTUM, EPS = 0.1, 1e-3


def parameters(channels: int, generator: torch.Generator) -> list[Tensor]:
    """weight, bias, running mean, running variance."""
    drawn = torch.randn(3, channels, generator=generator)
    return [*drawn.unbind(), torch.rand(channels, generator=generator) + 0.5]


def draw(shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x with a mean of its own in each channel, its upstream gradient, and the parameters."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2 + torch.randn(shape[1], 1, 1, generator=generator) * 3
    return x.to(dtype), torch.randn(shape, generator=generator).to(dtype), parameters(shape[1], generator)


def placed(tensors: Iterable[Tensor], device: torch.device, layout=torch.contiguous_format) -> list[Tensor]:
    return [t.to(device).contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format) for t in tensors]


def computed(function, x: Tensor, upstream: Tensor, given: list[Tensor], activation: str) -> list[Tensor]:
    """The output, the gradients of x, weight and bias, and the running statistics afterwards."""
    inputs = [t.detach().requires_grad_() for t in (x, *given[:2])]
    running = [t.clone() for t in given[2:]]
    out = function(*inputs, *running, MOMENTUM, EPS, activation)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream), *running]


def check(shape, dtype, layout, device, activation) -> None:
    """The op against torch's own in float64, on the same values."""
    x, upstream, given = draw(shape, dtype)
    on_device = placed((x, upstream, *given), device, layout)
    found = computed(norm_act, *on_device[:2], on_device[2:], activation)
    assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=layout)
    assert found[1].dtype == dtype and found[1].stride() == on_device[0].stride()
    wide = [t.double() for t in given]
    exact = computed(norm_act_reference, x.double(), upstream.double(), wide, activation)
    # A value within float32's rounding of a bend lies on either side of it: its gradient may be 0 or the whole.
    z = F.batch_norm(x.double(), None, None, *wide[:2], True, 0.0, EPS)
    bends = {"relu": (0.0,), "relu6": (0.0, 6.0)}.get(activation, ())
    assert all(float((z - bend).abs().min()) > 1e-5 for bend in bends), "draw other values"
    # The rounding of a mean, and of sums that nearly cancel, is multiplied by 1 / deviation.
    deviation = x.double().transpose(0, 1).flatten(1).var(1, correction=0).add(EPS).sqrt()
    stretch = max(1.0, 1 / float(deviation.min()))
    most = [1.5 * ROUNDING[dtype], 3 * ROUNDING[dtype], 1e-5, 1e-5, 1e-6, 1e-6]
    for i, (a, b, error) in enumerate(zip(found, exact, most, strict=True)):
        apart = float((a.double().cpu() - b).abs().max()) / max(1.0, float(b.abs().max())) / (stretch if i < 4 else 1)
        assert apart <= error, (i, shape, activation, apart)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(implementation, dtype, layout):
    for shape, activation in zip(SHAPES, itertools.cycle(("silu", "none"))):
        check(shape, dtype, layout, implementation.device, activation)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_other_activations(implementation, activation):
    for layout in LAYOUTS:
        check((2, 16, 5, 6), torch.float32, layout, implementation.device, activation)


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(implementation, data):
    shape = data.draw(st.tuples(st.integers(2, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    check(shape, dtype, layout, implementation.device, data.draw(st.sampled_from(("silu", "none"))))


def test_many_parts_of_a_channel(implementation):
    """More rows than a part has, in both layouts; twice the same in every bit."""
    for shape in ((3, 8, 40, 33), (2, 3, 64, 33)):
        for layout in LAYOUTS:
            check(shape, torch.float32, layout, implementation.device, "silu")
    x, upstream, given = draw((3, 8, 40, 33))
    x, upstream, *given = placed((x, upstream, *given), implementation.device, torch.channels_last)
    runs = [computed(norm_act, x, upstream, given, "silu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_cancels(implementation, layout):
    """A mean 10,000 times the deviation: sums of squares would leave no digit of the variance."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((2, 8, 30, 20), generator=generator) + 1e4
    ones = torch.ones(8)
    given = placed((x, ones, ones, 0 * ones, ones), implementation.device, layout)
    out = norm_act(*given, 1.0, EPS, "none")
    exact = F.batch_norm(x.double(), None, None, ones.double(), ones.double(), True, 0.0, EPS)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=0, atol=2e-3)
    expected = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(given[4].double().cpu(), expected, rtol=1e-3, atol=0)


def test_a_constant_channel_and_values_that_are_none(implementation):
    x = torch.zeros(2, 8, 4, 4)
    x[:, 1], x[0, 2, 1, 1] = 7.0, torch.nan
    drawn = parameters(8, torch.Generator().manual_seed(1))
    x, *given = placed((x, *drawn), implementation.device, torch.channels_last)
    out = norm_act(x, *given, MOMENTUM, EPS, "silu")
    expected = F.silu(given[1])
    for channel in (0, 1, 3):
        torch.testing.assert_close(out[:, channel], expected[channel].expand(2, 4, 4))
    assert out[:, 2].isnan().all() and given[2][2].isnan() and not given[2][[0, 1, *range(3, 8)]].isnan().any()


def test_running_statistics_are_optional(implementation):
    x, _, given = draw((2, 8, 3, 3))
    x, *given = placed((x, *given), implementation.device)
    out = norm_act(x, *given[:2], None, None, MOMENTUM, EPS, "silu")
    assert torch.equal(out, norm_act(x, *given, MOMENTUM, EPS, "silu")) and not out.requires_grad


def test_float64_and_narrow_parameters_are_the_references(implementation):
    x, _, given = draw((2, 3, 2, 2), torch.float64)
    wide = [t.double().to(implementation.device).requires_grad_() for t in (x, *given[:2])]
    with native.using("auto"):
        assert torch.autograd.gradcheck(lambda *t: norm_act(*t, None, None, MOMENTUM, EPS, "silu"), wide)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm_act(torch.ones(1, 8, 1, 1), torch.ones(8), torch.ones(8), None, None, 0.1, EPS, "silu")


def test_views_that_16_byte_accesses_cannot_read(implementation):
    x, _, given = draw((2, 8, 4, 4))
    x, *given = placed((x, *given), implementation.device, torch.channels_last)
    odd = torch.zeros(x.numel() + 1, device=x.device)[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2).copy_(x)
    expanded = torch.ones((), device=x.device).expand(x.shape)
    for a, b in zip(*(computed(norm_act, t, expanded, given, "silu") for t in (x, odd)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(implementation, dtype):
    x, upstream, given = draw((2, 8, 3, 4), dtype)
    x, upstream, *given = placed((x, upstream, *given), implementation.device, torch.channels_last)
    torch.library.opcheck(OP.default, (x, *given, MOMENTUM, EPS, index_of("silu")))
    kept = OP(x, *given, MOMENTUM, EPS, index_of("silu"))[1:]
    torch.library.opcheck(BACKWARD.default, (upstream, x, *given[:2], *kept, index_of("silu")))


def test_compiles(implementation):
    x, _, given = draw((2, 8, 3, 4))
    x, *given = placed((x, *given), implementation.device)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return norm_act(x * 2, weight, *given[1:], MOMENTUM, EPS, "silu") + 1

    torch.compiler.reset()
    before = [t.clone() for t in given]
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(x, given[0].requires_grad_())
    found = [out.detach(), torch.autograd.grad(out.sum(), given[0])[0], *(t.clone() for t in given[2:])]
    for t, value in zip(given[2:], before[2:], strict=True):
        t.copy_(value)
    out = run(x, given[0])
    expected = [out.detach(), torch.autograd.grad(out.sum(), given[0])[0], *given[2:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_wrong_arguments(implementation):
    device = implementation.device

    def a(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    c = a(8)
    for x, weight, bias, mean, variance, activation, message in (
        (a(8, 4, 4), c, c, None, None, 0, "N, C, H, W"),
        (a(2, 8, 4, 8)[..., ::2], c, c, None, None, 0, "channels_last or contiguous"),
        (a(1, 8, 1, 1), c, c, None, None, 0, "more than one value a channel"),
        (a(2, 8, 4, 4), a(4), c, None, None, 0, "weight must be float32"),
        (a(2, 8, 4, 4), c, c.half(), None, None, 0, "bias must be float32"),
        (a(2, 8, 4, 4), c, c, c, None, 0, "come together"),
        (a(2, 8, 4, 4), c, c, c, a(16)[::2], 0, "running variance must be"),
        (a(2, 8, 4, 4), c, c, None, None, 9, "activation is unknown"),
        (a(2, 8, 4, 4).double(), c, c, None, None, 0, "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(x, weight, bias, mean, variance, MOMENTUM, EPS, activation)
    x = a(2, 8, 4, 4)
    for grad, mean, message in (
        (x.half(), c, "gradient must be like x"), (a(2, 8, 4, 2), c, "shape and layout"), (x, a(4), "mean must be")
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            BACKWARD(grad, x, c, c, mean, c, 0)
