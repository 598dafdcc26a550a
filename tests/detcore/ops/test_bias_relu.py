"""Bias, residual and ReLU in one pass, over every implementation, against plain PyTorch."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore.device import native
from detcore.ops import bias_relu as module
from detcore.ops.bias_relu import bias_relu, bias_relu_apart, bias_relu_reference, conv_bias_relu, conv_bias_relu_apart

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
SHAPES = [
    *((2, c, 3, 5) for c in (1, 3, 5, 8, 64, 256, 264)),
    *((3, c, 1, 1) for c in (1, 7, 16)),
    *((n, c, h, w) for n, c, h, w in ((0, 8, 4, 4), (2, 8, 0, 3), (1, 3, 9, 11), (1, 2, 4, 8), (5, 40, 13, 7))),
]
OP = torch.ops.detcore.bias_relu


def tensors(shape, dtype, layout, device, residual=True, bias_dtype=torch.float32) -> list[Tensor]:
    """x, bias and residual in steps of 1/8, so that many sums are exactly 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(shape, dtype), (shape[1:2], bias_dtype), (shape, dtype)][: 2 + residual]
    values = [(torch.randint(-12, 13, size, generator=generator) / 8).to(device, kind) for size, kind in sizes]
    return [v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in values]


def on(device: torch.device, value: Tensor) -> Tensor:
    """A value on a device, feature maps in channels_last."""
    value = value.to(device)
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Equal also in the signs of zeros."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def with_gradients(function, values: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [v.detach().clone().requires_grad_() for v in values]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(implementation, dtype, layout):
    for shape, residual in itertools.product(SHAPES, (False, True)):
        values = tensors(shape, dtype, layout, implementation.device, residual)
        upstream = tensors(shape, dtype, layout, implementation.device)[2]
        found = with_gradients(bias_relu, values, upstream)
        expected = with_gradients(bias_relu_reference, values, upstream)
        assert found[0].stride() == values[0].stride()
        for index, (a, b) in enumerate(zip(found, expected)):
            if index == 2:  # sums over a channel, in another order; exact here in float32: all are multiples of 1/8
                torch.testing.assert_close(a, b, rtol=0, atol=0, msg=f"{shape} {residual}")
            else:
                assert equal_bits(a, b), (shape, residual, index)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_random_values_and_the_sums_of_many_rows(implementation, bias_dtype):
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, 24, 33, 35), (1, 520, 9, 9), (1, 5, 70, 61)):
        values = [torch.randn(s, generator=generator) for s in (shape, shape[1:2], shape, shape)]
        x, bias, residual, upstream = (on(implementation.device, v) for v in values)
        bias = bias.to(bias_dtype)
        found = with_gradients(bias_relu, [x, bias, residual], upstream)
        expected = with_gradients(bias_relu_reference, [x, bias, residual], upstream)
        assert all(equal_bits(found[i], expected[i]) for i in (0, 1, 3))
        exact = expected[1].double().sum((0, 2, 3))
        assert found[2].dtype == bias_dtype
        tolerance = 1e-6 if bias_dtype == torch.float32 else 4e-3
        torch.testing.assert_close(found[2].double(), exact, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-7, -1e-7, 6e4], dtype=dtype)
    x = special.repeat(2, 1, 3).permute(0, 2, 1).reshape(2, 24, 1, 1).repeat(1, 1, 2, 3)
    x = on(implementation.device, x)
    bias = torch.tensor([-0.0, 0.0, 1.0], device=implementation.device).repeat_interleave(8)
    upstream = on(implementation.device, torch.arange(1.0, x.numel() + 1).view(x.shape).to(dtype))
    found, grad, _ = with_gradients(bias_relu, [x, bias], upstream)
    # On the CPU: a GPU's maximum of -0 and 0, which torch.relu is there, is 0.
    expected, expected_grad, _ = with_gradients(bias_relu_reference, [x.cpu(), bias.cpu()], upstream.cpu())
    found, grad = found.cpu(), grad.cpu()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    assert equal_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(grad, expected_grad)
    assert torch.signbit(found[found == 0]).any()
    assert grad[found.isnan()].all(), "the gradient passes where the output is NaN, as in torch.relu"


def test_the_reference_in_float64():
    x, bias, residual = tensors((2, 3, 4, 5), torch.float64, torch.contiguous_format, "cpu", True, torch.float64)
    leaves = [(v + 0.01).requires_grad_() for v in (x, bias, residual)]  # never at the kink
    assert torch.autograd.gradcheck(bias_relu, leaves)
    assert torch.autograd.gradcheck(bias_relu, leaves[:2])
    with native.using("reference"):
        assert equal_bits(bias_relu(x, bias), F.relu(x + bias.view(-1, 1, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout):
    for dtype, shape in ((torch.bfloat16, (2, 16, 3, 4)), (torch.float32, (1, 3, 3, 5)), (torch.float16, (0, 8, 2, 2))):
        x, bias, residual = tensors(shape, dtype, layout, implementation.device)
        leaves = [v.requires_grad_() for v in (x, bias, residual)]
        torch.library.opcheck(OP.default, (*leaves, True))
        torch.library.opcheck(OP.default, (x.detach(), bias, None, True))
        torch.library.opcheck(OP.default, (x.detach(), bias.detach(), None, False))
        mask = torch.full([(x.numel() + 7) // 8], 0x5A, dtype=torch.uint8, device=x.device)
        for sums in (False, True):
            for grads in itertools.accumulate([[residual.detach()]] * 3):
                given = (grads[0], mask, sums, *grads[1:])
                torch.library.opcheck(torch.ops.detcore.bias_relu_backward.default, given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_of_several_uses_are_added_where_they_are_masked(implementation, dtype, layout):
    for shape, uses in itertools.product(SHAPES, (1, 2, 3)):
        values = tensors(shape, dtype, layout, implementation.device)
        generator = torch.Generator().manual_seed(uses)
        upstream = [torch.randn(shape, generator=generator).to(values[0]) for _ in range(uses)]
        upstream = [u.contiguous(memory_format=layout) for u in upstream]
        leaves = [v.clone().requires_grad_() for v in values]
        outs = bias_relu_apart(*leaves)
        assert all(o.data_ptr() == outs[0].data_ptr() and equal_bits(o, outs[0]) for o in outs)
        found = torch.autograd.grad(outs[3 - uses :], leaves, upstream)
        total = sum((u.float() for u in upstream[1:]), upstream[0].float()).to(dtype)
        out, *expected = with_gradients(bias_relu, values, total)
        assert equal_bits(outs[2].detach(), out) and equal_bits(found[0], expected[0])
        assert equal_bits(found[2], expected[2]) and found[0].stride() == values[0].stride()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
        if uses == 2:  # what autograd adds by itself, in every bit
            out = bias_relu(*leaves)
            assert equal_bits(torch.autograd.grad([out, out], leaves, upstream)[0], found[0])


def test_uses_apart_without_gradients_or_the_op(implementation):
    x, bias, residual = tensors((2, 8, 3, 5), torch.float32, torch.channels_last, implementation.device)
    assert all(out is first for first, *rest in [bias_relu_apart(x, bias, residual)] for out in rest)
    with native.using("reference"):
        a, b, c = bias_relu_apart(x.clone().requires_grad_(), bias, residual)
    assert a is b is c and a.requires_grad
    leaf = x.clone().requires_grad_()
    a, b, c = bias_relu_apart(leaf, bias)
    assert torch.autograd.grad(a.sum() * 0 + 1, leaf, allow_unused=True)[0].eq(0).all()
    mask, op = torch.zeros(30, dtype=torch.uint8, device=x.device), torch.ops.detcore.bias_relu_backward
    for wrong in (x.contiguous(), x.half(), x[:1]):
        with pytest.raises(RuntimeError, match="gradients"):
            op(x, mask, False, wrong)


@pytest.mark.parametrize("fused", [False, True])
def test_conv_bias_relu_apart_is_for_the_variant_alone(implementation, monkeypatch, fused):
    monkeypatch.setattr(module, "leaves_bias", lambda x, conv: fused)
    conv = nn.Conv2d(8, 16, 1).to(implementation.device)
    x, _ = tensors((2, 8, 5, 7), torch.float32, torch.channels_last, implementation.device, residual=False)
    plain = conv_bias_relu_apart(x, conv, conv.weight, conv.bias)
    with native.using("native", "residual_gradient"):
        found = conv_bias_relu_apart(x, conv, conv.weight, conv.bias)
    assert isinstance(plain, Tensor) and isinstance(found, tuple) == fused
    assert torch.equal(plain, found[0] if fused else found)


def test_compiles(implementation):
    values = tensors((2, 16, 4, 5), torch.float32, torch.channels_last, implementation.device)

    def doubled(x, bias, residual):
        return bias_relu(x * 2, bias, residual) + 1

    upstream = torch.ones_like(values[0])
    found = with_gradients(torch.compile(doubled, backend="aot_eager", fullgraph=True), values, upstream)
    assert all(map(equal_bits, found, with_gradients(doubled, values, upstream)))


def saved_bytes(function) -> tuple[Tensor, int]:
    """The result of a function, and how much it keeps for the backward."""
    count = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(), count


def test_keeps_one_bit_a_value(implementation):
    x, bias, residual = tensors((2, 16, 5, 7), torch.bfloat16, torch.channels_last, implementation.device)
    x.requires_grad_()
    assert saved_bytes(lambda: bias_relu(x, bias, residual))[1] == x.numel() / 8
    assert saved_bytes(lambda: bias_relu(x.detach(), bias, residual))[1] == 0
    with torch.no_grad():
        assert OP(x, bias, residual, False)[1].numel() == 0
        assert not bias_relu(x, bias, residual).requires_grad


def test_the_bias_gradient_is_skipped_unless_wanted(implementation, monkeypatch):
    asked = []
    backward = torch.ops.detcore.bias_relu_backward

    def spy(grad: Tensor, mask: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
        asked.append(sums)
        return backward(grad, mask, sums)

    monkeypatch.setattr(torch.ops.detcore, "bias_relu_backward", spy)
    x, bias, residual = tensors((2, 16, 5, 7), torch.float32, torch.channels_last, implementation.device)
    bias_relu(x.requires_grad_(), bias, residual).sum().backward()
    bias_relu(x, bias.requires_grad_(), residual).sum().backward()
    assert asked == [False, True] and bias.grad is not None


def test_inputs_and_output_may_change_in_place_afterwards(implementation):
    """Only the mask is kept: neither change touches the gradient."""
    x, bias, residual = tensors((2, 8, 3, 3), torch.float32, torch.channels_last, implementation.device)
    expected = with_gradients(bias_relu, [x, bias, residual], torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    copy, shared = leaf * 1, residual.clone().requires_grad_()
    out = bias_relu(copy, bias, shared)
    with torch.no_grad():
        copy.fill_(-5.0)
        shared.fill_(-5.0)
    out.mul_(3.0)
    out.sum().backward()
    assert torch.equal(leaf.grad, 3 * expected[1]) and torch.equal(shared.grad, 3 * expected[3])
    leaf.grad.zero_()  # the two gradients come as one tensor, but each leaf owns its own
    assert torch.equal(shared.grad, 3 * expected[3])


def test_x_as_its_own_residual_and_gradients_of_another_layout(implementation):
    x, bias = tensors((2, 8, 3, 5), torch.float32, torch.channels_last, implementation.device, residual=False)
    for upstream in (torch.ones((), device=x.device).expand(x.shape), torch.ones(x.shape, device=x.device)):
        found = with_gradients(lambda a, b: bias_relu(a, b, a), [x, bias], upstream)
        expected = with_gradients(lambda a, b: bias_relu_reference(a, b, a), [x, bias], upstream)
        assert all(map(torch.equal, found, expected))


def test_views_that_16_byte_accesses_cannot_read(implementation):
    x, bias, residual = tensors((4, 8, 3, 3), torch.bfloat16, torch.channels_last, implementation.device)
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    odd = buffer[1:].view(4, 3, 3, 8).permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(bias_relu(odd, bias, residual), bias_relu_reference(x, bias, residual))
    part, other = x[:, :, 1:], residual[:, 1:].contiguous()
    assert torch.equal(bias_relu(part, bias), bias_relu_reference(part, bias)), "neither layout"
    assert torch.equal(bias_relu(x[:, 1:], bias[1:], other), bias_relu_reference(x[:, 1:], bias[1:], other))
    mixed = residual.contiguous()
    assert torch.equal(bias_relu(x, bias, mixed), bias_relu_reference(x, bias, mixed)), "residual of another layout"


def test_bad_arguments_are_refused(implementation):
    x, bias, residual = tensors((2, 8, 3, 3), torch.float32, torch.channels_last, implementation.device)
    for wrong in (
        (x, bias[1:], None), (x, bias.double(), None), (x[0], bias, None), (x[:, :, 1:], bias, None),
        (x, bias, residual.contiguous()), (x, bias, residual[:1]), (x, bias, residual.half()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            OP(*wrong, True)
    with pytest.raises(RuntimeError, match="mask"):
        torch.ops.detcore.bias_relu_backward(x, torch.zeros(3, dtype=torch.uint8, device=x.device), False)


def test_the_number_of_threads_does_not_matter():
    if native.load("detcore"):
        pytest.skip(native.load("detcore"))
    threads, results = torch.get_num_threads(), []
    generator = torch.Generator().manual_seed(5)
    x, upstream = (torch.randn(4, 24, 64, 70, generator=generator) for _ in range(2))
    bias = torch.randn(24, generator=generator)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with native.using("native"):
                for layout in LAYOUTS:
                    a, b = (t.contiguous(memory_format=layout) for t in (x, upstream))
                    results.append(with_gradients(bias_relu, [a, bias], b))
    finally:
        torch.set_num_threads(threads)
    for later in (2, 4):
        for layout in (0, 1):
            assert all(map(torch.equal, results[layout], results[later + layout]))


def test_autocast_keeps_the_bias_in_float32(implementation):
    x, bias = tensors((2, 16, 3, 5), torch.bfloat16, torch.channels_last, implementation.device, residual=False)
    bias = bias + 2**-12  # lost if it were rounded to bfloat16 before the sum
    with torch.autocast(implementation.device.type, torch.bfloat16):
        found = bias_relu(x, bias)
    assert found.dtype == torch.bfloat16 and torch.equal(found, bias_relu_reference(x, bias))


@pytest.mark.parametrize("fused", [False, True])
def test_conv_bias_relu_equals_the_modules(implementation, monkeypatch, fused):
    monkeypatch.setattr(module, "leaves_bias", lambda x, conv: fused)
    conv = nn.Conv2d(8, 16, 3, padding=1).to(implementation.device, memory_format=torch.channels_last)
    x, _ = tensors((2, 8, 5, 7), torch.float32, torch.channels_last, implementation.device, residual=False)
    with torch.no_grad(), native.using("reference"):
        expected, plain = F.relu(conv(x)), conv(x)
    torch.testing.assert_close(conv_bias_relu(x, conv), expected)
    found = conv_bias_relu(x, conv, conv.weight * 2, conv.bias * 2, plain.clone())
    torch.testing.assert_close(found, F.relu(3 * plain))
    found.sum().backward()
    assert conv.weight.grad.abs().sum() > 0 and conv.bias.grad.abs().sum() > 0
