"""The networks that the configuration's keys describe: sizes, frozen parts, names, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from detcore import UserError
from maskrcnn.model import MaskRCNN
from tests.maskrcnn.settings import FPN, GN, MASKS, R101, SMALL, X101, settings

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_conv_body": "V-99-FPN"}, "CONV_BODY is 'V-99-FPN'; choose R-18"),
        ({"resnets_num_groups": 64}, "NUM_GROUPS 64 with WIDTH_PER_GROUP 64 is unknown for R-50-FPN"),
        ({"resnets_stem_func": "StemWithGN"}, "with the same ending"),
        ({"resnets_res2_out_channels": 128}, "RES2_OUT_CHANNELS 128 and STEM_OUT_CHANNELS 64"),
        ({"backbone_freeze_conv_body_at": 6}, "FREEZE_CONV_BODY_AT is 6"),
        ({"rpn_anchor_stride": (16,)}, "as many strides as sizes"),
        ({"rpn_rpn_head": "FBNet"}, "RPN_HEAD is 'FBNet'"),
        (GN | {"group_norm_num_groups": 7}, "can't be split into 7 groups"),
        (GN | {"group_norm_dim_per_gp": 48}, "or DIM_PER_GP 48"),
    ],
)
def test_what_does_not_exist_is_refused(change, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        MaskRCNN(settings(FPN, MASKS, change))


@pytest.mark.parametrize("stages", range(6))
def test_frozen_stages(stages):
    with torch.device("meta"):
        model = MaskRCNN(settings(FPN, GN, rpn_only=True, backbone_freeze_conv_body_at=stages))
    learning = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "body" in name}
    order = [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]
    assert learning == set().union(*order[stages:])


def test_group_norm_by_width_of_a_group():
    with torch.device("meta"):
        model = MaskRCNN(settings(FPN, GN, group_norm_dim_per_gp=16))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 50 and all(norm.num_channels == 16 * norm.num_groups for norm in norms)


def test_pixels_are_the_originals():
    """BGR in 0..255 less the mean; beyond the image exactly 0."""
    images = torch.randint(256, (2, 3, 32, 64), dtype=torch.uint8)
    extent = torch.tensor([[32, 64], [20, 33]])
    model = MaskRCNN(settings(FPN, SMALL, rpn_only=True))
    found = model.normalized(images, extent)
    wanted = images.flip(1).float() - torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1, :, :20, :33], wanted[1, :, :20, :33], rtol=0, atol=1e-4)
    assert not found[1, :, 20:].any() and not found[1, :, :, 33:].any()
    assert found.is_contiguous(memory_format=torch.channels_last)  # which all that follows then is, and fast
    rgb = {"input_to_bgr255": False, "input_pixel_mean": (0.485, 0.456, 0.406)}
    rgb["input_pixel_std"] = (0.229, 0.224, 0.225)
    found = MaskRCNN(settings(FPN, SMALL, rgb, rpn_only=True)).normalized(images, extent)
    mean, std = (torch.tensor(rgb[f"input_pixel_{name}"]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(found[0], (images[0] / 255 - mean) / std)
