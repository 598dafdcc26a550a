"""Waymo's 2D detection score as NVIDIA's EfficientDet computes it: one IoU threshold for each class, and "L2_ALL_NS".

It is COCO's average precision (101 recall points, 100 detections an image, greedy matching), each class at its own
threshold, and no leaderboard number: Waymo's own metric interpolates and matches in another way. "L2": boxes of both
difficulties count. "ALL_NS": all classes but signs.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from detcore import UserError

CLASSES = {1: ("vehicle", 0.7), 2: ("pedestrian", 0.5), 3: ("cyclist", 0.5)}  # category id: name, IoU threshold
METRICS = ("L2_ALL_NS", *(name for name, _ in CLASSES.values()))


def check_categories(category_ids: np.ndarray) -> None:
    """UserError unless the annotation file lists nothing but the three categories of Waymo."""
    other = sorted(set(category_ids.tolist()) - CLASSES.keys())
    if other:
        wanted = ", ".join(f"{id_} {name}" for id_, (name, _) in CLASSES.items())
        raise UserError(
            f"the annotation file lists category {other[0]}, and Waymo's score is of {wanted}: convert the data set "
            "with public-scripts/waymo_to_coco.py, or score without it"
        )


def class_mean(values: Iterable[float]) -> float:
    """L2_ALL_NS of the classes' average precisions: a class without ground truth, whose value is -1, drops out of the
    mean, which is -1.0 where no class has any. The original takes the mean over the recall points of all classes
    together, which is the same: each has 101.
    """
    found = [value for value in values if value > -1]
    return sum(found) / len(found) if found else -1.0


def summarize(precision: np.ndarray, category_ids: np.ndarray, thresholds: Sequence[float]) -> dict[str, float]:
    """METRICS in percent, -1.0 where there is no ground truth.

    precision: [T, R, K, A, M] as COCOeval accumulates it, -1 without ground truth; of the areas the first ("all") and
    of the numbers of detections the last (100) count. category_ids: [K], ascending. thresholds: the T IoU thresholds.
    """
    found = {name: -1.0 for name, _ in CLASSES.values()}
    for k, category_id in enumerate(category_ids.tolist()):
        name, threshold = CLASSES[category_id]
        values = precision[list(thresholds).index(threshold), :, k, 0, -1]
        values = values[values > -1]
        found[name] = float(values.mean()) * 100 if values.size else -1.0
    return {"L2_ALL_NS": class_mean(found.values())} | found
