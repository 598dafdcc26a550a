"""The published YAML files: each one's network, data, schedule and what else makes it the file that it is."""

import functools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from detcore.config import load
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.flags import CONFIGS, KEYS, translate_flags
from maskrcnn.model import MaskRCNN
from maskrcnn.model_config import ModelConfig

MSRA = "catalog://ImageNetPretrained/MSRA/"
DETECTRON = "catalog://Caffe2Detectron/COCO/"
FPN_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
FPN, C4 = "R-50-FPN", "R-50-C4"
COCO_2014 = (("coco_2014_train", "coco_2014_valminusminival"), ("coco_2014_minival",))
COCO_2017 = (("coco_2017_train",), ("coco_2017_val",))
MINIVAL = (("coco_2014_minival",), ("coco_2014_minival",))
VOC_2007 = (("voc_2007_train", "voc_2007_val"), ("voc_2007_test",))
VOC_2012 = (("voc_2012_train_cocostyle",), ("voc_2012_val_cocostyle",))
CITYSCAPES = tuple((f"cityscapes_fine_instanceonly_seg_{part}_cocostyle",) for part in ("train", "val"))
ONE_X, LONG, QUICK = ((60000, 80000), 90000), ((120000, 160000), 180000), ((1500,), 2000)
MASK_50 = "e2e_mask_rcnn_R_50_FPN_1x"

# file: body, weight below catalog://ImageNetPretrained, data sets, lr, (steps, iterations), batch, batch of evaluation
TRAINED = {
    MASK_50: (FPN, "MSRA/R-50", COCO_2014, 0.02, ONE_X, 16, 8),
    f"{MASK_50}_bs32_2014": (FPN, "MSRA/R-50", COCO_2014, 0.04, ((36000, 48000), 50000), 32, 8),
    f"{MASK_50}_bs96": (FPN, "MSRA/R-50", COCO_2017, 0.12, ((12000, 16000), 16667), 96, 8),
    f"{MASK_50}_bs32": (FPN, "MSRA/R-50", COCO_2017, 0.04, ((33000, 44000), 50000), 32, 8),
    f"{MASK_50}_bs64": (FPN, "MSRA/R-50", COCO_2017, 0.08, ((18000, 24000), 27500), 64, 8),
    f"{MASK_50}_1GPU": (FPN, "MSRA/R-50", COCO_2014, 0.005, ((240000, 360000), 360000), 4, 1),
    f"ci/{MASK_50}": (FPN, "MSRA/R-50", COCO_2017, 0.12, ((12000, 16000), 16667), 96, 8),
    f"ci/{MASK_50}_1gpu": (FPN, "MSRA/R-50", COCO_2014, 0.005, ((33000, 44000), 1000), 4, 1),
    "e2e_mask_rcnn_R_101_FPN_1x": ("R-101-FPN", "MSRA/R-101", COCO_2014, 0.02, ONE_X, 16, 8),
    "e2e_faster_rcnn_R_50_FPN_1x": (FPN, "MSRA/R-50", COCO_2014, 0.02, ONE_X, 16, 8),
    "e2e_faster_rcnn_R_101_FPN_1x": ("R-101-FPN", "MSRA/R-101", COCO_2014, 0.02, ONE_X, 16, 8),
    **dict.fromkeys(
        ("e2e_mask_rcnn_X_101_32x8d_FPN_1x", "e2e_faster_rcnn_X_101_32x8d_FPN_1x"),
        ("R-101-FPN", "FAIR/20171220/X-101-32x8d", COCO_2014, 0.01, LONG, 8, 8),
    ),
    **dict.fromkeys(
        ("e2e_mask_rcnn_R_50_C4_1x", "e2e_faster_rcnn_R_50_C4_1x"),
        (C4, "MSRA/R-50", COCO_2014, 0.01, LONG, 8, 8),
    ),
    **dict.fromkeys(
        (f"cityscapes/e2e_{kind}_rcnn_R_50_FPN_1x_cocostyle" for kind in ("faster", "mask")),
        (FPN, "MSRA/R-50", CITYSCAPES, 0.01, ((18000,), 24000), 16, 8),
    ),
    **dict.fromkeys(
        (f"gn_baselines/e2e_{kind}_rcnn_R_50_FPN_{x}1x_gn" for kind in ("faster", "mask") for x in ("", "Xconv1fc_")),
        (FPN, "MSRA/R-50-GN", COCO_2014, 0.02, ONE_X, 16, 8),
    ),
    **dict.fromkeys(
        (
            f"gn_baselines/scratch_e2e_{kind}_rcnn_R_50_FPN_{x}3x_gn"
            for kind in ("faster", "mask")
            for x in ("", "Xconv1fc_")
        ),
        (FPN, "", COCO_2014, 0.02, ((210000, 250000), 270000), 16, 8),
    ),
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_1_gpu_voc": (C4, "MSRA/R-50", VOC_2007, 0.001, ((50000,), 70000), 1, 1),
    "pascal_voc/e2e_faster_rcnn_R_50_C4_1x_4_gpu_voc": (C4, "MSRA/R-50", VOC_2007, 0.004, ((12500,), 17500), 4, 4),
    "pascal_voc/e2e_mask_rcnn_R_50_FPN_1x_cocostyle": (FPN, "MSRA/R-50", VOC_2012, 0.01, ((18000,), 24000), 16, 8),
    **{
        f"quick_schedules/{name}_quick": (body, weight, MINIVAL, 0.005, QUICK, batch, 2)
        for name, body, weight, batch in (
            ("e2e_faster_rcnn_R_50_C4", C4, "MSRA/R-50", 2),
            ("e2e_mask_rcnn_R_50_C4", C4, "MSRA/R-50", 4),
            ("e2e_faster_rcnn_R_50_FPN", FPN, "MSRA/R-50", 4),
            ("e2e_mask_rcnn_R_50_FPN", FPN, "MSRA/R-50", 4),
            ("e2e_faster_rcnn_X_101_32x8d_FPN", "R-101-FPN", "FAIR/20171220/X-101-32x8d", 2),
            ("e2e_mask_rcnn_X_101_32x8d_FPN", "R-101-FPN", "FAIR/20171220/X-101-32x8d", 2),
            ("rpn_R_50_C4", C4, "MSRA/R-50", 4),
            ("rpn_R_50_FPN", FPN, "MSRA/R-50", 4),
        )
    },
}
EVALUATED = {
    "e2e_faster_rcnn_R_50_C4_1x": (C4, "35857197/e2e_faster_rcnn_R-50-C4_1x"),
    "e2e_faster_rcnn_R_50_FPN_1x": (FPN, "35857345/e2e_faster_rcnn_R-50-FPN_1x"),
    "e2e_faster_rcnn_R_101_FPN_1x": ("R-101-FPN", "35857890/e2e_faster_rcnn_R-101-FPN_1x"),
    "e2e_faster_rcnn_X_101_32x8d_FPN_1x": ("R-101-FPN", "36761737/e2e_faster_rcnn_X-101-32x8d-FPN_1x"),
    "e2e_mask_rcnn_R_50_C4_1x": (C4, "35858791/e2e_mask_rcnn_R-50-C4_1x"),
    "e2e_mask_rcnn_R_50_FPN_1x": (FPN, "35858933/e2e_mask_rcnn_R-50-FPN_1x"),
    "e2e_mask_rcnn_R_101_FPN_1x": ("R-101-FPN", "35861795/e2e_mask_rcnn_R-101-FPN_1x"),
    "e2e_mask_rcnn_X_101_32x8d_FPN_1x": ("R-101-FPN", "36761843/e2e_mask_rcnn_X-101-32x8d-FPN_1x"),
}  # fmt: skip
FILES = [*TRAINED, *(f"caffe2/{name}_caffe2" for name in EVALUATED)]
VARIANTS = (f"{MASK_50}_bs32_2014", f"{MASK_50}_bs96")


def read(name: str, line: str = "") -> Config:
    return load(Config, translate_flags(["--config-file", f"configs/{name}.yaml", *line.split()]), {}, IGNORED_FLAGS)[0]


def test_the_files_are_the_42_published_ones_and_two_variants():
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert found == {*FILES} | {f"base/{name}" for name in ("c4", "mask_c4", "fpn", "mask_fpn")}
    assert len(set(FILES) - set(VARIANTS)) == 42


@pytest.mark.parametrize("name", TRAINED)
def test_a_file_that_trains(name):
    body, weight, (train, test), lr, (steps, iterations), batch, test_batch = TRAINED[name]
    config = read(name)
    assert config.backbone_conv_body == body
    assert config.weights == (f"catalog://ImageNetPretrained/{weight}" if weight else "")
    assert (config.datasets_train, config.datasets_test) == (train, test)
    assert (config.lr, config.solver_steps, config.solver_max_iter) == (lr, steps, iterations)
    assert (config.solver_ims_per_batch, config.test_ims_per_batch) == (batch, test_batch)
    assert (config.momentum, config.weight_decay, config.solver_gamma) == (0.9, 1e-4, 0.1)
    assert (config.solver_bias_lr_factor, config.solver_weight_decay_bias, config.accumulate) == (2, 0, 1)


@pytest.mark.parametrize("name", EVALUATED)
def test_a_file_that_evaluates_detectrons_weights(name):
    config = read(f"caffe2/{name}_caffe2")
    assert (config.backbone_conv_body, config.weights) == (EVALUATED[name][0], DETECTRON + EVALUATED[name][1])
    assert (config.datasets_train, config.datasets_test) == ((), ("coco_2014_minival",))


@pytest.mark.parametrize("name", FILES)
def test_what_a_files_name_says(name):
    """Kind of network, body and heads."""
    config, quick = read(name), name.startswith("quick_schedules")
    assert config.mask_on == ("mask" in name) and config.rpn_only == ("rpn_R" in name)
    pyramid = "_FPN" in name
    assert config.has_fpn == config.rpn_use_fpn == config.roi_heads_use_fpn == pyramid
    assert config.dataloader_size_divisibility == (32 if pyramid else 0)
    assert config.backbone_out_channels == (256 if pyramid else 1024)
    assert config.rpn_anchor_stride == ((4, 8, 16, 32, 64) if pyramid else (16,))
    box = (config.roi_box_head_pooler_resolution, config.roi_box_head_pooler_sampling_ratio)
    assert box == ((7, 2) if pyramid else (14, 0))
    assert config.roi_box_head_pooler_scales == (FPN_SCALES if pyramid else (1 / 16,))
    heads = config.roi_box_head_feature_extractor, config.roi_box_head_predictor
    assert heads == (
        ("FPNXconv1fcFeatureExtractor" if "Xconv1fc" in name else "FPN2MLPFeatureExtractor", "FPNPredictor")
        if pyramid
        else ("ResNet50Conv5ROIFeatureExtractor", "FastRCNNPredictor")
    )
    mask = pyramid and config.mask_on
    assert config.roi_mask_head_resolution == (28 if mask else 14)
    assert config.roi_mask_head_share_box_feature_extractor == (not mask)
    assert config.roi_mask_head_pooler_scales == (FPN_SCALES if mask else (1 / 16,))
    assert (config.roi_mask_head_feature_extractor == "MaskRCNNFPNFeatureExtractor") == mask
    x101 = "X_101" in name
    groups = (config.resnets_num_groups, config.resnets_width_per_group, config.resnets_stride_in_1x1)
    assert groups == ((32, 8, False) if x101 else (1, 64, True))
    classes = 9 if "cityscapes" in name else 21 if "pascal" in name else 81
    assert config.roi_box_head_num_classes == classes
    sizes = (config.input_min_size_train, config.input_max_size_train, config.input_min_size_test)
    assert sizes == ((600, 1000, 800) if quick else (800, 1333, 800))
    assert config.input_max_size_test == (1000 if quick else 1333)
    assert config.roi_heads_batch_size_per_image == (256 if quick and "rpn" not in name else 512)
    norm = (config.resnets_trans_func, config.resnets_stem_func)
    gn = "_gn" in name
    assert norm == (("BottleneckWithGN", "StemWithGN") if gn else ("BottleneckWithFixedBatchNorm",
                                                                   "StemWithFixedBatchNorm"))  # fmt: skip
    assert config.fpn_use_gn == config.roi_box_head_use_gn == gn
    assert config.roi_mask_head_use_gn == (gn and config.mask_on)
    assert config.backbone_freeze_conv_body_at == (0 if "scratch" in name else 2)


@pytest.mark.parametrize("name", FILES)
def test_proposals_before_and_after_nms(name):
    config = read(name)
    before = {True: (2000, 1000), False: (12000, 6000)}["_FPN" in name]
    after, of_levels = 1000, (2000, 1000 if "_FPN" in name else 2000)
    if name.endswith("rpn_R_50_C4_quick"):
        before, after = (12000, 12000), 2000
    elif name.endswith("rpn_R_50_FPN_quick"):
        before, after, of_levels = (12000, 1000), 2000, (2000, 2000)
    elif "gpu_voc" in name:
        after = 300
        assert config.rpn_anchor_sizes == (128, 256, 512)
    of_batch = {"bs32": 4000, "bs32_2014": 4000, "1gpu": 4000, "bs64": 8000, "bs96": 12000}
    if name == f"ci/{MASK_50}":
        of_levels = (12000, 1000)
    elif (variant := name.removeprefix("ci/").removeprefix(f"{MASK_50}_")) in of_batch:
        of_levels = (of_batch[variant], 1000)
    assert (config.rpn_pre_nms_top_n_train, config.rpn_pre_nms_top_n_test) == before
    assert (config.rpn_post_nms_top_n_train, config.rpn_post_nms_top_n_test) == (2000, after)
    assert (config.rpn_fpn_post_nms_top_n_train, config.rpn_fpn_post_nms_top_n_test) == of_levels


@pytest.mark.parametrize("name", TRAINED)
def test_warm_up(name):
    config = read(name)
    found = (config.solver_warmup_method, config.solver_warmup_iters, config.solver_warmup_factor)
    special = {
        f"{MASK_50}_bs96": ("linear", 800, 1e-4), f"{MASK_50}_bs64": ("mlperf_linear", 800, 1e-4),
        f"ci/{MASK_50}": ("mlperf_linear", 800, 1e-4), f"ci/{MASK_50}_1gpu": ("mlperf_linear", 625, 6.4e-5),
    }  # fmt: skip
    assert found == special.get(name, ("linear", 500, float(Fraction(1, 3))))


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "maskrcnn.json").read_text())["parameter_counts"]
COUNTED = {
    "rpn_R_50_FPN": "quick_schedules/rpn_R_50_FPN_quick", "rpn_R_50_C4": "quick_schedules/rpn_R_50_C4_quick",
    **{f"e2e_{kind}_rcnn_{body}_FPN": f"e2e_{kind}_rcnn_{body}_FPN_1x"
       for kind in ("mask", "faster") for body in ("R_50", "R_101", "X_101_32x8d")},
    **{f"cityscapes e2e_{kind}_rcnn_R_50_FPN (9 classes)": f"cityscapes/e2e_{kind}_rcnn_R_50_FPN_1x_cocostyle"
       for kind in ("mask", "faster")},
    "pascal_voc e2e_mask_rcnn_R_50_FPN cocostyle (21 classes)": "pascal_voc/e2e_mask_rcnn_R_50_FPN_1x_cocostyle",
    **{f"gn e2e_{kind}_rcnn_R_50_FPN": f"gn_baselines/e2e_{kind}_rcnn_R_50_FPN_1x_gn" for kind in ("mask", "faster")},
    **{f"gn scratch e2e_{kind}_rcnn_R_50_FPN": f"gn_baselines/scratch_e2e_{kind}_rcnn_R_50_FPN_3x_gn"
       for kind in ("mask", "faster")},
}  # fmt: skip


LAYERS = [name for name in ModelConfig.__dataclass_fields__ if name.startswith(
    ("mask_on", "rpn_only", "backbone", "fpn", "group", "resnets", "rpn_use", "rpn_anchor", "roi_heads_use", "roi_box",
     "roi_mask")
)]  # fmt: skip
"""What decides about layers, so that files with the same ones build one network."""


@functools.cache
def counts(config: Config) -> tuple[int, int]:
    with torch.device("meta"):
        parameters = list(MaskRCNN(config).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("name", FILES)
def test_a_network_can_be_built_and_has_the_originals_parameters(name):
    """Where the original's are known; its last version could not build 12 of its own files."""
    known = {COUNTED[golden["config"]]: (golden["total"], golden["trainable"]) for golden in GOLDEN}
    config = read(name)
    found = counts(Config(**{field: getattr(config, field) for field in LAYERS}))
    assert found == known.get(name, found) and len(known) == len(COUNTED)


def test_a_whole_configuration_as_the_original_logs_it_is_that_of_the_defaults():
    """Every key of the tree, and those of features that it leaves out; only device and output folder have others."""
    words = translate_flags(["--config-file", str(Path(__file__).with_name("defaults.yaml"))])
    loaded = load(Config, words, {}, IGNORED_FLAGS)
    assert loaded.config == Config(device="cuda", output_dir=Path("."))
    said = [source for source in loaded.sources.values() if source.startswith("file")]
    without_effect = [key for key in IGNORED_FLAGS if not key.startswith("-")]
    assert len(said) + len(without_effect) == len(KEYS) and len(loaded.notices) == len(without_effect)
