"""The matching of two detectors: the rules written plainly, and RetinaNet's own reference."""

import pytest
import torch

from detcore.boxes import iou
from detcore.ops import match, pieces
from detcore.ops.match import IGNORED, UNMATCHED, match_reference
from single_stage_detector.ops.match import match_reference as retinanet

GRID = torch.tensor([[8.0 * x, 8.0 * y, 8.0 * x + w, 8.0 * y + w] for y in range(8) for x in range(8) for w in (8, 20)])
"""On whole pixels, so that many overlaps tie."""


def some_boxes(seed: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 50, (3, count, 2), generator=generator)
    boxes = torch.cat((corners, corners + torch.randint(0, 24, (3, count, 2), generator=generator)), 2).float()
    return boxes, torch.randint(-1, 3, (3, count), generator=generator)


def plainly(anchors, boxes, labels, foreground, background, ties):
    rows = []
    for box, label in zip(boxes, labels):
        real = (label >= 0).nonzero()[:, 0]
        overlaps = iou(box[real], anchors)
        row = torch.full((len(anchors),), UNMATCHED)
        for anchor in range(len(anchors) if len(real) else 0):
            best = float(overlaps[:, anchor].max())
            owner = int(real[overlaps[:, anchor].argmax()])
            row[anchor] = owner if best >= foreground else UNMATCHED if best < background else IGNORED
            tops = [k for k in range(len(real)) if 0 < overlaps[k].max() == overlaps[k, anchor]]
            if ties and tops:
                row[anchor] = owner
            firsts = [k for k in tops if int(overlaps[k].argmax()) == anchor]
            if not ties and firsts:
                row[anchor] = int(real[firsts[0]])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("elements", [1, 10**6], ids=["box by box", "all at once"])
@pytest.mark.parametrize("ties, background", [(True, 0.4), (False, 0.5), (False, 0.3)])
@pytest.mark.parametrize("seed", range(5))
def test_rules(monkeypatch, seed, ties, background, elements):
    monkeypatch.setattr(match, "work_elements", lambda device: elements)
    boxes, labels = some_boxes(seed)
    found = match_reference(GRID, boxes, labels, 0.5, background, ties)
    assert torch.equal(found, plainly(GRID, boxes, labels, 0.5, background, ties))
    assert (found >= 0).any() and (found == UNMATCHED).any()
    if ties:
        assert torch.equal(found, retinanet(GRID, boxes, labels))


def test_two_boxes_claim_one_anchor():
    """The first box has it; the second one's next best overlap is below the threshold, so that it has none."""
    boxes = torch.tensor([[[0.0, 0, 6, 6], [0, 0, 7, 5]]])
    anchors = torch.tensor([[0.0, 0, 8, 8], [30, 30, 38, 38]])
    assert match_reference(anchors, boxes, torch.tensor([[0, 1]]), 0.9, 0.9, ties=False).tolist() == [[0, UNMATCHED]]
    assert match_reference(anchors, boxes, torch.tensor([[-1, 1]]), 0.9, 0.9, ties=False).tolist() == [[1, UNMATCHED]]


def test_nothing_to_match():
    for boxes in (torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)):
        labels = torch.full(boxes.shape[:2], -1)
        assert (match_reference(GRID, boxes, labels, 0.5, 0.5, ties=False) == UNMATCHED).all()


def test_pieces_are_larger_where_memory_is():
    assert pieces.work_elements(torch.device("cpu")) < pieces.work_elements(torch.device("meta"))
