"""Batches of random values with the signature of the real ones, for benchmarks and warm-up."""

from collections.abc import Iterator

import torch

from detcore.data.batch import Batch, whole_images


def synthetic_batches(
    num_classes: int, image_size: tuple[int, int], batch_size: int, max_boxes: int, seed: int
) -> Iterator[Batch]:
    """An endless stream of one and the same batch, made once from the seed.

    Shapes and dtypes as in `Batch`, images in channels_last memory like those of the loaders; 1 to min(max_boxes, 20)
    boxes an image, at least 1/16 of the image's side wide and high; image ids count from 0, size is image_size.
    """
    random = torch.Generator().manual_seed(seed)
    height, width = image_size
    images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=random)
    corner = torch.rand(batch_size, max_boxes, 2, generator=random) * 0.75
    extent = 1 / 16 + torch.rand(batch_size, max_boxes, 2, generator=random) * (0.25 - 1 / 16)
    boxes = torch.cat([corner, corner + extent], 2) * torch.tensor([width, height, width, height])
    labels = torch.randint(0, num_classes, (batch_size, max_boxes), generator=random)
    count = torch.randint(1, min(max_boxes, 20) + 1, (batch_size, 1), generator=random)
    padding = torch.arange(max_boxes) >= count
    batch = whole_images(
        images=images.permute(0, 3, 1, 2),
        boxes=boxes.masked_fill(padding[..., None], 0),
        labels=labels.masked_fill(padding, -1),
        image_id=torch.arange(batch_size),
        size=torch.tensor([[height, width]] * batch_size),
    )
    while True:
        yield batch
