"""The network as maskrcnn-benchmark's configuration tree describes it: the keys below MODEL, one field each."""

from dataclasses import dataclass

from detcore.config import above, at_least, between, option
from detcore.detection.config import DetectionConfig

BODIES = tuple(f"R-{depth}-{end}" for depth in (18, 34, 50, 101, 152) for end in ("C4", "C5", "FPN"))
_CONV5 = "ResNet50Conv5ROIFeatureExtractor"


def key_option(key: str, default, help: str, **how):
    """The option of one key of the tree; its group in --help is the key's section."""
    section = key.removeprefix("MODEL.").rpartition(".")[0]
    return option(default, help, flags=(key,), group=section or "Model", **how)


@dataclass(frozen=True)
class ModelConfig(DetectionConfig):
    """The network: the keys below MODEL. The defaults are the original's: Faster R-CNN on R-50-C4."""

    meta_architecture: str = key_option(
        "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "kind of network", choices=("GeneralizedRCNN",)
    )
    rpn_only: bool = key_option("MODEL.RPN_ONLY", False, "proposals alone, without heads")
    mask_on: bool = key_option("MODEL.MASK_ON", False, "Mask R-CNN; without it Faster R-CNN")
    legacy_boxes: bool = option(
        True, "boxes in the network are the original's, whose right and lower pixel belong to them: widths have 1 more",
        group="Model",
    )  # fmt: skip

    backbone_conv_body: str = key_option(
        "MODEL.BACKBONE.CONV_BODY", "R-50-C4", "body, and where it ends", choices=BODIES
    )
    backbone_freeze_conv_body_at: int = key_option(
        "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", 2, "stages from the stem on that do not train", check=between(0, 5)
    )
    backbone_out_channels: int = key_option(
        "MODEL.BACKBONE.OUT_CHANNELS", 1024, "channels of its feature maps", check=at_least(1)
    )
    backbone_use_gn: bool = key_option(
        "MODEL.BACKBONE.USE_GN", False, "read by none of the bodies, here and in the original"
    )
    fpn_use_gn: bool = key_option("MODEL.FPN.USE_GN", False, "group normalisation after each convolution")
    fpn_use_relu: bool = key_option("MODEL.FPN.USE_RELU", False, "ReLU after each convolution")
    group_norm_dim_per_gp: int = key_option(
        "MODEL.GROUP_NORM.DIM_PER_GP", -1, "channels of a group; -1: NUM_GROUPS says it"
    )
    group_norm_num_groups: int = key_option("MODEL.GROUP_NORM.NUM_GROUPS", 32, "groups; -1: DIM_PER_GP says it")
    group_norm_epsilon: float = key_option("MODEL.GROUP_NORM.EPSILON", 1e-5, "added to the variance", check=above(0))

    resnets_num_groups: int = key_option(
        "MODEL.RESNETS.NUM_GROUPS", 1, "groups of the 3x3 convolutions", check=at_least(1)
    )
    resnets_width_per_group: int = key_option("MODEL.RESNETS.WIDTH_PER_GROUP", 64, "their channels", check=at_least(1))
    resnets_stride_in_1x1: bool = key_option(
        "MODEL.RESNETS.STRIDE_IN_1X1", True, "a block's stride is in its first 1x1 convolution; else in its 3x3"
    )
    resnets_trans_func: str = key_option(
        "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithFixedBatchNorm", "kind of blocks",
        choices=("BottleneckWithFixedBatchNorm", "BottleneckWithBatchNorm", "BottleneckWithGN"),
    )  # fmt: skip
    resnets_stem_func: str = key_option(
        "MODEL.RESNETS.STEM_FUNC", "StemWithFixedBatchNorm", "kind of stem",
        choices=("StemWithFixedBatchNorm", "StemWithBatchNorm", "StemWithGN"),
    )  # fmt: skip
    resnets_res5_dilation: int = key_option("MODEL.RESNETS.RES5_DILATION", 1, "of the last stage", check=between(1, 2))
    resnets_res2_out_channels: int = key_option(
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "channels of the second stage", check=at_least(1)
    )
    resnets_stem_out_channels: int = key_option(
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "channels of the stem", check=at_least(1)
    )

    rpn_use_fpn: bool = key_option("MODEL.RPN.USE_FPN", False, "proposals of each level of a pyramid")
    rpn_rpn_head: str = key_option(
        "MODEL.RPN.RPN_HEAD", "SingleConvRPNHead", "its head", choices=("SingleConvRPNHead",)
    )
    rpn_anchor_sizes: tuple[int, ...] = key_option(
        "MODEL.RPN.ANCHOR_SIZES",
        (32, 64, 128, 256, 512),
        "sides in pixels; of a pyramid one a level",
        check=at_least(1),
    )
    rpn_anchor_stride: tuple[int, ...] = key_option(
        "MODEL.RPN.ANCHOR_STRIDE", (16,), "pixels between anchors; of a pyramid one a level", check=at_least(1)
    )
    rpn_aspect_ratios: tuple[float, ...] = key_option(
        "MODEL.RPN.ASPECT_RATIOS", (0.5, 1.0, 2.0), "height to width", check=above(0)
    )
    rpn_straddle_thresh: int = key_option(
        "MODEL.RPN.STRADDLE_THRESH", 0, "pixels by which a training anchor may leave the image; -1: any number"
    )
    rpn_fg_iou_threshold: float = key_option(
        "MODEL.RPN.FG_IOU_THRESHOLD", 0.7, "IoU from which an anchor is positive", check=between(0, 1)
    )
    rpn_bg_iou_threshold: float = key_option(
        "MODEL.RPN.BG_IOU_THRESHOLD", 0.3, "IoU below which it is negative", check=between(0, 1)
    )
    rpn_batch_size_per_image: int = key_option(
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256, "anchors of an image in the loss", check=at_least(1)
    )
    rpn_positive_fraction: float = key_option(
        "MODEL.RPN.POSITIVE_FRACTION", 0.5, "part of them that is positive, at most", check=between(0, 1)
    )
    rpn_pre_nms_top_n_train: int = key_option(
        "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", 12000, "training: best anchors of a level that go on", check=at_least(1)
    )
    rpn_pre_nms_top_n_test: int = key_option(
        "MODEL.RPN.PRE_NMS_TOP_N_TEST", 6000, "the same otherwise", check=at_least(1)
    )  # fmt: skip
    rpn_post_nms_top_n_train: int = key_option(
        "MODEL.RPN.POST_NMS_TOP_N_TRAIN", 2000, "training: proposals of a level after NMS", check=at_least(1)
    )
    rpn_post_nms_top_n_test: int = key_option(
        "MODEL.RPN.POST_NMS_TOP_N_TEST", 1000, "the same otherwise", check=at_least(1)
    )  # fmt: skip
    rpn_nms_thresh: float = key_option("MODEL.RPN.NMS_THRESH", 0.7, "IoU of proposals' NMS", check=between(0, 1))
    rpn_min_size: int = key_option("MODEL.RPN.MIN_SIZE", 0, "smallest side of a proposal, in pixels", check=at_least(0))
    rpn_fpn_post_nms_top_n_train: int = key_option(
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", 2000, "training: best proposals of all levels", check=at_least(1)
    )
    rpn_fpn_post_nms_top_n_test: int = key_option(
        "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", 2000, "the same otherwise, of an image", check=at_least(1)
    )
    rpn_fpn_post_nms_per_batch: bool = key_option(
        "MODEL.RPN.FPN_POST_NMS_PER_BATCH", True, "FPN_POST_NMS_TOP_N_TRAIN counts the proposals of a process' images "
        "together, as the published recipes want it; else of each image",
    )  # fmt: skip

    roi_heads_use_fpn: bool = key_option(
        "MODEL.ROI_HEADS.USE_FPN", False, "regions from the level that fits their size"
    )
    roi_heads_fg_iou_threshold: float = key_option(
        "MODEL.ROI_HEADS.FG_IOU_THRESHOLD", 0.5, "IoU from which a region is an object", check=between(0, 1)
    )
    roi_heads_bg_iou_threshold: float = key_option(
        "MODEL.ROI_HEADS.BG_IOU_THRESHOLD", 0.5, "IoU below which it is background", check=between(0, 1)
    )
    roi_heads_bbox_reg_weights: tuple[float, float, float, float] = key_option(
        "MODEL.ROI_HEADS.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0), "factors of dx, dy, dw, dh", check=above(0)
    )
    roi_heads_batch_size_per_image: int = key_option(
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, "regions of an image in the loss", check=at_least(1)
    )
    roi_heads_positive_fraction: float = key_option(
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.25, "part of them that are objects, at most", check=between(0, 1)
    )
    roi_heads_score_thresh: float = key_option(
        "MODEL.ROI_HEADS.SCORE_THRESH", 0.05, "score above which a detection counts", check=between(0, 1)
    )
    roi_heads_nms: float = key_option(
        "MODEL.ROI_HEADS.NMS", 0.5, "IoU of detections' NMS in a class", check=between(0, 1)
    )
    roi_heads_detections_per_img: int = key_option(
        "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", 100, "detections of an image at most", check=at_least(1)
    )

    roi_box_head_feature_extractor: str = key_option(
        "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", _CONV5, "layers before its predictor",
        choices=(_CONV5, "FPN2MLPFeatureExtractor", "FPNXconv1fcFeatureExtractor"),
    )  # fmt: skip
    roi_box_head_predictor: str = key_option(
        "MODEL.ROI_BOX_HEAD.PREDICTOR", "FastRCNNPredictor", "its predictor",
        choices=("FastRCNNPredictor", "FPNPredictor"),
    )  # fmt: skip
    roi_box_head_pooler_resolution: int = key_option(
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14, "cells of a region's side", check=at_least(1)
    )
    roi_box_head_pooler_sampling_ratio: int = key_option(
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0, "samples of a cell's side; 0: by its size", check=at_least(0)
    )
    roi_box_head_pooler_scales: tuple[float, ...] = key_option(
        "MODEL.ROI_BOX_HEAD.POOLER_SCALES", (1 / 16,), "size of each feature map to the image's", check=above(0)
    )
    roi_box_head_num_classes: int = key_option(
        "MODEL.ROI_BOX_HEAD.NUM_CLASSES", 81, "classes and the background", check=between(2, 100001)
    )
    roi_box_head_mlp_head_dim: int = key_option(
        "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", 1024, "channels of linear layers", check=at_least(1)
    )
    roi_box_head_use_gn: bool = key_option("MODEL.ROI_BOX_HEAD.USE_GN", False, "group normalisation after convolutions")
    roi_box_head_dilation: int = key_option("MODEL.ROI_BOX_HEAD.DILATION", 1, "of convolutions", check=at_least(1))
    roi_box_head_conv_head_dim: int = key_option(
        "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", 256, "channels of convolutions", check=at_least(1)
    )
    roi_box_head_num_stacked_convs: int = key_option(
        "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS", 4, "convolutions", check=at_least(0)
    )

    roi_mask_head_feature_extractor: str = key_option(
        "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", _CONV5, "layers before its predictor",
        choices=(_CONV5, "MaskRCNNFPNFeatureExtractor"),
    )  # fmt: skip
    roi_mask_head_predictor: str = key_option(
        "MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskRCNNC4Predictor", "its predictor", choices=("MaskRCNNC4Predictor",)
    )
    roi_mask_head_pooler_resolution: int = key_option(
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "cells of a region's side", check=at_least(1)
    )
    roi_mask_head_pooler_sampling_ratio: int = key_option(
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 0, "samples of a cell's side; 0: by its size", check=at_least(0)
    )
    roi_mask_head_pooler_scales: tuple[float, ...] = key_option(
        "MODEL.ROI_MASK_HEAD.POOLER_SCALES", (1 / 16,), "size of each feature map to the image's", check=above(0)
    )
    roi_mask_head_mlp_head_dim: int = key_option(
        "MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM", 1024, "read by none of the heads, here and in the original"
    )
    roi_mask_head_conv_layers: tuple[int, ...] = key_option(
        "MODEL.ROI_MASK_HEAD.CONV_LAYERS", (256, 256, 256, 256), "channels of its convolutions", check=at_least(1)
    )
    roi_mask_head_resolution: int = key_option(
        "MODEL.ROI_MASK_HEAD.RESOLUTION", 14, "cells of a predicted mask's side", check=at_least(1)
    )
    roi_mask_head_share_box_feature_extractor: bool = key_option(
        "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", True, "take the box head's layers before the predictor"
    )
    roi_mask_head_postprocess_masks: bool = key_option(
        "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", False, "masks in pixels of the image; a demonstration's, which always "
        "has them here",
    )  # fmt: skip
    roi_mask_head_postprocess_masks_threshold: float = key_option(
        "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD", 0.5, "probability above which a pixel is the object's",
        check=between(0, 1),
    )  # fmt: skip
    roi_mask_head_dilation: int = key_option("MODEL.ROI_MASK_HEAD.DILATION", 1, "of convolutions", check=at_least(1))
    roi_mask_head_use_gn: bool = key_option(
        "MODEL.ROI_MASK_HEAD.USE_GN", False, "group normalisation after convolutions"
    )
