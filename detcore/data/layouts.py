"""How the data sets that are known here lie on disk. Imports nothing, so that tools start without torch."""

from typing import NamedTuple


class Layout(NamedTuple):
    """Where a data set keeps its parts below its root, and how many classes it must have (None: any number).

    contiguous: whether the category ids must be 0..K-1 or 1..K, where others mean a faulty conversion. crowd: whether
    boxes marked iscrowd train as ordinary positives (OpenImages group-of boxes) or are left out (COCO).
    """

    train_images: str
    train_annotations: str
    val_images: str
    val_annotations: str
    classes: int | None
    contiguous: bool
    crowd: str


LAYOUTS = {
    "openimages-mlperf": Layout(
        "train/data", "train/labels/openimages-mlperf.json",
        "validation/data", "validation/labels/openimages-mlperf.json", 264, True, "keep",
    ),
    "openimages": Layout(
        "train/data", "train/labels/openimages.json",
        "validation/data", "validation/labels/openimages.json", 601, True, "keep",
    ),
    "coco": Layout(
        "train2017", "annotations/instances_train2017.json",
        "val2017", "annotations/instances_val2017.json", 80, False, "drop",
    ),
    "waymo": Layout(
        "training/images", "training/annotations/annotations.json",
        "validation/images", "validation/annotations/annotations.json", 3, True, "drop",
    ),
    "custom": Layout(
        "train", "annotations/instances_train.json", "val", "annotations/instances_val.json", None, False, "drop",
    ),
    "roboflow": Layout(
        "train", "train/_annotations.coco.json", "valid", "valid/_annotations.coco.json", None, False, "drop",
    ),
}  # fmt: skip
