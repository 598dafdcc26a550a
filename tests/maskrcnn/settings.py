"""Settings of networks for tests: the original's defaults, its FPN block, and small ones."""

from types import SimpleNamespace

DEFAULTS = {
    "mask_on": False, "rpn_only": False, "legacy_boxes": True,
    "input_pixel_mean": (102.9801, 115.9465, 122.7717), "input_pixel_std": (1.0, 1.0, 1.0), "input_to_bgr255": True,
    "backbone_conv_body": "R-50-C4", "backbone_freeze_conv_body_at": 2, "backbone_out_channels": 1024,
    "fpn_use_gn": False, "fpn_use_relu": False,
    "group_norm_dim_per_gp": -1, "group_norm_num_groups": 32, "group_norm_epsilon": 1e-5,
    "rpn_use_fpn": False, "rpn_anchor_sizes": (32, 64, 128, 256, 512), "rpn_anchor_stride": (16,),
    "rpn_aspect_ratios": (0.5, 1.0, 2.0), "rpn_straddle_thresh": 0, "rpn_fg_iou_threshold": 0.7,
    "rpn_bg_iou_threshold": 0.3, "rpn_batch_size_per_image": 256, "rpn_positive_fraction": 0.5,
    "rpn_pre_nms_top_n_train": 12000, "rpn_pre_nms_top_n_test": 6000, "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000, "rpn_nms_thresh": 0.7, "rpn_min_size": 0,
    "rpn_fpn_post_nms_top_n_train": 2000, "rpn_fpn_post_nms_top_n_test": 2000, "rpn_fpn_post_nms_per_batch": True,
    "rpn_rpn_head": "SingleConvRPNHead",
    "roi_heads_use_fpn": False, "roi_heads_fg_iou_threshold": 0.5, "roi_heads_bg_iou_threshold": 0.5,
    "roi_heads_bbox_reg_weights": (10.0, 10.0, 5.0, 5.0), "roi_heads_batch_size_per_image": 512,
    "roi_heads_positive_fraction": 0.25, "roi_heads_score_thresh": 0.05, "roi_heads_nms": 0.5,
    "roi_heads_detections_per_img": 100,
    "roi_box_head_feature_extractor": "ResNet50Conv5ROIFeatureExtractor", "roi_box_head_predictor": "FastRCNNPredictor",
    "roi_box_head_pooler_resolution": 14, "roi_box_head_pooler_sampling_ratio": 0,
    "roi_box_head_pooler_scales": (1 / 16,), "roi_box_head_num_classes": 81, "roi_box_head_mlp_head_dim": 1024,
    "roi_box_head_use_gn": False, "roi_box_head_dilation": 1, "roi_box_head_conv_head_dim": 256,
    "roi_box_head_num_stacked_convs": 4,
    "roi_mask_head_feature_extractor": "ResNet50Conv5ROIFeatureExtractor",
    "roi_mask_head_predictor": "MaskRCNNC4Predictor", "roi_mask_head_pooler_resolution": 14,
    "roi_mask_head_pooler_sampling_ratio": 0, "roi_mask_head_pooler_scales": (1 / 16,),
    "roi_mask_head_conv_layers": (256, 256, 256, 256), "roi_mask_head_resolution": 14,
    "roi_mask_head_share_box_feature_extractor": True, "roi_mask_head_dilation": 1, "roi_mask_head_use_gn": False,
    "resnets_num_groups": 1, "resnets_width_per_group": 64, "resnets_stride_in_1x1": True,
    "resnets_trans_func": "BottleneckWithFixedBatchNorm", "resnets_stem_func": "StemWithFixedBatchNorm",
    "resnets_res5_dilation": 1, "resnets_res2_out_channels": 256, "resnets_stem_out_channels": 64,
}  # fmt: skip

_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
FPN = {
    "backbone_conv_body": "R-50-FPN", "backbone_out_channels": 256, "rpn_use_fpn": True,
    "rpn_anchor_stride": (4, 8, 16, 32, 64), "rpn_pre_nms_top_n_train": 2000, "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_test": 1000, "rpn_fpn_post_nms_top_n_test": 1000, "roi_heads_use_fpn": True,
    "roi_box_head_pooler_resolution": 7, "roi_box_head_pooler_scales": _SCALES,
    "roi_box_head_pooler_sampling_ratio": 2, "roi_box_head_feature_extractor": "FPN2MLPFeatureExtractor",
    "roi_box_head_predictor": "FPNPredictor", "roi_mask_head_pooler_scales": _SCALES,
    "roi_mask_head_feature_extractor": "MaskRCNNFPNFeatureExtractor", "roi_mask_head_pooler_sampling_ratio": 2,
    "roi_mask_head_resolution": 28, "roi_mask_head_share_box_feature_extractor": False,
}  # fmt: skip
MASKS = {"mask_on": True}
R101 = {"backbone_conv_body": "R-101-FPN"}
X101 = R101 | {"resnets_stride_in_1x1": False, "resnets_num_groups": 32, "resnets_width_per_group": 8}
GN = {
    "resnets_trans_func": "BottleneckWithGN", "resnets_stem_func": "StemWithGN", "fpn_use_gn": True,
    "roi_box_head_use_gn": True, "roi_mask_head_use_gn": True,
}  # fmt: skip
XCONV = {"roi_box_head_feature_extractor": "FPNXconv1fcFeatureExtractor"}
SMALL = {
    "backbone_conv_body": "R-18-FPN", "backbone_out_channels": 16, "roi_box_head_mlp_head_dim": 32,
    "roi_box_head_num_classes": 4, "roi_mask_head_conv_layers": (8, 8), "roi_heads_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 60, "rpn_fpn_post_nms_top_n_train": 80, "rpn_pre_nms_top_n_test": 60,
    "rpn_fpn_post_nms_top_n_test": 40, "rpn_anchor_sizes": (8, 16, 32, 64, 128),
}  # fmt: skip


def settings(*blocks: dict, **changes) -> SimpleNamespace:
    """The defaults, changed by blocks one after the other."""
    found = dict(DEFAULTS)
    for block in (*blocks, changes):
        assert block.keys() <= DEFAULTS.keys()
        found |= block
    return SimpleNamespace(**found)
