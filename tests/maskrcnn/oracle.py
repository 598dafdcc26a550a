"""torchvision's networks and ours with the same weights: half-open boxes, and samplers that take everything."""

import re

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from detcore.data.batch import Batch, whole_images
from maskrcnn.model import MaskRCNN
from tests.maskrcnn.settings import FPN, MASKS, settings

SIZE = (128, 192)  # whole multiples of the coarsest stride: torchvision's anchors lie elsewhere in other images
CLASSES = 5
FEW = {
    "box_detections_per_img": 30, "rpn_pre_nms_top_n_train": 60, "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 80, "rpn_post_nms_top_n_test": 70,
}  # fmt: skip
NAMES = (
    (r"fpn\.(inner|layer)_blocks\.(\d)\.0\.", lambda m: f"fpn.fpn_{m[1]}{int(m[2]) + 1}."),
    (r"rpn\.head\.conv\.0\.0\.", lambda m: "rpn.head.conv."),
    (r"box_head\.", lambda m: "box.feature_extractor."),
    (r"box_predictor\.", lambda m: "box.predictor."),
    (r"mask_head\.(\d)\.0\.", lambda m: f"mask.feature_extractor.mask_fcn{int(m[1]) + 1}."),
    (r"mask_predictor\.", lambda m: "mask.predictor."),
)


def own_name(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


class TakesAll:
    """Instead of torchvision's sampler: all positive and all negative ones."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [(own >= 1).byte() for own in labels], [(own == 0).byte() for own in labels]


def twins(masks: bool) -> tuple[MaskRCNN, nn.Module]:
    """Ours and torchvision's maskrcnn_resnet50_fpn or fasterrcnn_resnet50_fpn, with weights that are not all alike."""
    torch.manual_seed(0)
    make = detection.maskrcnn_resnet50_fpn if masks else detection.fasterrcnn_resnet50_fpn
    theirs = make(weights=None, weights_backbone=None, num_classes=CLASSES, **FEW)
    generator = torch.Generator().manual_seed(1)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # without pretrained weights these are not frozen
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.2, 0.5, generator=generator)
    for layer, std in ((theirs.rpn.head.cls_logits, 0.1), (theirs.rpn.head.bbox_pred, 0.02)):
        layer.weight.data.normal_(0, std, generator=generator)
    for layer, std in (
        (theirs.roi_heads.box_predictor.cls_score, 0.3),
        (theirs.roi_heads.box_predictor.bbox_pred, 0.1),
    ):
        layer.weight.data.normal_(0, std, generator=generator)
    ours = MaskRCNN(settings(
        FPN, MASKS if masks else {}, legacy_boxes=False, resnets_stride_in_1x1=False, rpn_straddle_thresh=-1,
        rpn_min_size=1e-3, rpn_fpn_post_nms_per_batch=False, roi_box_head_num_classes=CLASSES,
        rpn_batch_size_per_image=10**6, rpn_positive_fraction=1.0, roi_heads_batch_size_per_image=10**6,
        roi_heads_positive_fraction=1.0, roi_heads_detections_per_img=30, rpn_pre_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=50, rpn_fpn_post_nms_top_n_train=80, rpn_fpn_post_nms_top_n_test=70,
    ))  # fmt: skip
    ours.load_state_dict({own_name(name): value for name, value in theirs.state_dict().items()})
    theirs.rpn.fg_bg_sampler = theirs.roi_heads.fg_bg_sampler = TakesAll()
    return ours, theirs


def scenes(counts: tuple[int, ...]) -> tuple[Batch, Tensor]:
    """Normalised pixels with so many boxes an image, and bool masks [N, M, H, W] in them."""
    generator = torch.Generator().manual_seed(2)
    images, most = len(counts), max(counts)
    pixels = torch.randn(images, 3, *SIZE, generator=generator)
    low = torch.rand(images, most, 2, generator=generator) * torch.tensor([SIZE[1] - 60, SIZE[0] - 60])
    boxes = torch.cat((low, low + 12 + torch.rand(images, most, 2, generator=generator) * 48), 2)
    labels = torch.randint(CLASSES - 1, (images, most), generator=generator)
    unused = torch.arange(most) >= torch.tensor(counts)[:, None]
    boxes, labels = boxes.masked_fill(unused[..., None], 0), labels.masked_fill(unused, -1)
    masks = torch.rand(images, most, *SIZE, generator=generator) < 0.5
    ids = torch.arange(images)
    return whole_images(pixels, boxes, labels, ids, torch.tensor([SIZE] * images)), masks


def target_masks(masks: Tensor):
    """What `losses` wants as mask_targets, made as torchvision makes it, from bitmaps [N, M, H, W]."""

    def make(edges: Tensor, edge_of: Tensor, regions: Tensor, box_of: Tensor, size: int) -> Tensor:
        return torch.stack([
            project_masks_on_boxes(masks[i], regions[i], box_of[i].clamp(min=0), size) for i in range(len(masks))
        ])  # fmt: skip

    return make


def their_losses(theirs: nn.Module, batch: Batch, masks: Tensor) -> dict[str, Tensor]:
    targets = [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1, "masks": own[labels >= 0].byte()}
        for boxes, labels, own in zip(batch.boxes, batch.labels, masks, strict=True)
    ]
    images = ImageList(batch.images, [SIZE] * len(targets))
    theirs.train().backbone.eval()  # its norms as ours: frozen
    features = theirs.backbone(batch.images)
    proposals, losses = theirs.rpn(images, features, targets)
    return losses | theirs.roi_heads(features, proposals, images.image_sizes, targets)[1]


@torch.no_grad()
def their_detections(theirs: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    held = ImageList(images, [SIZE] * len(images))
    features = theirs.eval().backbone(images)
    proposals, _ = theirs.rpn(held, features)
    return theirs.roi_heads(features, proposals, held.image_sizes)[0]
