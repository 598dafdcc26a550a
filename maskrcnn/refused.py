"""Keys of maskrcnn-benchmark's configuration whose features this program, as NVIDIA's, has not."""

from typing import Any

from detcore import UserError

_SWITCHES = {
    "MODEL.KEYPOINT_ON": ("MODEL.ROI_KEYPOINT_HEAD.", "there is no keypoint head"),
    "MODEL.RETINANET_ON": (
        "MODEL.RETINANET.", "there is no RetinaNet among these networks; python -m single_stage_detector.train is one"
    ),
    "TEST.BBOX_AUG.ENABLED": ("TEST.BBOX_AUG.", "evaluation looks at each image once, without augmentation"),
}  # fmt: skip
"""Key: the keys that count only where it is True, and why it can't be."""

_DEFORMABLE = "there are no deformable convolutions"
_JITTER = "colours of training images are not changed"
_ONLY: dict[str, tuple[tuple, str]] = {
    "MODEL.CLS_AGNOSTIC_BBOX_REG": ((False,), "boxes are predicted for each class"),
    "MODEL.RESNETS.STAGE_WITH_DCN": (((False,) * 4,), _DEFORMABLE),
    "MODEL.RESNETS.WITH_MODULATED_DCN": ((False,), _DEFORMABLE),
    "MODEL.RESNETS.DEFORMABLE_GROUPS": ((1,), _DEFORMABLE),
    "INPUT.BRIGHTNESS": ((0,), _JITTER),
    "INPUT.CONTRAST": ((0,), _JITTER),
    "INPUT.SATURATION": ((0,), _JITTER),
    "INPUT.HUE": ((0,), _JITTER),
    "INPUT.HORIZONTAL_FLIP_PROB": ((0.5,), "half of the training images are mirrored"),
    "INPUT.HORIZONTAL_FLIP_PROB_TRAIN": ((0.5,), "half of the training images are mirrored"),
    "INPUT.VERTICAL_FLIP_PROB": ((0,), "training images are not turned upside down"),
    "INPUT.VERTICAL_FLIP_PROB_TRAIN": ((0,), "training images are not turned upside down"),
    "INPUT.MIN_SIZE_TRAIN_RANGE": (((-1, -1),), "training at several scales, drawn at random, is not offered"),
    "TEST.DETECTIONS_PER_IMG": ((100,), "it belongs to augmentation in evaluation; MODEL.ROI_HEADS.DETECTIONS_PER_IMG "
                                "is the number of detections"),
    "SOLVER.TEST_PERIOD": ((0,), "PER_EPOCH_EVAL evaluates during training"),
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": ((False,), "masks are predicted for each class"),
}  # fmt: skip
"""Key: the values that change nothing, and why there are no others."""

_CATALOG = "maskrcnn_benchmark/config/paths_catalog.py"
_NO_CATALOG = (
    "data sets are found by their names below --dataset-path: coco_2014_train and the others of the original, or your "
    "own my_dataset_train, with images in my_dataset/images_train and annotations in my_dataset/instances_train.json; "
    "leave the key out"
)


def refuse(key: str, value: Any) -> bool:
    """Whether a key of a missing feature has a value that leaves it out, so that it changes nothing.

    False for other keys. Raises UserError, with the reason, for a value that asks for the feature.
    """
    same = tuple(value) if isinstance(value, list) else value
    if key in _SWITCHES:
        inert, reason = value is False, _SWITCHES[key][1]
    elif key.startswith((*(keys for keys, _ in _SWITCHES.values()), "MODEL.FBNET.")):
        return True
    elif key in _ONLY:
        inert, reason = any(same == one for one in _ONLY[key][0]), _ONLY[key][1]
    elif key == "PATHS_CATALOG":
        inert, reason = str(value).endswith(_CATALOG), _NO_CATALOG
    else:
        return False
    if not inert:
        raise UserError(f"{key} {value}: {reason}")
    return True
