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


@pytest.mark.parametrize("max_edges", [60, 400])
def test_masks_are_ellipses_in_their_boxes(max_edges):
    plain = next(synthetic_batches(5, (48, 64), 6, 12, seed=3))
    batch = next(synthetic_batches(5, (48, 64), 6, 12, seed=3, max_edges=max_edges))
    assert all(torch.equal(x, y) for x, y in zip(plain[:6], batch[:6], strict=True))
    assert plain.edges.shape == (6, 0, 4) and batch.edges.shape == (6, max_edges, 4)
    for n in range(6):
        of = batch.edge_of[n]
        used = int((of[:, 0] >= 0).sum())
        assert (of[:used, 0].diff() >= 0).all() and (of[used:] == -1).all() and (batch.edges[n, used:] == 0).all()
        for k in range(int((batch.labels[n] >= 0).sum())):
            x1, y1, x2, y2 = batch.edges[n, of[:, 0] == k].unbind(1)
            assert len(x1) >= 3 and torch.equal(x2, x1.roll(-1)) | torch.allclose(x2, x1.roll(-1), atol=1e-4)
            area = abs(float((x1 * y2 - x2 * y1).sum())) / 2
            width, height = (batch.boxes[n, k, 2:] - batch.boxes[n, k, :2]).tolist()
            assert 0.4 * width * height < area < 0.79 * width * height
            assert (x1 != x2).all() and x1.min() >= batch.boxes[n, k, 0] and y1.max() <= batch.boxes[n, k, 3]


@pytest.mark.parametrize("room", [1, 2, 3, 6, 40])
def test_where_there_is_little_room_the_first_boxes_alone_have_masks(room):
    """As in a data set whose masks are rectangles, of which the edges straight down are left out."""
    batch = next(synthetic_batches(5, (64, 96), 2, 8, 1, room))
    assert batch.edges.shape == (2, room, 4) and batch.edge_of.shape == (2, room, 2)
    boxes, parts = batch.edge_of.unbind(2)
    assert (boxes[:, 0] == 0).all() and (parts[boxes >= 0] == 0).all()
    if room >= 3:
        counts = [row[row >= 0].bincount() for row in boxes]
        assert all((count >= 3).all() for count in counts)
