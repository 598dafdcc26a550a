"""Detections: against a loop over classes in the original's convention, and what must not matter."""

import pytest
import torch
from torchvision.ops import nms

from detcore.boxes import encode, iou
from maskrcnn.anchors import cell_anchors, level_anchors
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import detect, postprocess
from maskrcnn.rpn import Selection, propose
from tests.maskrcnn.settings import settings
from tests.maskrcnn.test_loss import CANVAS, KINDS, batch

WEIGHTS = (10, 10, 5, 5)
EXTENT = torch.tensor([[60, 80], [50, 100]])


def head(images: int = 2, count: int = 40, classes: int = 3):
    """What a box head says of random proposals, whose last tenth is unused."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(images, count, 2, generator=generator) * 50
    proposals = torch.cat((low, low + 5 + torch.rand(images, count, 2, generator=generator) * 40), 2)
    logits = torch.randn(images, count, classes + 1, generator=generator) * 2
    deltas = torch.randn(images, count, classes + 1, 4, generator=generator)
    return logits, deltas, proposals, (torch.arange(count) < count * 0.9).expand(images, count)


def by_loop(logits, deltas, proposals, size, thresh, overlap, most) -> list[tuple[float, int, list[float]]]:
    """The original's filter_results for one image, in its numbers: the last pixel belongs to a box."""
    height, width = size
    corners = proposals - torch.tensor([0.0, 0, 1, 1])
    scores = logits.softmax(1)
    w, h = (corners[:, 2] - corners[:, 0] + 1), (corners[:, 3] - corners[:, 1] + 1)
    x, y = corners[:, 0] + 0.5 * w, corners[:, 1] + 0.5 * h
    found = []
    for k in range(1, logits.shape[1]):
        dx, dy, dw, dh = (deltas[:, k] / torch.tensor(WEIGHTS)).unbind(1)
        cx, cy, half_w, half_h = dx * w + x, dy * h + y, 0.5 * dw.clamp(max=4.135).exp() * w, 0.5 * dh.exp() * h
        boxes = torch.stack((cx - half_w, cy - half_h, cx + half_w - 1, cy + half_h - 1), 1)
        boxes = torch.stack([boxes[:, i].clamp(0, (width - 1, height - 1)[i % 2]) for i in range(4)], 1)
        above = scores[:, k] > thresh
        boxes, own = boxes[above] + torch.tensor([0.0, 0, 1, 1]), scores[above, k]
        for i in nms(boxes, own, overlap):
            found.append((float(own[i]), k - 1, boxes[i].tolist()))
    return sorted(found, key=lambda one: -one[0])[:most]


@pytest.mark.parametrize(("thresh", "most"), [(0.05, 100), (0.3, 12), (0.0, 20)])
def test_detections_are_those_of_a_loop(thresh, most):
    logits, deltas, proposals, valid = head()
    boxes, scores, labels = detect(logits, deltas, proposals, valid, EXTENT, thresh, 0.5, most, WEIGHTS)
    assert boxes.shape == (2, most, 4)
    for i, size in enumerate(EXTENT.tolist()):
        own = (x[i, valid[i]] for x in (logits, deltas, proposals))
        expected = by_loop(*own, size, thresh, 0.5, most)
        count = len(expected)
        assert count >= min(most, 10) and (labels[i] >= 0).sum() == count
        torch.testing.assert_close(scores[i, :count], torch.tensor([one[0] for one in expected]))
        assert labels[i, :count].tolist() == [one[1] for one in expected]
        torch.testing.assert_close(boxes[i, :count], torch.tensor([one[2] for one in expected]), rtol=1e-4, atol=1e-3)
        assert not boxes[i, count:].any() and not scores[i, count:].any()


@pytest.mark.parametrize("legacy", [True, False])
def test_targets_lead_to_the_boxes_that_they_were_made_of(legacy):
    """Both stages: anchors to boxes, and proposals to boxes, also where these touch the image's border."""
    truth = torch.tensor([[[0.0, 0, 33, 20], [10, 12, 80, 60], [41.5, 7.25, 64, 30]]])
    extent, sizes = torch.tensor([[60, 80]]), (16, 32)
    cells = [cell_anchors(stride, (size,), legacy=legacy) for stride, size in zip((8, 16), sizes, strict=True)]
    grids = [(8, 10), (4, 5)]
    anchors = [level_anchors(*of) for of in zip(cells, grids, (8, 16), strict=True)]
    nearest = [iou(a, truth[0]).argmax(1) for a in anchors]
    deltas = [encode(truth[0][at], a)[None] for at, a in zip(nearest, anchors, strict=True)]
    logits = [iou(a, truth[0]).amax(1)[None] for a in anchors]
    found = propose(logits, deltas, anchors, (8, 16), grids, extent, Selection(50, 10, 10), legacy)
    real = found.boxes[found.scores >= 0]
    assert (iou(real, truth[0]).amax(1) > 0.999).all() and (iou(truth[0], real).amax(1) > 0.999).all()
    around = truth + torch.tensor([-3.0, 2, 4, 5])
    logits = torch.full((1, 3, 4), -9.0).scatter(2, torch.tensor([[[3], [1], [2]]]), 9.0)
    deltas = encode(truth, around, WEIGHTS)[:, :, None].expand(1, 3, 4, 4)
    valid = torch.ones(1, 3, dtype=torch.bool)
    boxes, _, labels = detect(logits, deltas, around, valid, extent, detections=3, weights=WEIGHTS, legacy=legacy)
    assert labels[0].tolist() == [2, 0, 1]
    torch.testing.assert_close(boxes, truth, rtol=0, atol=1e-4)


def test_unused_proposals_are_no_detections():
    logits, deltas, proposals, valid = head()
    boxes, scores, labels = detect(logits, deltas, proposals, torch.zeros_like(valid), EXTENT)
    assert (labels == -1).all() and not scores.any() and not boxes.any()


@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4", "box, C5", "half-open"])
def test_an_image_alone_is_an_image_in_a_batch(kind):
    torch.manual_seed(0)
    # In float64: scores of random weights lie as close as float32 rounds, which is otherwise in a larger batch.
    few = {"rpn_post_nms_top_n_test": 60, "roi_heads_detections_per_img": 20, "roi_heads_score_thresh": 0.0}
    model, given = MaskRCNN(settings(*KINDS[kind], few)).eval().double(), batch()
    images = model.normalized(given.images, given.extent).double() / 100
    together = postprocess(model, images, given.extent)
    assert (together.labels >= 0).all() and (together.boxes[..., :2] <= together.boxes[..., 2:]).all()
    assert together.boxes.shape == (3, 20, 4)
    limit = given.extent.flip(1).repeat(1, 2)[:, None]
    assert (together.boxes >= 0).all() and (together.boxes <= limit).all()
    for i in range(3):
        alone = postprocess(model, images[i : i + 1], given.extent[i : i + 1])
        for mine, theirs in zip(alone, together, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine[0], theirs[i], rtol=1e-6, atol=1e-6)


def test_masks_lie_where_they_were_pooled():
    torch.manual_seed(0)
    model, given = MaskRCNN(settings(*KINDS["mask, FPN"], roi_heads_score_thresh=0.5)).eval(), batch()
    model.roi_heads["box"].predictor.cls_score.bias.data[1] = 3
    found = postprocess(model, model.normalized(given.images, given.extent) / 100, given.extent)
    used = found.labels >= 0
    assert used.any() and found.masks.shape == (3, 100, 28, 28)
    assert torch.equal(found.places, found.boxes - torch.tensor([0.0, 0, 1, 1]))
    assert (found.masks[used] > 0).all() and (found.masks < 1).all() and not found.masks[~used].any()


def test_a_network_that_only_proposes():
    torch.manual_seed(0)
    model, given = MaskRCNN(settings(*KINDS["proposals, FPN"])).eval(), batch()
    found = postprocess(model, given.images, given.extent)
    assert found.boxes.shape == (3, 40, 4) and found.masks is None
    assert set(found.labels.unique().tolist()) == {0} and (found.scores.diff(dim=1) <= 0).all()
    assert (found.boxes[..., 2] <= given.extent[:, 1:]).all() and CANVAS[1] > 170


@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4"])
def test_mixed_precision(kind):
    torch.manual_seed(0)
    model, given = MaskRCNN(settings(*KINDS[kind], roi_heads_score_thresh=0.0)).eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = postprocess(model, given.images, given.extent)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (found.boxes, found.scores, found.masks))
