"""Predicted masks laid into their images, run-length encoded: what COCO's evaluation reads."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from detcore.device import native
from detcore.evaluation.rle import Rles

OP = "detcore::paste"


def paste_reference(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float = 0.5) -> Rles:
    """`paste` detection by detection, as maskrcnn-benchmark does it: each image is drawn, then encoded."""
    from pycocotools import mask as coco_mask

    side = masks.shape[-1]
    found = []
    for mask, box, (height, width) in zip(masks.float(), boxes.float(), sizes.tolist(), strict=True):
        half, centre = (box[2:] - box[:2]) * 0.5, (box[2:] + box[:2]) * 0.5
        half = half * ((side + 2) / side)
        x1, y1, x2, y2 = torch.cat([centre - half, centre + half]).to(torch.int32).tolist()
        image = torch.zeros(height, width, dtype=torch.uint8)
        left, right, top, bottom = max(x1, 0), min(x2 + 1, width), max(y1, 0), min(y2 + 1, height)
        if right > left and bottom > top:
            size = (y2 - y1 + 1, x2 - x1 + 1)
            pixels = interpolate(pad(mask, (1, 1, 1, 1))[None, None], size, mode="bilinear", align_corners=False)
            part = pixels[0, 0, top - y1 : bottom - y1, left - x1 : right - x1]
            image[top:bottom, left:right] = part > threshold
        found.append(coco_mask.encode(image.t().contiguous().numpy().T))
    return Rles.of(found)


@torch.no_grad()
def paste(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float = 0.5) -> Rles:
    """The masks of D detections in their images. All tensors lie on the CPU.

    masks: [D, M, M], probabilities, the mask of a box from its corner to its corner. boxes: [D, 4], x1, y1, x2, y2 in
    pixels of the original image. sizes: int64 [D, 2], height and width of each one's image. A pixel belongs to the mask
    if its probability is above the threshold.

    The arithmetic is maskrcnn-benchmark's (Masker with padding 1): zeros around the mask, the box made larger by
    (M + 2) / M about its centre, its corners cut to whole numbers, the mask scaled bilinearly (align_corners=False) to
    the pixels from corner to corner, both included. The native op draws no image: it follows the columns of a box and
    looks at single pixels only where neighbouring values of the mask lie on both sides of the threshold. Raises
    RuntimeError for tensors of other shapes.
    """
    given = masks.float().contiguous(), boxes.float().contiguous(), sizes.contiguous()
    if native.runs(OP, *given, dtypes=(torch.float32,)):
        text, counts, areas = torch.ops.detcore.paste(*given, threshold)
        return Rles(text.numpy(), counts.numpy(), sizes.numpy(), areas.numpy())
    return paste_reference(*given, threshold)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        letters = torch.library.get_ctx().new_dynamic_size()
        counts, areas = (masks.new_empty(len(masks), dtype=torch.int64) for _ in range(2))
        return masks.new_empty(letters, dtype=torch.uint8), counts, areas
