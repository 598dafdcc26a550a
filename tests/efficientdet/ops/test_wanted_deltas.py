"""The deltas of positive anchors in one pass, over every implementation: against plain PyTorch and closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from detcore.boxes import encode
from detcore.device import native
from detcore.ops.match import match
from efficientdet.anchors import anchors
from efficientdet.loss import MATCH
from efficientdet.ops.wanted_deltas import wanted_deltas, wanted_deltas_reference

OP = torch.ops.efficientdet.wanted_deltas
SIZE = (128, 128)
GRID = anchors(SIZE)
LOG_ROUNDING = 2**-21
"""One in the last place of a logarithm from 4 to 8, which those of boxes of up to 2980 pixels stay below."""


def some_boxes(images: int, boxes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, boxes, 2, generator=generator) * 90
    return torch.cat((corners, corners + 2 + torch.rand(images, boxes, 2, generator=generator) * 90), 2)


def some_matches(images: int, boxes: int, seed: int = 0, positive: float = 0.1, count: int = len(GRID)) -> Tensor:
    """int64 [N, count]: any box for some of the anchors, -1 and -2 for the others."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(boxes, (images, count), generator=generator)
    none = torch.randint(-2, 0, (images, count), generator=generator)
    return owner.where(torch.rand(images, count, generator=generator) < positive, none)


def computed(implementation, *given: Tensor) -> Tensor:
    return wanted_deltas(*(x.to(implementation.device) for x in given)).cpu()


def check(found: Tensor, *given: Tensor) -> None:
    """Centres are the reference's in every bit; sizes but for the rounding of two logarithms."""
    expected = wanted_deltas_reference(*given)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found[..., :2], expected[..., :2])
    torch.testing.assert_close(found[..., 2:], expected[..., 2:], rtol=0, atol=2 * LOG_ROUNDING)


@pytest.mark.parametrize("positive", [0.0, 0.003, 0.5, 1.0])
@pytest.mark.parametrize(("images", "boxes"), [(1, 1), (3, 7)])
def test_equals_the_reference(implementation, images, boxes, positive):
    given = GRID, some_boxes(images, boxes), some_matches(images, boxes, 1, positive)
    found = computed(implementation, *given)
    check(found, *given)
    assert not found[given[2] < 0].any()


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 255, 256, 257])
def test_numbers_of_anchors_that_fill_no_block(implementation, count):
    given = GRID[:count], some_boxes(2, 3), some_matches(2, 3, count, 0.05, count)
    check(computed(implementation, *given), *given)


@pytest.mark.parametrize("seed", range(3))
def test_as_matched_against_float64(implementation, seed):
    """`encode` of the matched boxes in float64: less than 1e-6 of an anchor beside it; padding anywhere."""
    boxes = some_boxes(2, 9, seed)
    labels = torch.randint(-1, 3, (2, 9), generator=torch.Generator().manual_seed(seed))
    matched = match(GRID, boxes, labels, **MATCH)
    found, positive = computed(implementation, GRID, boxes, matched), matched >= 0
    assert 0 < positive.sum() < positive.numel() // 2 and not found[~positive].any()
    image, anchor = positive.nonzero().unbind(1)
    exact = encode(boxes.double()[image, matched[positive]], GRID.double()[anchor])
    torch.testing.assert_close(found[positive].double(), exact, rtol=0, atol=1e-6)


def test_every_bit_of_the_rounded_closed_form(implementation):
    """Each operation in float32 by NumPy, logarithms rounded from float64: the same bits on all processors."""
    boxes = some_boxes(1, len(GRID), 5)  # one an anchor, for rounding by `logf` differs in one of a thousand sizes
    found = computed(implementation, GRID, boxes, torch.arange(len(GRID))[None])[0].numpy()
    box, anchor = boxes[0].numpy(), GRID.numpy()

    def places(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = corners[:, 2:] - corners[:, :2]
        return corners[:, :2] + np.float32(0.5) * size, size, np.log(size.astype(np.float64)).astype(np.float32)

    (centre, _, log), (anchor_centre, anchor_size, anchor_log) = places(box), places(anchor)
    expected = np.concatenate(((centre - anchor_centre) / anchor_size, log - anchor_log), 1)
    assert expected.dtype == np.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("boxes", [0, 4])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_nothing_matched(implementation, images, boxes):
    found = computed(implementation, GRID, torch.rand(images, boxes, 4), torch.full((images, len(GRID)), -1))
    assert found.shape == (images, len(GRID), 4) and found.dtype == torch.float32 and not found.any()


def test_strange_boxes_and_anchors(implementation):
    """Without size, inverted, infinite, not a number, tiny, and where the anchor is one: as the reference."""
    nan, inf = torch.nan, torch.inf
    strange = torch.tensor([
        [20, 20, 20, 40], [20, 20, 40, 20], [7, 7, 7, 7], [30, 30, 10, 10], [0, 0, inf, inf], [-inf, 0, inf, 9],
        [nan, 0, 30, 30], [0, 0, 30, nan], [1e30, 0, 2e30, 1e30], [-3e38, 0, 3e38, 1], [0, 0, 1e-40, 1e-45],
        [8, 8, 40, 40],
    ])  # fmt: skip
    count = len(strange)
    matched = torch.arange(count)[:, None].expand(count, count).flatten()[None]
    given = strange.repeat(count, 1), strange[None], matched
    found, expected = computed(implementation, *given), wanted_deltas_reference(*given)
    assert not found.isnan().any() and torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=2 * LOG_ROUNDING)
    plain = computed(implementation, GRID, strange[None, :3], some_matches(1, 3, 0, 1.0))
    assert (plain == -torch.inf).any() and not (plain == torch.inf).any()


def test_matches_of_no_box_are_zeros(implementation):
    """An index past the last box reads nothing."""
    matched = torch.full((2, len(GRID)), -1)
    matched[0, 5], matched[1, 6] = 3, 2**40
    assert not computed(implementation, GRID, some_boxes(2, 3), matched).any()


def test_views_and_other_layouts(implementation):
    grid, boxes, matched = (x.to(implementation.device) for x in (GRID, some_boxes(3, 9), some_matches(3, 4)))
    odd = torch.zeros(boxes.numel() + 1, device=boxes.device)[1:].view_as(boxes).copy_(boxes)
    expected = wanted_deltas(grid, boxes, matched)
    assert torch.equal(wanted_deltas(grid, odd, matched), expected)
    part = grid[1::3], boxes[:, 2:7], matched.t().contiguous().t()[:, 1::3]
    assert torch.equal(wanted_deltas(*part), wanted_deltas(*(x.contiguous() for x in part)))
    check(wanted_deltas(*part).cpu(), *(x.cpu() for x in part))


def test_twice_the_same_without_gradients(implementation):
    given = [x.to(implementation.device) for x in (GRID, some_boxes(4, 5), some_matches(4, 5))]
    expected = wanted_deltas(*given)
    given[1].requires_grad_()
    again = wanted_deltas(*given)
    assert torch.equal(again, expected) and not again.requires_grad


def test_other_types_are_the_references(implementation):
    boxes, matched = some_boxes(2, 5), some_matches(2, 5)
    with native.using("auto"):
        for given in ((GRID.double(), boxes, matched), (GRID, boxes.double(), matched)):
            given = [x.to(implementation.device) for x in given]
            found = wanted_deltas(*given)
            assert found.dtype == given[0].dtype and torch.equal(found, wanted_deltas_reference(*given))


def test_registration(implementation):
    given = tuple(x.to(implementation.device) for x in (GRID[:40], some_boxes(2, 3), some_matches(2, 3, count=40)))
    torch.library.opcheck(OP.default, given)
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: wanted_deltas(*given) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), wanted_deltas(*given) * 2)


def test_wrong_arguments(implementation):
    grid, boxes, matched = (x.to(implementation.device) for x in (GRID[:40], some_boxes(2, 3), torch.zeros(2, 40)))
    matched = matched.long()
    for given, message in (
        ((grid[:, :3].contiguous(), boxes, matched), "anchors must be float32"),
        ((grid.double(), boxes, matched), "anchors must be float32"),
        ((grid[None], boxes, matched), "anchors must be float32"),
        ((grid[:39], boxes, matched), "matched must be int64"),
        ((grid, boxes, matched.int()), "matched must be int64"),
        ((grid, boxes, matched[0]), "matched must be int64"),
        ((grid, boxes[:1], matched), "boxes must be float32"),
        ((grid, boxes[0], matched), "boxes must be float32"),
        ((grid, boxes.half(), matched), "boxes must be float32"),
        ((grid, boxes[..., :3].contiguous(), matched), "boxes must be float32"),
        ((grid, boxes[:, ::2], matched), "boxes must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(*given)
