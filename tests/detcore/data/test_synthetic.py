"""Synthetic batches keep the contract of `Batch`."""

import pytest
import torch

from detcore.data.synthetic import synthetic_batches


@pytest.mark.parametrize("max_boxes", [1, 7, 50])
def test_contract(max_boxes):
    batch = next(synthetic_batches(5, (48, 64), 6, max_boxes, seed=1))
    assert batch.images.shape == (6, 3, 48, 64) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and batch.images.float().std() > 50
    assert batch.boxes.shape == (6, max_boxes, 4) and batch.boxes.dtype == torch.float32
    assert batch.labels.shape == (6, max_boxes) and batch.labels.dtype == torch.int64
    assert batch.image_id.tolist() == list(range(6)) and batch.size.tolist() == [[48, 64]] * 6
    assert batch.image_id.dtype == batch.size.dtype == torch.int64
    real = batch.labels >= 0
    assert real[:, 0].all() and (real.int().diff(dim=1) <= 0).all(), "real boxes come first"
    assert batch.labels.max() < 5 and batch.labels[~real].eq(-1).all() and batch.boxes[~real].eq(0).all()
    boxes = batch.boxes[real]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([64, 48])).all()
    assert (boxes[:, 2] - boxes[:, 0] >= 3.99).all() and (boxes[:, 3] - boxes[:, 1] >= 2.99).all()


def test_the_seed_decides():
    a, b, c = (next(synthetic_batches(5, (16, 16), 2, 4, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.images, c.images)
