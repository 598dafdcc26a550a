"""Batches of random values with the signature of the real ones, for benchmarks and warm-up."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from detcore.data.batch import Batch, whole_images


def synthetic_batches(
    num_classes: int, image_size: tuple[int, int], batch_size: int, max_boxes: int, seed: int, max_edges: int = 0
) -> Iterator[Batch]:
    """An endless stream of one and the same batch, made once from the seed.

    Shapes and dtypes as in `Batch`, images in channels_last memory like those of the loaders; 1 to min(max_boxes, 20)
    boxes an image, at least 1/16 of the image's side wide and high; image ids count from 0, size is image_size.
    max_edges: of an image; with it each box has a mask, the ellipse in it as a polygon of up to 32 edges.
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
    if max_edges:
        batch = batch._replace(**dict(zip(("edges", "edge_of"), _ellipses(batch, max_edges), strict=True)))
    while True:
        yield batch


def _ellipses(batch: Batch, max_edges: int) -> tuple[Tensor, Tensor]:
    """Edges [N, max_edges, 4] and what they belong to [N, max_edges, 2]; as many for each box.

    Where there is no room for three edges of each box, the first ones alone have masks.
    """
    count, most = batch.labels.shape
    masked = max(1, min(int((batch.labels >= 0).sum(1).max()), max_edges // 3))
    each = max(3, min(32, max_edges // masked))
    corner, size = batch.boxes[..., :2], batch.boxes[..., 2:] - batch.boxes[..., :2]
    turn = torch.arange(each + 1) * (2 * math.pi / each) + 0.1  # no edge straight down
    circle = 0.5 + 0.5 * torch.stack([turn.cos(), turn.sin()], 1)
    points = corner[:, :, None] + circle * size[:, :, None]
    found = torch.cat([points[:, :, :-1], points[:, :, 1:]], 3).flatten(1, 2)
    box = torch.arange(most).repeat_interleave(each).expand(count, -1)
    real = (batch.labels.gather(1, box) >= 0) & (box < masked)
    edges = torch.zeros(count, max_edges, 4)
    edge_of = torch.full((count, max_edges, 2), -1)
    used = min(max_edges, found.shape[1])  # the real boxes come first
    edges[:, :used] = found[:, :used].where(real[:, :used, None], 0)
    edge_of[:, :used] = torch.stack([box, torch.zeros_like(box)], 2)[:, :used].where(real[:, :used, None], -1)
    return edges, edge_of
