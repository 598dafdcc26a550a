"""Pasted masks against maskrcnn-benchmark's own steps, one detection at a time, encoded by pycocotools."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate

from detcore.device import native
from detcore.ops.paste import paste, paste_reference


def original(mask: torch.Tensor, box: torch.Tensor, height: int, width: int, threshold: float) -> torch.Tensor:
    """bool [height, width]: expand_masks, expand_boxes and paste_mask_in_image of the original, padding 1."""
    side = mask.shape[-1]
    padded = torch.zeros(side + 2, side + 2)
    padded[1:-1, 1:-1] = mask
    wide, high = (box[2] - box[0]) * 0.5, (box[3] - box[1]) * 0.5
    x, y = (box[2] + box[0]) * 0.5, (box[3] + box[1]) * 0.5
    wide, high = wide * (float(side + 2) / side), high * (float(side + 2) / side)
    box = torch.stack([x - wide, y - high, x + wide, y + high]).to(torch.int32)
    w, h = max(int(box[2] - box[0] + 1), 1), max(int(box[3] - box[1] + 1), 1)
    pixels = interpolate(padded[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0] > threshold
    image = torch.zeros(height, width, dtype=torch.bool)
    x0, x1 = max(int(box[0]), 0), min(int(box[2]) + 1, width)
    y0, y1 = max(int(box[1]), 0), min(int(box[3]) + 1, height)
    if x1 > x0 and y1 > y0:  # the original fails at boxes outside of their image
        image[y0:y1, x0:x1] = pixels[y0 - int(box[1]) : y1 - int(box[1]), x0 - int(box[0]) : x1 - int(box[0])]
    return image


def encoded(image: torch.Tensor) -> dict:
    return coco_mask.encode(np.asfortranarray(image.numpy().astype(np.uint8)))


def masks_of(kind: str, count: int, side: int, random: torch.Generator) -> torch.Tensor:
    if kind == "noise":
        return torch.rand(count, side, side, generator=random)
    if kind == "saturated":
        return (torch.rand(count, side, side, generator=random) > 0.5).float()
    at = torch.linspace(-1, 1, side)  # a blob with a soft rim, as networks make them
    centre, radius = torch.rand(2, count, 1, 1, generator=random) - 0.5, 0.3 + torch.rand(count, 1, 1, generator=random)
    return torch.sigmoid((radius - ((at - centre[0]) ** 2 + (at[:, None] - centre[1]) ** 2).sqrt()) * 20)


def boxes_of(count: int, sizes: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Inside, across the border, outside, without area, inverted, larger than the image."""
    limit = sizes.flip(1).float()
    corner = (torch.rand(count, 2, generator=random) * 1.3 - 0.2) * limit
    extent = (torch.rand(count, 2, generator=random) ** 2 * 1.2 - 0.02) * limit
    return torch.cat([corner, corner + extent], 1)


@pytest.fixture(params=["native", "reference"])
def call(request):
    """The op, and the loop that stands in for it where it is not built."""
    if request.param == "reference":
        return paste_reference
    assert native.loaded("detcore::paste")
    return paste


@pytest.mark.parametrize("kind", ["blob", "noise", "saturated"])
@pytest.mark.parametrize(
    ("side", "height", "width"), [(28, 120, 160), (14, 97, 61), (1, 20, 30), (28, 1, 1), (7, 300, 9)]
)
def test_equals_the_original(call, kind, side, height, width):
    random = torch.Generator().manual_seed(side * height)
    sizes = torch.tensor([[height, width]]).repeat(40, 1)
    masks, boxes = masks_of(kind, 40, side, random), boxes_of(40, sizes, random)
    found = call(masks, boxes, sizes).dictionaries()
    images = [original(mask, box, height, width, 0.5) for mask, box in zip(masks, boxes, strict=True)]
    assert found == [encoded(image) for image in images]
    if side > 1 and height > 1:
        assert sum(int(image.sum()) for image in images) > 50


def test_images_of_several_sizes_and_other_thresholds(call):
    random = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 200, (60, 2), generator=random)
    masks, boxes = masks_of("blob", 60, 28, random), boxes_of(60, sizes, random)
    for threshold in (0.0, 0.3, 0.9, 1.0):
        found = call(masks, boxes, sizes, threshold)
        each = zip(masks, boxes, sizes.tolist(), strict=True)
        assert found.dictionaries() == [encoded(original(m, b, *size, threshold)) for m, b, size in each]
        assert found.sizes.tolist() == sizes.tolist()
        assert found.areas.tolist() == [coco_mask.area(one) for one in found.dictionaries()]


def test_whole_boxes_of_ones_and_the_border(call):
    """A mask of ones fills its box to the last pixel, and what of the image a larger one covers."""
    sizes = torch.tensor([[40, 50]] * 2)
    boxes = torch.tensor([[10.0, 10, 38, 38], [-20, -20, 90, 90]])
    found = coco_mask.decode(call(torch.ones(2, 28, 28), boxes, sizes).dictionaries())
    rows, columns = np.nonzero(found[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 38, 10, 38) and len(rows) == 29 * 29
    assert found[..., 1].all()


def test_nothing(call):
    assert call(torch.zeros(0, 28, 28), torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)).dictionaries() == []
    one = torch.tensor([[30, 20]])
    assert coco_mask.area(call(torch.zeros(1, 28, 28), torch.tensor([[1.0, 1, 9, 9]]), one).dictionaries()[0]) == 0
    far = torch.tensor([[1e30, 1, 2e30, 9]])
    assert coco_mask.area(paste(torch.ones(1, 28, 28), far, one).dictionaries()[0]) == 0


def test_half_precision_and_other_layouts():
    random = torch.Generator().manual_seed(5)
    sizes = torch.tensor([[60, 70]]).repeat(10, 1)
    masks, boxes = masks_of("blob", 10, 28, random).half(), boxes_of(10, sizes, random)
    turned = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert paste(turned, boxes.double(), sizes).dictionaries() == paste_reference(masks, boxes, sizes).dictionaries()


def test_opcheck_and_wrong_arguments():
    masks, boxes, sizes = torch.rand(3, 4, 4), torch.rand(3, 4) * 9, torch.full((3, 2), 12)
    torch.library.opcheck(torch.ops.detcore.paste.default, (masks, boxes, sizes, 0.5))
    for wrong, words in (
        ((masks[:, :3].contiguous(), boxes, sizes), "masks"),
        ((masks.double(), boxes, sizes), "masks"),
        ((masks, boxes[:2], sizes), "boxes"),
        ((masks, boxes, sizes.int()), "sizes"),
        ((masks, boxes, sizes * 0), "sizes"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.detcore.paste(*wrong, 0.5)
