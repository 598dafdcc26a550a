"""The losses of a batch, with fixed shapes, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore.boxes import encode
from detcore.data.batch import Batch
from maskrcnn.anchors import pooled
from maskrcnn.model import MaskRCNN
from maskrcnn.roi_heads import Regions, sample_regions
from maskrcnn.rpn import Draws, chosen_boxes, rpn_losses

MaskTargets = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""`detcore.ops.mask_targets.mask_targets`: (edges, edge_of, regions [N, S, 4], box_of [N, S], M) -> [N, S, M, M]."""


def losses(
    model: MaskRCNN,
    batch: Batch,
    mask_targets: MaskTargets | None = None,
    draws: Draws = torch.rand_like,
    network: nn.Module | None = None,
) -> dict[str, Tensor]:
    """{"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}: scalars, float32
    unless the network is float64.

    Their sum is what the training minimises. A network without masks has no loss_mask, one that only proposes has the
    first two. batch.images: uint8, or floats that `MaskRCNN.normalized` made. mask_targets: wanted where the network
    makes masks. draws: the randomness of both samplers. network: the model as it is wrapped for several processes.
    Images without boxes, and M = 0, are fine.
    """
    boxes, labels = batch.boxes, batch.labels
    features = (network or model)(batch.images, batch.extent)
    found = model.find(features)
    anchors = torch.cat(found.anchors)
    objectness, rpn_box = rpn_losses(
        torch.cat(found.logits, 1), torch.cat(found.deltas, 1), anchors, model.within(anchors, batch.extent), boxes,
        labels, model.matching, draws,
    )  # fmt: skip
    terms = {"loss_objectness": objectness, "loss_rpn_box_reg": rpn_box}
    if model.roi_heads is None:
        return terms
    proposals = model.propose(found, batch.extent, training=True)
    regions = sample_regions(proposals, boxes, labels, model.roi_matching, draws)
    logits, deltas, shared = model.roi_heads["box"](features, regions.boxes)
    terms["loss_classifier"], terms["loss_box_reg"] = box_losses(logits, deltas, regions, boxes, model.box_weights)
    if model.makes_masks:
        few = _positives(regions, model)
        logits = model.roi_heads["mask"](features, few.boxes, few.labels, shared[:, : few.boxes.shape[1]])
        corners = pooled(few.boxes, model.legacy)
        targets = mask_targets(batch.edges, batch.edge_of, corners, few.box_of, model.mask_size)
        terms["loss_mask"] = mask_loss(logits, targets, few.box_of >= 0)
    return terms


def box_losses(
    logits: Tensor, deltas: Tensor, regions: Regions, boxes: Tensor, weights: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, mean over the valid regions, and smooth L1 of the true class's deltas, divided by their number.

    logits [N, S, K + 1], deltas [N, S, K + 1, 4], boxes [N, M, 4].
    """
    counted = regions.valid.sum().clamp(min=1)
    logits, deltas = _wide(logits), _wide(deltas)
    entropy = F.cross_entropy(logits.flatten(0, 1), regions.labels.flatten(), reduction="none")
    positive = regions.box_of >= 0
    at = regions.labels[..., None, None].expand(-1, -1, 1, 4)
    found = deltas.gather(2, at)[:, :, 0]
    wanted = encode(chosen_boxes(boxes, regions.box_of, regions.boxes, positive), regions.boxes, weights)
    wanted = torch.where(positive[..., None], wanted, 0)
    error = F.smooth_l1_loss(found, wanted, reduction="none", beta=1.0).masked_fill(~positive[..., None], 0)
    return entropy.masked_fill(~regions.valid.flatten(), 0).sum() / counted, error.sum() / counted


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positives(regions: Regions, model: MaskRCNN) -> Regions:
    """The places of the sample that positive regions can take, which are the first ones."""
    slots = int(model.roi_matching.count * model.roi_matching.fraction)
    if regions.box_of.device.type == "cpu":  # reading a value costs nothing here, and most places are empty
        slots = min(slots, int((regions.box_of >= 0).sum(1).max()))
    return Regions(*(part[:, :slots] for part in regions))


def mask_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the pixels of the positive regions; 0 without any.

    logits and targets (0 or 1): [N, S, M, M]; positive: bool [N, S].
    """
    logits = _wide(logits)
    error = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").mean((2, 3))
    return error.masked_fill(~positive, 0).sum() / positive.sum().clamp(min=1)
