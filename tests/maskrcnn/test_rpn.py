"""Proposals against a loop over images and levels, the sampler, and the losses of the proposal network."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import nms

from detcore.boxes import decode, encode, iou
from maskrcnn.anchors import cell_anchors, clip, level_anchors
from maskrcnn.rpn import Matching, Selection, propose, rpn_losses, sample

STRIDES, SIZES = (8, 16, 32), (12, 24, 48)
CANVAS = (96, 128)
EXTENT = torch.tensor([[96, 128], [90, 70], [40, 128]])


def outputs(canvas=CANVAS, images=3, dtype=torch.float32):
    """Random logits, deltas, with the anchors and grids that belong to them."""
    generator = torch.Generator().manual_seed(0)
    grids = [(canvas[0] // stride, canvas[1] // stride) for stride in STRIDES]
    anchors = [
        level_anchors(cell_anchors(stride, (size,)).to(dtype), grid, stride)
        for stride, size, grid in zip(STRIDES, SIZES, grids, strict=True)
    ]
    logits = [torch.randn(images, len(a), generator=generator, dtype=dtype) for a in anchors]
    deltas = [torch.randn(images, len(a), 4, generator=generator, dtype=dtype) * 0.3 for a in anchors]
    return logits, deltas, anchors, grids


def by_loop(given, selection: Selection, legacy: bool) -> list[list[tuple[float, list[float]]]]:
    """(score, box) of each image, best first: the original's steps one after the other."""
    logits, deltas, anchors, grids = given
    found = []
    for image, (height, width) in enumerate(EXTENT.tolist()):
        own = []
        for level, (rows, columns) in enumerate(grids):
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            reached = ((y * STRIDES[level] < height) & (x * STRIDES[level] < width)).flatten().repeat_interleave(3)
            places = reached.nonzero()[:, 0]
            scores, order = logits[level][image, places].sigmoid().sort(descending=True, stable=True)
            places = places[order][: selection.before]
            boxes = clip(decode(deltas[level][image, places], anchors[level][places])[None], EXTENT[[image]], legacy)[0]
            keep = ((boxes[:, 2:] - boxes[:, :2]) >= selection.min_size).all(1)
            boxes, scores = boxes[keep], scores[: selection.before][keep]
            kept = nms(boxes, scores, selection.nms_thresh)[: selection.after]
            own += list(zip(scores[kept].tolist(), boxes[kept].tolist(), strict=True))
        found.append(sorted(own, key=lambda pair: -pair[0]))
    if selection.over_batch:
        least = sorted((score for own in found for score, _ in own), reverse=True)[: selection.together][-1]
        return [[pair for pair in own if pair[0] >= least] for own in found]
    return [own[: selection.together] for own in found]


SELECTIONS = {
    "all levels": Selection(40, 30, 50, False),
    "whole batch": Selection(40, 30, 60, True, nms_thresh=0.5),
    "no limit": Selection(1000, 12, None),
    "more than there are": Selection(1000, 1000, 10**6, True),
    "large ones": Selection(40, 30, 20, False, min_size=20),
}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", SELECTIONS)
def test_proposals_are_those_of_a_loop(name, legacy):
    given = outputs()
    found = propose(given[0], given[1], given[2], STRIDES, given[3], EXTENT, SELECTIONS[name], legacy)
    for image, expected in enumerate(by_loop(given, SELECTIONS[name], legacy)):
        real = found.scores[image] >= 0
        order = found.scores[image][real].argsort(descending=True, stable=True)
        assert real.sum() == len(expected) > 3
        torch.testing.assert_close(found.scores[image][real][order], torch.tensor([score for score, _ in expected]))
        torch.testing.assert_close(found.boxes[image][real][order], torch.tensor([box for _, box in expected]))


def test_the_shape_is_fixed():
    logits, deltas, anchors, grids = outputs()
    for extent in (EXTENT, EXTENT // 50 + 1):
        found = propose(logits, deltas, anchors, STRIDES, grids, extent, SELECTIONS["whole batch"])
        assert found.boxes.shape == (3, 60, 4) and found.scores.shape == (3, 60)
    assert found.boxes.isfinite().all() and (found.scores >= 0).any(1).all()


def test_a_larger_canvas_changes_nothing():
    """What the padding says, however sure of it, is no proposal."""
    small, large = outputs((64, 64), 1), outputs(CANVAS, 1)
    for level in range(len(STRIDES)):
        (rows, columns), wide = small[3][level], large[3][level]
        for part in (0, 1):
            cells = large[part][level].unflatten(1, (*wide, 3))
            cells[:] = 9
            cells[:, :rows, :columns] = small[part][level].unflatten(1, (rows, columns, 3))
    extent = torch.tensor([[60, 50]])
    results = [propose(*x[:3], STRIDES, x[3], extent, Selection(200, 40, 30)) for x in (small, large)]
    assert torch.equal(results[0].boxes, results[1].boxes) and torch.equal(results[0].scores, results[1].scores)


def test_an_image_alone_is_an_image_in_a_batch():
    logits, deltas, anchors, grids = outputs()
    selection = SELECTIONS["all levels"]
    together = propose(logits, deltas, anchors, STRIDES, grids, EXTENT, selection)
    for i in range(3):
        own = [x[i : i + 1] for x in logits], [x[i : i + 1] for x in deltas]
        alone = propose(*own, anchors, STRIDES, grids, EXTENT[i : i + 1], selection)
        assert torch.equal(alone.boxes[0], together.boxes[i]) and torch.equal(alone.scores[0], together.scores[i])


def test_numbers_that_are_none_propose_nothing():
    logits, deltas, anchors, grids = outputs()
    for level in logits:
        level[0, ::2] = torch.nan
        level[1] = torch.nan
    found = propose(logits, deltas, anchors, STRIDES, grids, EXTENT, SELECTIONS["all levels"])
    assert (found.scores[1] < 0).all() and (found.scores[0] >= 0).any() and found.boxes.isfinite().all()


@pytest.mark.parametrize(
    ("positives", "negatives", "chosen", "valid"),
    [(50, 100, 16, 64), (3, 100, 3, 64), (0, 100, 0, 64), (50, 10, 16, 26), (3, 2, 3, 5), (0, 0, 0, 0)],
)
def test_how_many_are_sampled(positives, negatives, chosen, valid):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    positive, negative = torch.zeros(2, 1, 200, dtype=torch.bool)
    positive[0, order[:positives]] = negative[0, order[positives : positives + negatives]] = True
    found = sample(positive, negative, 64, 0.25)
    assert found.at.shape == (1, 64) and found.positive.sum() == chosen and found.valid.sum() == valid
    assert found.positive[0, :chosen].all() and found.valid[0, :valid].all()  # positives first, then negatives
    assert positive[0, found.at[0, :chosen]].all() and negative[0, found.at[0, chosen:valid]].all()
    assert len(found.at[0, :valid].unique()) == valid


def test_each_place_is_as_likely_as_the_others():
    """Of 40 positives 10 are taken and of 60 negatives 30: the counts of 2000 draws lie within 5 deviations."""
    positive = (torch.arange(100) < 40).expand(2000, -1)
    torch.manual_seed(3)
    found = sample(positive, ~positive, 40, 0.25)
    counts = torch.zeros(100).scatter_add_(0, found.at.flatten(), found.valid.flatten().float())
    for part, chance in ((counts[:40], 10 / 40), (counts[40:], 30 / 60)):
        assert (part - 2000 * chance).abs().max() < 5 * (2000 * chance * (1 - chance)) ** 0.5


def test_fewer_places_than_wanted():
    positive = torch.tensor([[True, False, False], [True, True, True]])
    found = sample(positive, ~positive, 256, 0.5)
    assert found.at.shape == (2, 3) and found.positive.sum(1).tolist() == [1, 3] and found.valid.all()


def scene(dtype=torch.float32):
    """Two images with boxes and one without, and what the network says of them."""
    logits, deltas, anchors, _ = outputs(dtype=dtype)
    boxes = torch.tensor([[[10.0, 8, 40, 33], [60, 40, 75, 52]], [[20, 20, 44, 46], [0, 0, 0, 0]], [[0.0] * 4] * 2])
    labels = torch.tensor([[2, 0], [1, -1], [-1, -1]])
    return torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), boxes.to(dtype), labels


def test_losses_by_hand():
    """All anchors are sampled. An anchor is positive from an IoU of .7 on, or where a box finds none better."""
    logits, deltas, anchors, boxes, labels = scene(torch.float64)
    within = torch.ones(3, len(anchors), dtype=torch.bool)
    within[:, ::7] = False
    found = rpn_losses(logits, deltas, anchors, within, boxes, labels, Matching(0.7, 0.3, 10**6, 1.0))
    entropy, errors, count = 0.0, 0.0, 0
    for i in range(3):
        overlap = iou(anchors, boxes[i, labels[i] >= 0])
        best, index = overlap.max(1) if overlap.shape[1] else (torch.zeros(len(anchors)), None)
        ties = ((overlap == overlap.amax(0)) & (overlap > 0)).any(1)
        positive, negative = within[i] & ((best >= 0.7) | ties), within[i] & (best < 0.3) & ~ties
        count += int(positive.sum() + negative.sum())
        entropy += F.softplus(-logits[i, positive]).sum() + F.softplus(logits[i, negative]).sum()
        if index is not None:
            wanted = encode(boxes[i, labels[i] >= 0][index[positive]], anchors[positive])
            errors += F.smooth_l1_loss(deltas[i, positive], wanted, beta=1 / 9, reduction="sum")
            assert positive.any()
    torch.testing.assert_close(found, (entropy / count, errors / count))


def test_gradients():
    logits, deltas, anchors, boxes, labels = scene(torch.float64)
    within = torch.ones(3, len(anchors), dtype=torch.bool)
    few = (torch.arange(len(anchors)) % 9 == 0) | (iou(anchors, boxes[0]) > 0.3).any(1)

    def losses(logits, deltas):
        draws = lambda x: torch.linspace(0, 1, x.shape[1]).expand_as(x)  # noqa: E731
        return rpn_losses(logits, deltas, anchors[few], within[:, few], boxes, labels, Matching(count=40), draws)

    given = (x[:, few].clone().requires_grad_() for x in (logits, deltas))
    assert torch.autograd.gradcheck(losses, tuple(given), fast_mode=True)


@pytest.mark.parametrize("padded", [0, 3])
def test_images_without_boxes(padded):
    logits, deltas, anchors, _, _ = scene()
    nothing = torch.zeros(3, padded, 4), torch.full((3, padded), -1)
    logits.requires_grad_(), deltas.requires_grad_()
    within = torch.ones(3, len(anchors), dtype=torch.bool)
    objectness, box = rpn_losses(logits, deltas, anchors, within, *nothing, Matching())
    (objectness + box).backward()
    assert box == 0 and not deltas.grad.any() and (logits.grad != 0).sum() == 3 * 256


def test_nothing_to_sample():
    logits, deltas, anchors, boxes, labels = scene()
    within = torch.zeros(3, len(anchors), dtype=torch.bool)
    assert rpn_losses(logits, deltas, anchors, within, boxes, labels, Matching()) == (0, 0)


def test_a_box_that_overlaps_nothing_makes_no_anchor_positive():
    """The original makes all of them positive: every overlap equals the best one, 0."""
    logits, deltas, anchors, boxes, labels = scene()
    boxes = boxes + 1e4
    within = torch.ones(3, len(anchors), dtype=torch.bool)
    assert rpn_losses(logits, deltas, anchors, within, boxes, labels, Matching())[1] == 0
