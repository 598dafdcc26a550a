"""The networks that the configuration's keys describe: sizes, frozen parts, names, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from maskrcnn.model import MaskRCNN
from tests.maskrcnn.settings import FPN, GN, MASKS, R101, X101, settings

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "maskrcnn.json").read_text())
SCRATCH = {"backbone_freeze_conv_body_at": 0}
CONFIGS = {
    "e2e_mask_rcnn_R_50_FPN": (FPN, MASKS),
    "e2e_mask_rcnn_R_101_FPN": (FPN, R101, MASKS),
    "e2e_mask_rcnn_X_101_32x8d_FPN": (FPN, X101, MASKS),
    "e2e_faster_rcnn_R_50_FPN": (FPN,),
    "e2e_faster_rcnn_R_101_FPN": (FPN, R101),
    "e2e_faster_rcnn_X_101_32x8d_FPN": (FPN, X101),
    "rpn_R_50_FPN": (FPN, {"rpn_only": True}),
    "rpn_R_50_C4": ({"rpn_only": True},),
    "cityscapes e2e_faster_rcnn_R_50_FPN (9 classes)": (FPN, {"roi_box_head_num_classes": 9}),
    "cityscapes e2e_mask_rcnn_R_50_FPN (9 classes)": (FPN, MASKS, {"roi_box_head_num_classes": 9}),
    "pascal_voc e2e_mask_rcnn_R_50_FPN cocostyle (21 classes)": (FPN, MASKS, {"roi_box_head_num_classes": 21}),
    "gn e2e_faster_rcnn_R_50_FPN": (FPN, GN),
    "gn e2e_mask_rcnn_R_50_FPN": (FPN, GN, MASKS),
    "gn scratch e2e_faster_rcnn_R_50_FPN": (FPN, GN, SCRATCH),
    "gn scratch e2e_mask_rcnn_R_50_FPN": (FPN, GN, MASKS, SCRATCH),
}


def counts(model: torch.nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("golden", GOLDEN["parameter_counts"], ids=lambda golden: golden["config"])
def test_parameters_of_the_original(golden):
    with torch.device("meta"):  # no values, no time
        assert counts(MaskRCNN(settings(*CONFIGS[golden["config"]]))) == (golden["total"], golden["trainable"])
