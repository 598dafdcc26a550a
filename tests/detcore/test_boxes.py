"""Box arithmetic against torchvision's and closed forms."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from detcore.boxes import MAX_LOG_SCALE, areas, clip, decode, encode, iou


def random_boxes(seed: int, count: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 200 - 20
    return torch.cat((low, low + 1 + torch.rand(count, 2, generator=generator) * 90), 1).to(dtype)


def test_iou_is_torchvisions_bit_for_bit():
    a, b = random_boxes(1, 40), random_boxes(2, 70)
    assert torch.equal(iou(a, b), box_iou(a, b))


def test_iou_closed_forms():
    a = torch.tensor([[0.0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 7], [3, 3, 3, 3]])
    assert iou(a, b)[0].tolist() == pytest.approx([1, 1 / 3, 0, 0.1, 0])
    assert iou(b[4:], b[4:]).tolist() == [[0.0]]


def test_iou_of_batches():
    a, b = random_boxes(1, 12).reshape(3, 4, 4), random_boxes(2, 15).reshape(3, 5, 4)
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b)])
    assert torch.equal(iou(a, b), expected)


def test_areas():
    assert areas(torch.tensor([[1.0, 2, 4, 7], [0, 0, 0, 5]])).tolist() == [15, 0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_encode_and_decode_equal_torchvisions_coder(weights):
    coder = BoxCoder(weights=weights)
    boxes, anchors = random_boxes(3, 50), random_boxes(4, 50)
    expected = coder.encode_single(boxes, anchors)
    torch.testing.assert_close(encode(boxes, anchors, weights), expected, rtol=1e-6, atol=1e-6)
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(5)) * 3 * torch.tensor(weights)
    torch.testing.assert_close(decode(deltas, anchors, weights), coder.decode_single(deltas, anchors), rtol=0, atol=0)


def test_decode_inverts_encode():
    boxes, anchors = random_boxes(6, 50, torch.float64), random_boxes(7, 50, torch.float64)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-12, atol=1e-10)


def test_encode_closed_form():
    anchor = torch.tensor([0.0, 0, 10, 20])
    deltas = encode(torch.tensor([5.0, 10, 25, 20]), anchor)
    assert deltas.tolist() == pytest.approx([1.0, 0.25, math.log(2), math.log(0.5)])


def test_decode_limits_growth():
    grown = decode(torch.tensor([0.0, 0, 1000, MAX_LOG_SCALE + 1]), torch.tensor([-1.0, -1, 1, 1]))
    assert grown.tolist() == pytest.approx([-62.5, -62.5, 62.5, 62.5])


def test_clip_to_height_and_width():
    boxes = random_boxes(8, 60) * 3
    assert torch.equal(clip(boxes, (120, 300)), clip_boxes_to_image(boxes, (120, 300)))
    assert clip(torch.tensor([[-5.0, -6, 900, 800]]), (100, 50)).tolist() == [[0, 0, 50, 100]]
