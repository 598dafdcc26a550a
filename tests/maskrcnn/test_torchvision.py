"""torchvision's networks with the same weights: the same losses, gradients and detections."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import roi_heads

from detcore.device import native
from maskrcnn.loss import losses
from maskrcnn.postprocess import postprocess
from tests.maskrcnn.oracle import own_name, scenes, target_masks, their_detections, their_losses, twins


def fastrcnn_loss(logits, deltas, labels, targets):
    """torchvision's, but with the original's beta of 1 instead of 1 / 9."""
    labels, targets = torch.cat(labels), torch.cat(targets)
    positive = (labels > 0).nonzero()[:, 0]
    found = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    error = F.smooth_l1_loss(found, targets[positive], beta=1.0, reduction="sum")
    return F.cross_entropy(logits, labels), error / labels.numel()


@pytest.mark.parametrize(("masks", "counts"), [(True, (4, 0)), (False, (3,))])
def test_losses_and_gradients(masks, counts, monkeypatch):
    monkeypatch.setattr(roi_heads, "fastrcnn_loss", fastrcnn_loss)
    ours, theirs = twins(masks)
    batch, bitmaps = scenes(counts)
    with native.using("auto"):
        found = losses(ours, batch, target_masks(bitmaps))
    expected = their_losses(theirs, batch, bitmaps)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert found[name].dtype == torch.float32
    sum(found.values()).backward()
    sum(expected.values()).backward()
    others = {own_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - others[name]).abs().max()
            assert error <= 1e-3 * others[name].abs().max(), name


@pytest.mark.parametrize("masks", [True, False])
def test_detections(masks):
    ours, theirs = twins(masks)
    batch, _ = scenes((1, 1) if masks else (1,))
    found = postprocess(ours, batch.images, batch.extent)
    for image, expected in enumerate(their_detections(theirs, batch.images)):
        count = len(expected["scores"])
        assert count > 20 and (found.labels[image] >= 0).sum() == count
        torch.testing.assert_close(found.scores[image, :count], expected["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes[image, :count], expected["boxes"], rtol=0, atol=1e-2)
        assert (found.labels[image, :count] + 1).equal(expected["labels"])
        if masks:
            torch.testing.assert_close(found.masks[image, :count], expected["masks"][:, 0], rtol=0, atol=1e-4)
    assert (found.masks is None) != masks
