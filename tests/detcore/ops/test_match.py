"""Matching by the native op: bit for bit that of the reference, in every implementation."""

from functools import partial

import pytest
import torch

from detcore.boxes import iou
from detcore.device import native
from detcore.ops import match as ops_match
from detcore.ops.match import IGNORED, UNMATCHED
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.loss import MATCH

SIZE = (64, 96)
match, match_reference = (partial(f, **MATCH) for f in (ops_match.match, ops_match.match_reference))


def truth(seed: int, images: int, padded: int, used: float = 0.5, size=SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes on whole and half pixels, so that ties are common; padding anywhere, with any content."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    low = (torch.rand(images, padded, 2, generator=generator) * limit * 2).round() / 2
    extent = (torch.rand(images, padded, 2, generator=generator) ** 2 * limit * 2).round() / 2
    labels = torch.randint(9, (images, padded), generator=generator)
    labels = labels.where(torch.rand(images, padded, generator=generator) < used, -1)
    return torch.cat((low, low + extent), 2), labels


def check(implementation, a, boxes, labels) -> torch.Tensor:
    """The implementation's answer, which must be the reference's."""
    found = match(*(x.to(implementation.device) for x in (a, boxes, labels))).cpu()
    assert found.dtype == torch.int64
    assert torch.equal(found, match_reference(a, boxes, labels))
    return found


@pytest.mark.parametrize("used", [0.2, 1.0])
@pytest.mark.parametrize(("images", "padded"), [(1, 1), (3, 7), (2, 40), (5, 33)])
def test_equals_the_reference(implementation, images, padded, used):
    a = anchors(SIZE, grids(SIZE))
    found = check(implementation, a, *truth(images + padded, images, padded, used))
    assert (found == UNMATCHED).any()


@pytest.mark.parametrize("fractions", [3, 7, 10])
def test_fractions_of_pixels_are_rounded_alike(implementation, fractions):
    """Products of such coordinates are not exact, so that a contracted one would show."""
    a = anchors(SIZE, grids(SIZE)) / fractions
    boxes, labels = truth(fractions, 2, 30)
    found = check(implementation, a, boxes / fractions, labels)
    assert (found >= 0).any() and (found == IGNORED).any()


def test_more_boxes_than_any_buffer_holds(implementation):
    a = anchors((32, 32), grids((32, 32)))
    check(implementation, a, *truth(1, 2, 1300, used=0.6, size=(32, 32)))


@pytest.mark.parametrize("padded", [0, 1, 5])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_nothing_to_match(implementation, images, padded):
    a = anchors((32, 32), grids((32, 32)))
    found = check(implementation, a, torch.rand(images, padded, 4), torch.full((images, padded), -1))
    assert (found == UNMATCHED).all()
    no_anchors = (x.to(implementation.device) for x in (a[:0], *truth(2, images, padded)))
    assert match(*no_anchors).shape == (images, 0)


def test_strange_boxes(implementation):
    """Outside of the image, without area, inverted, equal, infinite, not a number: the reference's answer for all."""
    a = anchors(SIZE, grids(SIZE))
    nan, inf = float("nan"), float("inf")
    boxes = [
        [5000, 5000, 5010, 5010], [-90, -90, -80, -80], [20, 20, 20, 40], [30, 30, 10, 10], [8, 8, 40, 40],
        [8, 8, 40, 40], [0, 0, 96, 64], [0, 0, inf, inf], [nan, 0, 30, 30], [0, 0, 30, nan], [1e30, 0, 2e30, 1e30],
    ]  # fmt: skip
    labels = torch.zeros(1, len(boxes), dtype=torch.int64)
    found = check(implementation, a, torch.tensor([boxes], dtype=torch.float32), labels)
    assert set(found.unique().tolist()) <= {UNMATCHED, IGNORED, 4, 6, 7}


def test_thresholds_are_met_exactly(implementation):
    """Overlaps of exactly 0.4 and 0.5, and next to them."""
    a = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1)
    a[:, 2] = torch.tensor([4.0, 5, 3.9999998, 4.0000005, 4.9999995, 10])
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    found = check(implementation, a, boxes, torch.zeros(1, 1, dtype=torch.int64))
    assert found.tolist() == [[IGNORED, 0, UNMATCHED, IGNORED, IGNORED, 0]]


def test_views_and_other_layouts(implementation):
    a = anchors(SIZE, grids(SIZE))
    boxes, labels = truth(4, 3, 20)
    a, boxes, labels = (x.to(implementation.device) for x in (a, boxes, labels))
    part = match(a[1::3], boxes[:, 3:17], labels[:, 3:17])
    assert torch.equal(part, match_reference(a[1::3], boxes[:, 3:17], labels[:, 3:17]))


def test_opcheck(implementation):
    a = anchors((32, 32), grids((32, 32)))
    boxes, labels = truth(6, 2, 5)
    inputs = tuple(x.to(implementation.device) for x in (a, boxes, labels))
    torch.library.opcheck(torch.ops.detcore.match.default, (*inputs, 0.5, 0.4, 1))
    torch.library.opcheck(torch.ops.detcore.match.default, (inputs[1], *inputs[1:], 0.5, 0.4, 1))


def test_wrong_arguments_are_refused(implementation):
    a = anchors((32, 32), grids((32, 32))).to(implementation.device)
    boxes, labels = (x.to(implementation.device) for x in truth(6, 2, 5))
    op = torch.ops.detcore.match
    for wrong in (
        (a[:, :3], boxes, labels),
        (a[:4].expand(3, 4, 4), boxes, labels),
        (a, boxes[:1], labels),
        (a, boxes, labels.int()),
        (a.half(), boxes, labels),
    ):
        with pytest.raises(RuntimeError):
            op(*wrong, 0.5, 0.4, 1)
    for wrong in ((0.4, 0.5, 1), (0.5, -0.1, 1), (1.1, 0.5, 1), (0.5, 0.4, 3), (0.5, 0.4, -1)):
        with pytest.raises(RuntimeError, match=r"thresholds|low_quality"):
            op(a, boxes, labels, *wrong)


def test_float64_is_the_references():
    a = anchors(SIZE, grids(SIZE)).double()
    boxes, labels = truth(4, 3, 20)
    assert torch.equal(match(a, boxes, labels), match_reference(a, boxes, labels))
    assert not native.runs("detcore::match", a, dtypes=(torch.float32,))


@pytest.mark.parametrize("low_quality", ops_match.LOW_QUALITY)
@pytest.mark.parametrize(("high", "low"), [(0.5, 0.5), (0.7, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize(("images", "padded", "size"), [(3, 7, SIZE), (2, 300, (32, 32)), (1, 12, (256, 160))])
def test_other_recipes(implementation, images, padded, size, high, low, low_quality):
    """More anchors than a tile, more boxes than a block holds; many boxes, so that several claim one anchor."""
    a = anchors(size, grids(size))
    given = a, *truth(images + padded, images, padded, used=0.7, size=size)
    found = ops_match.match(*(x.to(implementation.device) for x in given), high, low, low_quality).cpu()
    assert torch.equal(found, ops_match.match_reference(*given, high, low, low_quality))


@pytest.mark.parametrize("low_quality", ops_match.LOW_QUALITY)
@pytest.mark.parametrize(("images", "count", "padded"), [(3, 40, 9), (2, 1500, 300), (1, 5, 0), (0, 7, 2), (4, 0, 3)])
def test_each_image_has_its_own_anchors(implementation, images, count, padded, low_quality):
    """As regions have them: what an image gets is what it gets alone."""
    a = truth(count, images, count)[0]
    boxes, labels = truth(padded, images, padded, used=0.8)
    found = ops_match.match(*(x.to(implementation.device) for x in (a, boxes, labels)), 0.5, 0.5, low_quality).cpu()
    assert found.shape == (images, count)
    assert torch.equal(found, ops_match.match_reference(a, boxes, labels, 0.5, 0.5, low_quality))
    for i in range(images):
        alone = ops_match.match_reference(a[i], boxes[i : i + 1], labels[i : i + 1], 0.5, 0.5, low_quality)
        assert torch.equal(found[i : i + 1], alone)


def by_hand(a, boxes, labels, high: float, low: float, low_quality: str) -> list[int]:
    """One image in loops over numpy-like scalars, as the three recipes are described."""
    real = [j for j in range(len(labels)) if labels[j] >= 0]
    overlap = {j: iou(a, boxes[j][None])[:, 0] for j in real}
    result = []
    for i in range(len(a)):
        values = [(float(overlap[j][i]), -j) for j in real]
        best, index = max(values, default=(0.0, 0))
        result.append(-index if best >= high else UNMATCHED if best < low else IGNORED)
        if low_quality == "ties" and any(0 < float(overlap[j][i]) == float(overlap[j].max()) for j in real):
            result[-1] = -index
    for j in reversed(real if low_quality == "best" else []):
        if float(overlap[j].max()) > 0:
            result[int((overlap[j] == overlap[j].max()).nonzero()[0])] = j
    return result


@pytest.mark.parametrize("low_quality", ops_match.LOW_QUALITY)
def test_the_recipes_are_what_they_say(low_quality):
    a = anchors((32, 32), grids((32, 32)))
    boxes, labels = truth(11, 4, 12, used=0.7, size=(32, 32))
    found = ops_match.match_reference(a, boxes, labels, 0.6, 0.4, low_quality)
    for image in range(4):
        assert found[image].tolist() == by_hand(a, boxes[image], labels[image], 0.6, 0.4, low_quality)
