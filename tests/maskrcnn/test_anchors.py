"""Anchors, levels and the two conventions of boxes, against the original's numbers and torchvision's."""

import json
import math
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detcore import boxes as algebra
from maskrcnn.anchors import cell_anchors, clip, inside, level_anchors, pooled
from maskrcnn.model import MaskRCNN
from maskrcnn.roi_heads import levels_of
from tests.maskrcnn.settings import FPN, SMALL, settings

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "maskrcnn.json").read_text())


def original(boxes: torch.Tensor) -> torch.Tensor:
    """Half-open boxes in the original's numbers, whose x2, y2 are the last pixels."""
    return boxes - torch.tensor([0.0, 0, 1, 1])


@pytest.mark.parametrize("name", GOLDEN["cell_anchors_fpn"])
def test_cell_anchors_of_a_pyramid(name):
    stride, size = (int(part.lstrip("stridez")) for part in name.split("_"))
    assert original(cell_anchors(stride, (size,))).tolist() == GOLDEN["cell_anchors_fpn"][name]


def test_cell_anchors_of_one_map():
    found = original(cell_anchors(16, (32, 64, 128, 256, 512)))
    assert found.tolist() == GOLDEN["cell_anchors_c4_stride16"]


def test_anchors_of_an_image():
    model, golden = MaskRCNN(settings(FPN, SMALL, rpn_only=True)), GOLDEN["anchors_for_800x1344_fpn"]
    levels = model.rpn.anchors([tuple(grid) for grid in golden["grids"]])
    assert sum(map(len, levels)) == golden["count"]


def test_the_other_convention_is_torchvisions():
    """In an image of whole multiples of the stride: elsewhere torchvision stretches its grid."""
    sizes, ratios = (32, 64), (0.5, 1.0, 2.0)
    generator = AnchorGenerator((sizes,), (ratios,))
    image = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    (theirs,) = generator(image, [torch.zeros(1, 1, 4, 6)])
    assert torch.equal(level_anchors(cell_anchors(16, sizes, ratios, legacy=False), (4, 6), 16), theirs)


@pytest.mark.parametrize("golden", GOLDEN["level_assignment"], ids=lambda golden: str(golden["box_sqrt_area"]))
def test_levels(golden):
    side = golden["box_sqrt_area"]
    box = torch.tensor([[[10.0, 20, 10 + side, 20 + side]]])
    assert levels_of(box, 2, 5).item() + 2 == golden["level"]


def test_levels_of_boxes_without_area():
    box = torch.tensor([[[5.0, 5, 5, 5], [9, 9, 3, 40], [0, 0, 1e6, 1e6]]])
    assert levels_of(box, 2, 5).tolist() == [[0, 0, 3]]


def test_the_original_ignores_anchors_that_leave_the_image():
    """Its rule, x1 >= -t and x2 < width + t with x2 the last pixel; t below 0 ignores none."""
    anchors = level_anchors(cell_anchors(16, (32,)), (6, 8), 16)
    extent = torch.tensor([[96, 128], [50, 77]])
    x1, y1, x2, y2 = original(anchors).unbind(1)
    for straddle in (0, 5):
        for row, (height, width) in enumerate(extent.tolist()):
            wanted = (x1 >= -straddle) & (y1 >= -straddle) & (x2 < width + straddle) & (y2 < height + straddle)
            assert torch.equal(inside(anchors, extent, straddle)[row], wanted)
    assert inside(anchors, extent, -1).all()
    assert inside(anchors, extent, 0, legacy=False).sum(1).tolist() == inside(anchors, extent, 0).sum(1).tolist()


def test_clipping():
    """The original cuts x1 and x2 to 0..width - 1, so that a box outside keeps one column of pixels."""
    boxes = torch.tensor([[[-5.0, 3, 4, 9], [90, 90, 95, 99], [3, 4, 5, 6], [-9, -9, -4, -4]]])
    extent = torch.tensor([[40, 60]])
    wanted = original(boxes)
    wanted = torch.stack([wanted[..., k].clamp(0, (59, 39)[k % 2]) for k in range(4)], 2)
    assert torch.equal(original(clip(boxes, extent)), wanted)
    assert clip(boxes, extent, legacy=False)[0].tolist() == [[0, 3, 4, 9], [60, 40, 60, 40], [3, 4, 5, 6], [0, 0, 0, 0]]


def test_regions_are_pooled_to_the_originals_corner():
    boxes = torch.tensor([[[1.0, 2, 30, 40]]])
    assert pooled(boxes).tolist() == [[[1, 2, 29, 39]]] and torch.equal(pooled(boxes, legacy=False), boxes)


def test_half_open_algebra_is_the_originals():
    """Overlaps, targets and decoded boxes by its formulas, which add and subtract 1."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 40, 4, generator=generator, dtype=torch.float64) * 50).unbind(0)
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    weights = (10.0, 10.0, 5.0, 5.0)

    def size(boxes):
        return boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1

    (aw, ah), (bw, bh) = size(a), size(b)
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low + 1).clamp(min=0).prod(2)
    overlap = shared / ((aw * ah)[:, None] + bw * bh - shared)
    own = a + torch.tensor([0, 0, 1, 1]), b + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(algebra.iou(*own), overlap)
    dx, dy = (b[:, 0] + 0.5 * bw - a[:, 0] - 0.5 * aw) / aw, (b[:, 1] + 0.5 * bh - a[:, 1] - 0.5 * ah) / ah
    wanted = torch.stack((10 * dx, 10 * dy, 5 * (bw / aw).log(), 5 * (bh / ah).log()), 1)
    deltas = algebra.encode(own[1], own[0], weights)
    torch.testing.assert_close(deltas, wanted)
    centre = torch.stack((deltas[:, 0] / 10 * aw + a[:, 0] + 0.5 * aw, deltas[:, 1] / 10 * ah + a[:, 1] + 0.5 * ah), 1)
    grown = deltas[:, 2:].div(5).clamp(max=math.log(1000 / 16)).exp() * torch.stack((aw, ah), 1)
    boxes = torch.cat((centre - 0.5 * grown, centre + 0.5 * grown - 1), 1)
    torch.testing.assert_close(original(algebra.decode(deltas, own[0], weights)), boxes)
    assert abs(GOLDEN["delta_clip"] - algebra.MAX_LOG_SCALE) < 1e-6
