"""A pyramid's node in one pass, over every implementation, against plain PyTorch and float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detcore.device import native
from detcore.ops.activation import ACTIVATIONS
from efficientdet.ops.fuse import fuse, fuse_reference

OP, BACKWARD = torch.ops.efficientdet.fuse, torch.ops.efficientdet.fuse_backward_
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
NODES = ((0, 1), (0, 0, -1), (0, -1, 1), (0,), (0, 1, 1), (0, 0, 0))
"""The steps of a node's maps; the model has the first two."""
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of one rounding to the type, relative; with what a fast exponential adds."""


def draw(shape, steps, coarse=None, seed: int = 0) -> list[Tensor]:
    """Maps for a node [N, C, H, W], float32 in steps of 1/8, so that many are alike and many sums are 0.

    coarse: height and width of the coarser maps; by default half the node's, rounded up.
    """
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    sizes = {0: (h, w), 1: coarse or ((h + 1) // 2, (w + 1) // 2), -1: (2 * h - h % 2, 2 * w - w // 2 % 2)}
    return [torch.randint(-24, 25, (n, c, *sizes[step]), generator=generator) / 8 for step in steps]


def computed(function, maps: list[Tensor], steps, weights: Tensor | None, upstream: Tensor, *options) -> list[Tensor]:
    """The output and the gradients of the maps and of the weights."""
    maps = [x.detach().requires_grad_() for x in maps]
    inputs = maps if weights is None else [*maps, weights.detach().requires_grad_()]
    out = function(maps, steps, None if weights is None else inputs[-1], *options)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def placed(maps: list[Tensor], device: torch.device, layout: torch.memory_format) -> list[Tensor]:
    return [x.to(device).contiguous(memory_format=layout) for x in maps]


def check(shape, steps, dtype, layout, device, same, activation, weighted=True, coarse=None) -> None:
    """The op against the reference on the same values in float64; of float32 in every bit, but for SiLU and weights.

    Values and weights are such that float32 holds the sums exactly: activations begin and end at the same places.
    """
    maps = [x.to(dtype) for x in draw(shape, steps, coarse)]
    upstream = (torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(1)) / 8).to(dtype)
    weights = torch.tensor([0.5, 0.25, 1.5])[: len(steps)] if weighted else None
    given = placed(maps, device, layout)
    on_device = None if weights is None else weights.to(device)
    found = computed(fuse, given, steps, on_device, upstream.to(device), same, activation)
    assert found[0].dtype == dtype and found[0].shape == shape and found[0].is_contiguous(memory_format=layout)
    for x, gradient in zip(given, found[1:], strict=False):
        assert gradient.dtype == dtype and gradient.stride() == x.stride()
    wide = None if weights is None else weights.double()
    exact = computed(fuse_reference, [x.double() for x in maps], steps, wide, upstream.double(), same, activation)
    # A coarse cell's gradient is the sum of those of the cells that it feeds, four where sizes halve, each one rounded.
    fed = [upstream.shape[2:].numel() / x.shape[2:].numel() for x in maps]
    sums = [6 * ROUNDING[dtype] * max(1.0, cells / 4) ** 0.5 for cells in fed]
    most = [1.5 * ROUNDING[dtype], *sums, 1e-6 * float(upstream.double().abs().sum())]
    for i, (a, b, error) in enumerate(zip(found, exact, most, strict=False)):
        apart = (a.double().cpu() - b).abs() / b.abs().clamp(min=1)
        assert not apart.numel() or float(apart.max()) <= error, (i, shape, steps, same, activation)
    if dtype == torch.float32 and activation != "silu":
        rounded = computed(fuse_reference, maps, steps, weights, upstream, same, activation)
        for a, b in zip(found[: 1 + len(maps)], rounded, strict=False):
            assert torch.equal(a.cpu(), b), (shape, steps, same, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_node(implementation, dtype, layout):
    names = itertools.cycle(("silu", "none", "relu6", "silu", "relu"))
    for steps, same, channels in itertools.product(NODES, (False, True), (8, 5)):
        weighted = channels == 8 or same
        check((2, channels, 4, 3), steps, dtype, layout, implementation.device, same, next(names), weighted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edges(implementation, layout):
    """One cell, no image, sizes that are not twice the coarser one's, more places than a block has threads."""
    device = implementation.device
    for shape, coarse in (
        ((1, 8, 1, 1), (1, 1)), ((2, 3, 1, 5), None), ((0, 8, 4, 4), None), ((2, 8, 5, 3), (3, 2)),
        ((1, 4, 7, 9), (2, 4)), ((1, 8, 3, 4), (5, 7)), ((3, 16, 2, 2), (2, 2)), ((2, 72, 6, 5), None),
    ):  # fmt: skip
        for steps, same in (((0, 1), True), ((0, 0, -1), True), ((0, 0, -1), False), ((0, -1, 1), False)):
            check(shape, steps, torch.float32, layout, device, same, "relu6", coarse=coarse)
            check(shape, steps, torch.bfloat16, layout, device, same, "silu", coarse=coarse)


@settings(max_examples=25)
@given(data=st.data())
def test_random_shapes(implementation, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)))
    coarse = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    steps, dtype, layout, name = (data.draw(st.sampled_from(x)) for x in (NODES, DTYPES, LAYOUTS, list(ACTIVATIONS)))
    same, weighted = data.draw(st.booleans()), data.draw(st.booleans())
    check(shape, steps, dtype, layout, implementation.device, same, name, weighted, coarse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_values_in_every_bit(implementation, layout):
    """Float32, without SiLU, against the reference on the CPU; and twice the same, also the weights' gradients."""
    generator = torch.Generator().manual_seed(3)
    shape, weights = (2, 24, 9, 7), torch.rand(3, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    for steps, same in (((0, 0, -1), True), ((0, -1, 1), False)):
        maps = [torch.randn(x.shape, generator=generator) for x in draw(shape, steps)]
        expected = computed(fuse_reference, maps, steps, weights, upstream, same, "relu6")
        given = placed([*maps, upstream], implementation.device, layout), weights.to(implementation.device)
        runs = [computed(fuse, given[0][:-1], steps, given[1], given[0][-1], same, "relu6") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(runs[0][:-1], expected, strict=False))
        torch.testing.assert_close(runs[0][-1].cpu(), expected[-1], rtol=1e-5, atol=1e-4)


def test_silu_over_the_range_of_float32(implementation):
    """A few roundings from float64, and nothing where the exponential ends."""
    x = torch.cat((torch.linspace(-90, 90, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, 1e-3, -1e-3])))
    x = x.view(1, 1, 1, -1).to(implementation.device)
    found = computed(fuse, [x], (0,), None, torch.ones_like(x), False, "silu")
    exact = computed(fuse_reference, [x.double()], (0,), None, torch.ones_like(x).double(), False, "silu")
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=1e-35)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, dtype):
    """NaN at every place of a window, windows of minus infinity alone; NaN passes every activation."""
    fine = torch.full((9, 8, 3, 3), -1.0, dtype=dtype)
    for place in range(9):
        fine[place, :4].flatten(1)[:, place] = torch.nan
    fine[:, 4:] = -torch.inf
    own = torch.zeros(9, 8, 2, 2, dtype=dtype)
    own[:, 7] = torch.nan
    for same, activation in itertools.product((False, True), ("none", "relu", "relu6")):
        expected = computed(fuse_reference, [own, fine], (0, -1), None, torch.ones_like(own), same, activation)
        given = placed([own, fine], implementation.device, torch.channels_last)
        found = computed(fuse, given, (0, -1), None, torch.ones_like(given[0]), same, activation)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isnan().cpu(), b.isnan())
            assert torch.equal(a.nan_to_num(7.0).cpu(), b.nan_to_num(7.0))
        assert found[0][:, :4].isnan().any()
    given = placed([own], implementation.device, torch.channels_last)
    assert fuse(given, (0,), None, False, "silu")[:, 7].isnan().all()


def test_float64_and_other_types_are_the_references(implementation):
    maps = [x.double().to(implementation.device).requires_grad_() for x in draw((1, 2, 3, 4), (0, -1, 1))]
    maps = [(x + torch.randn_like(x)).detach().requires_grad_() for x in maps]  # no two maxima alike
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64, device=implementation.device, requires_grad=True)
    with native.using("auto"):
        assert torch.autograd.gradcheck(lambda w, *maps: fuse(maps, (0, -1, 1), w, True, "silu"), [weights, *maps])
        mixed = [maps[0].float().detach(), maps[1].half().detach()]
        assert torch.equal(fuse(mixed, (0, -1), None, True), fuse_reference(mixed, (0, -1), None, True))


def test_gradients_only_where_they_are_wanted(implementation):
    maps = placed(draw((1, 8, 4, 4), (0, 0, -1)), implementation.device, torch.channels_last)
    weights = torch.tensor([0.5, 1.0, 2.0], device=implementation.device)
    assert not fuse(maps, (0, 0, -1), weights, True).requires_grad
    maps[2].requires_grad_()
    out = fuse(maps, (0, 0, -1), weights, True, "silu")
    alone = torch.autograd.grad(out, maps[2], torch.ones_like(out))[0]
    together = computed(fuse, maps, (0, 0, -1), weights, torch.ones_like(out), True, "silu")
    assert torch.equal(alone, together[3])
    with torch.no_grad():
        assert torch.equal(fuse(maps, (0, 0, -1), weights, True, "silu"), out)


def test_mixed_layouts_views_and_an_expanded_gradient(implementation):
    """What 16-byte accesses can't read, or lies otherwise than the first map, gives the same."""
    maps = placed(draw((2, 8, 4, 4), (0, 0, -1)), implementation.device, torch.channels_last)
    one = torch.ones((), device=implementation.device)
    expected = computed(fuse, maps, (0, 0, -1), None, one.expand(2, 8, 4, 4), True, "silu")
    odd = torch.zeros(maps[1].numel() + 1, device=one.device)[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2).copy_(maps[1])
    for other in ([maps[0], odd, maps[2]], [maps[0].contiguous(), *maps[1:]], [*maps[:2], maps[2].contiguous()]):
        found = computed(fuse, other, (0, 0, -1), None, one.expand(2, 8, 4, 4), True, "silu")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(OP([maps[0], odd], None, [0, 0], True, 3), fuse(maps[:2], (0, 0), None, True, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(implementation, dtype):
    maps = placed(draw((2, 8, 3, 4), (0, -1, 1)), implementation.device, torch.channels_last)
    maps = [x.to(dtype) for x in maps]
    weights = torch.ones(3, device=implementation.device)
    torch.library.opcheck(OP.default, (maps, weights, [0, 2, 1], False, 3))
    outs = [torch.zeros_like(x) for x in maps], torch.zeros(3, device=implementation.device)
    torch.library.opcheck(BACKWARD.default, (*outs, torch.ones_like(maps[0]), maps, weights, [0, 2, 1], False, 3))


def test_compiles(implementation):
    maps = placed(draw((1, 8, 4, 4), (0, 1)), implementation.device, torch.channels_last)
    weights = torch.tensor([0.5, 1.5], device=implementation.device)

    def run(*maps: Tensor) -> Tensor:
        return fuse([x * 2 for x in maps], (0, 1), weights, True, "silu") + 1

    torch.compiler.reset()
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*maps), run(*maps))


def test_wrong_arguments(implementation):
    device = implementation.device

    def a(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    own, whole = a(1, 8, 4, 4), torch.ones(1, 8, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    for maps, weights, how, activation, message in (
        ([own] * 4, None, [0] * 4, 0, "1 to 3 maps"),
        ([own, own], None, [0], 0, "1 to 3 maps"),
        ([own], None, [1], 0, "the first map must have the node's size"),
        ([own], None, [0], 4, "activation is unknown"),
        ([own, own], None, [0, 3], 0, "resampling is unknown"),
        ([a(8, 4, 4)], None, [0], 0, "N, C, H, W"),
        ([own, a(1, 7, 4, 4)], None, [0, 0], 0, "one number of channels"),
        ([own, own.half()], None, [0, 0], 0, "one dtype"),
        ([own, a(1, 8, 4, 2)], None, [0, 0], 0, "has not the node's size"),
        ([own, a(1, 8, 9, 8)], None, [0, 2], 0, "twice the node's size"),
        ([own, a(1, 8, 0, 2)], None, [0, 1], 0, "no cells"),
        ([own, whole], None, [0, 2], 0, "all contiguous or all channels_last"),
        ([own], a(2), [0], 0, "one a map"),
        ([own], a(1, dtype=torch.float16), [0], 0, "weights must be float32"),
        ([own.double()], None, [0], 0, "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(maps, weights, how, False, activation)
    for grads, weight_grad, grad, message in (
        ([], a(0), own, "each map has a gradient"),
        ([a(1, 8, 4, 2)], a(0), own, "a map's gradient must lie"),
        ([a(1, 8, 4, 4)], a(0), whole, "the gradient must lie"),
        ([a(1, 8, 4, 4)], a(0), own.half(), "the gradient must lie"),
        ([a(1, 8, 4, 4)], a(3), own, "one a map or none"),
    ):
        with pytest.raises(RuntimeError, match=message):
            BACKWARD(grads, weight_grad, grad, [own], None, [0], False, 0)
