"""Sampled regions, pooling, and the heads with their losses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align as torchvision_roi_align

from detcore import UserError
from detcore.boxes import encode, iou
from maskrcnn.loss import box_losses, mask_loss
from maskrcnn.roi_heads import BoxHead, MaskHead, MaskPredictor, Pooler, Regions, sample_regions
from maskrcnn.rpn import Matching, Proposals
from tests.maskrcnn.settings import FPN, SMALL, settings


def candidates(images: int = 3, count: int = 60) -> tuple[Proposals, torch.Tensor, torch.Tensor]:
    """Proposals around the boxes and elsewhere, a tenth of them unused; boxes of which the last image has none."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[10.0, 10, 60, 50], [40, 30, 90, 99], [0, 0, 0, 0]]).expand(images, 3, 4).clone()
    labels = torch.tensor([2, 0, -1]).expand(images, 3).clone()
    boxes[-1], labels[-1] = 0, -1
    centre = boxes[:, torch.arange(count) % 3] + torch.randn(images, count, 4, generator=generator) * 6
    proposals = torch.cat((centre[..., :2], torch.maximum(centre[..., 2:], centre[..., :2] + 5)), 2)
    scores = torch.rand(images, count, generator=generator).masked_fill(torch.arange(count) % 10 == 9, -1)
    return Proposals(proposals, scores), boxes, labels


def test_regions_are_what_the_matching_says():
    proposals, boxes, labels = candidates()
    found = sample_regions(proposals, boxes, labels, Matching(0.5, 0.5, 20, 0.25))
    assert found.boxes.shape == (3, 20, 4)
    assert found.valid.sum(1).tolist() == [20, 20, 20] and (found.box_of >= 0).sum(1).tolist() == [5, 5, 0]
    for i in range(3):
        real = labels[i] >= 0
        overlap = iou(found.boxes[i], boxes[i, real])
        best = overlap.amax(1) if real.any() else torch.zeros(20)
        assert torch.equal(best >= 0.5, found.box_of[i] >= 0)
        for place in range(20):
            of = int(found.box_of[i, place])
            assert int(found.labels[i, place]) == (0 if of < 0 else labels[i, of] + 1)
            assert of < 0 or overlap[place].argmax() == of
        unused = proposals.boxes[i][proposals.scores[i] < 0]
        assert not (found.boxes[i][:, None] == unused).all(2).any()


def test_the_ground_truth_is_among_the_candidates():
    _, boxes, labels = candidates()
    nothing = Proposals(torch.zeros(3, 0, 4), torch.zeros(3, 0))
    found = sample_regions(nothing, boxes, labels, Matching(0.5, 0.5, 8, 1.0))
    assert found.valid.sum(1).tolist() == [2, 2, 0]
    assert {tuple(box) for box in found.boxes[0, :2].tolist()} == {tuple(box) for box in boxes[0, :2].tolist()}


@pytest.mark.parametrize("padded", [0, 2])
def test_no_boxes(padded):
    nothing = torch.zeros(3, padded, 4), torch.full((3, padded), -1)
    found = sample_regions(candidates()[0], *nothing, Matching(0.5, 0.5, 16))
    assert (found.box_of == -1).all() and (found.labels == 0).all() and found.valid.all()


def test_pooling_takes_the_original_corners():
    """A box of pixels 8..39 is pooled from 8 to 39, and its level is that of 32 x 32 pixels."""
    features = [torch.randn(1, 4, 64 >> i, 64 >> i, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    boxes = torch.tensor([[[8.0, 8, 40, 40], [0, 0, 224, 224], [16, 8, 239, 231]]])
    for legacy, less in ((True, 1), (False, 0)):
        found = Pooler(7, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 2, legacy)(features, boxes)
        for place, level in enumerate((0, 2, 1)):
            corners = boxes[0, place] - less * torch.tensor([0, 0, 1, 1])
            wanted = torchvision_roi_align(features[level], [corners[None]], 7, 0.25 / 2**level, 2)
            torch.testing.assert_close(found[place : place + 1], wanted, rtol=0, atol=1e-5)


def regions(dtype=torch.float32) -> Regions:
    """Two images of four regions: two positive and one negative; three negative; one unused each."""
    boxes = torch.tensor([[10.0, 10, 60, 50], [40, 30, 90, 99], [5, 5, 20, 30], [0, 0, 1, 1]], dtype=dtype)
    labels = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0]])
    box_of = torch.tensor([[0, 1, -1, -1], [-1, -1, -1, -1]])
    return Regions(boxes.expand(2, 4, 4), labels, box_of, torch.tensor([True, True, True, False]).expand(2, 4))


def test_box_losses_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    deltas = torch.randn(2, 4, 5, 4, generator=generator, dtype=torch.float64)
    given, truth = regions(), torch.tensor([[[12.0, 9, 55, 52], [40, 30, 80, 90]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    classifier, box = box_losses(logits, deltas, given, truth, (10, 10, 5, 5))
    picked = given.valid
    wanted = F.cross_entropy(logits[picked], given.labels[picked])
    torch.testing.assert_close(classifier, wanted)
    target = encode(truth[0], given.boxes[0, :2], (10, 10, 5, 5))
    error = deltas[0, [0, 1], [3, 1]] - target
    error = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).sum() / 6
    torch.testing.assert_close(box, error)


def test_losses_without_any_valid_region_or_positive_one_are_0():
    given = regions()
    none = given._replace(valid=torch.zeros_like(given.valid), box_of=torch.full_like(given.box_of, -1))
    logits, deltas = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5, 4, requires_grad=True)
    terms = box_losses(logits, deltas, none, torch.zeros(2, 0, 4), (10, 10, 5, 5))
    masks = torch.randn(2, 4, 6, 6, requires_grad=True)
    terms = (*terms, mask_loss(masks, torch.ones(2, 4, 6, 6), none.box_of >= 0))
    assert [term.item() for term in terms] == [0, 0, 0]
    sum(terms).backward()
    assert not any(x.grad.any() for x in (logits, deltas, masks))


def test_mask_loss_is_the_mean_over_pixels_of_positive_regions():
    logits, targets = torch.randn(2, 3, 6, 6), (torch.rand(2, 3, 6, 6) < 0.5)
    positive = torch.tensor([[True, False, True], [False, True, False]])
    wanted = F.binary_cross_entropy_with_logits(logits[positive], targets[positive].float())
    torch.testing.assert_close(mask_loss(logits, targets, positive), wanted)


def test_only_the_masks_of_one_class_are_computed():
    torch.manual_seed(0)
    predictor = MaskPredictor(6, 8, 5).double()
    nn.init.normal_(predictor.mask_fcn_logits.bias)
    x, labels = torch.randn(7, 6, 4, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 1, 1, 3, 2, 4])
    found = predictor(x, labels)
    every = predictor.mask_fcn_logits(F.relu(predictor.conv5_mask(x)))
    torch.testing.assert_close(found, every[torch.arange(7), labels])
    assert predictor(x[:0], labels[:0]).shape == (0, 8, 8)
    assert torch.autograd.gradcheck(lambda x: predictor(x, labels), (x,), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_box_head_feature_extractor": "Xconv"}, "FEATURE_EXTRACTOR is 'Xconv'; choose FPN2MLP"),
        ({"roi_box_head_feature_extractor": "ResNet50Conv5ROIFeatureExtractor"}, "wants a body R-...-C4"),
        ({"roi_box_head_pooler_scales": (0.25, 0.0625)}, "each must be half of the one before it"),
    ],
)
def test_box_heads_that_do_not_exist(change, message):
    with pytest.raises(UserError, match=message):
        BoxHead(settings(FPN, SMALL, **change), 16, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_mask_head_predictor": "MaskRCNNConv1x1Predictor"}, "it must be MaskRCNNC4Predictor"),
        ({"roi_mask_head_share_box_feature_extractor": True}, "wants a box head whose features are maps"),
        ({"roi_mask_head_resolution": 14}, "RESOLUTION is 14, but the head's masks are 28 x 28"),
        ({"roi_mask_head_feature_extractor": "ResNet50Conv5ROIFeatureExtractor"}, "choose MaskRCNNFPNFeatureExtractor"),
    ],
)
def test_mask_heads_that_do_not_exist(change, message):
    with pytest.raises(UserError, match=message):
        MaskHead(settings(FPN, SMALL, **change), 16, 32)
