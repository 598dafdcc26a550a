"""Post-processing against torchvision's NMS, soft NMS written plainly, ties, NaN and padding."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detcore.boxes import decode
from detcore.ops.soft_nms import soft_nms
from efficientdet.anchors import anchors, grids
from efficientdet.postprocess import SOFT_FLOOR, SOFT_SIGMA, candidates, postprocess

SIZE, CLASSES = (128, 128), 3
GRID = anchors(SIZE)
COUNTS = [9 * rows * columns for rows, columns in grids(SIZE)]


def some_outputs(images: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(images, n, values, generator=generator) for n in COUNTS] for values in (CLASSES, 4)]
    return made[0], [0.3 * x for x in made[1]]


def wanted(logits: list[Tensor], deltas: list[Tensor], extent: Tensor, topk: int, image: int):
    """Boxes, scores and labels of one image, as the original finds them."""
    wide, narrow = (torch.cat(levels, 1)[image] for levels in (logits, deltas))
    values, pair = wide.flatten().topk(topk)
    boxes = decode(narrow[pair // CLASSES], GRID[pair // CLASSES])
    height, width = extent[image].tolist()
    boxes = torch.stack((boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)), 2).flatten(1)
    return boxes, values.sigmoid(), pair % CLASSES


@pytest.mark.parametrize("topk", [200, 5000])
def test_detections_are_the_originals(topk):
    logits, deltas = some_outputs(2, topk)
    extent = torch.tensor([[128, 128], [70, 128]])
    boxes, scores, labels = postprocess(logits, deltas, GRID, extent, topk=topk)
    assert boxes.shape == (2, 100, 4) and scores.shape == labels.shape == (2, 100)
    for image in range(2):
        expected = wanted(logits, deltas, extent, topk, image)
        kept = batched_nms(*expected, 0.5)[:100]
        found = labels[image] >= 0
        assert int(found.sum()) == len(kept)
        for mine, theirs in zip((boxes, scores, labels), expected):
            torch.testing.assert_close(mine[image][found], theirs[kept])
            assert (mine[image][~found] == (-1 if mine is labels else 0)).all()
    assert boxes[1, :, 1::2].max() <= 70 < boxes[0, :, 1::2].max()


def softly(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[tuple[int, float]]:
    """The paper's loop, one pair at a time."""
    live, found = dict(enumerate(scores.tolist())), []
    overlaps = box_iou(boxes, boxes)
    while live:
        best = max(live, key=lambda k: live[k])
        found.append((best, live.pop(best)))
        for k in live:
            if labels[k] == labels[best]:
                live[k] *= math.exp(-(float(overlaps[best, k]) ** 2) / 0.5)
        live = {k: score for k, score in live.items() if score > 0.001}
    return found


def test_soft_suppression():
    logits, deltas = some_outputs(1, 5)
    extent = torch.tensor([SIZE])
    boxes, scores, labels = (x[None] for x in wanted(logits, deltas, extent, 150, 0))
    positions, values = soft_nms(boxes, scores, labels, 100, SOFT_SIGMA, SOFT_FLOOR)
    expected = softly(boxes[0], scores[0], labels[0])[:100]
    assert positions[0].tolist() == [k for k, _ in expected]
    assert values[0].tolist() == pytest.approx([score for _, score in expected], rel=1e-4)
    found = postprocess(logits, deltas, GRID, extent, topk=150, soft=True)
    torch.testing.assert_close(found[1], values)
    torch.testing.assert_close(found[0][0], boxes[0][positions[0]])


def test_soft_suppression_leaves_places_unused():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]])
    scores, labels = torch.tensor([[0.9, 0.005, 0.0009]]), torch.zeros(1, 3, dtype=torch.int64)
    positions, values = soft_nms(boxes, scores, labels, 4, SOFT_SIGMA, SOFT_FLOOR)
    assert positions.tolist() == [[0, -1, -1, -1]] and values[0, 1:].tolist() == [0, 0, 0]


def test_ties_go_to_the_lowest_level_anchor_and_class():
    scores, at, labels = candidates([torch.zeros(1, n, CLASSES) for n in COUNTS], 7)
    assert at.tolist() == [[0, 0, 0, 1, 1, 1, 2]] and labels.tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert (scores == 0.5).all()


def test_the_whole_of_a_small_canvas():
    """Fewer pairs than topk, an anchor with a NaN among its logits, and one with huge deltas."""
    logits, deltas = some_outputs(1, 3)
    logits[0][0, 0, 1], deltas[0][0, 1] = torch.nan, 1e6
    pairs = sum(COUNTS) * CLASSES
    scores, at, _ = candidates(logits, 10**6)
    assert scores.shape == (1, pairs) and (scores[0, -CLASSES:] == -1).all() and (scores[0, :-CLASSES] >= 0).all()
    assert not (at[0, :-CLASSES] == 0).any()
    found = postprocess(logits, deltas, GRID, torch.tensor([SIZE]), topk=10**6)
    assert all(x.isfinite().all() for x in found)
