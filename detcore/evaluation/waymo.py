"""Waymo's 2D detection score as NVIDIA's EfficientDet computes it: one IoU threshold for each class, and "L2_ALL_NS".

It is COCO's average precision (101 recall points, 100 detections an image, greedy matching), each class at its own
threshold, and no leaderboard number: Waymo's own metric interpolates and matches in another way. "L2": boxes of both
difficulties count. "ALL_NS": all classes but signs.
"""

from collections.abc import Sequence

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


def summarize(precision: np.ndarray, category_ids: np.ndarray, thresholds: Sequence[float]) -> dict[str, float]:
    """METRICS in percent, -1.0 where there is no ground truth.

    precision: [T, R, K, A, M] as COCOeval accumulates it, -1 without ground truth; of the areas the first ("all") and
    of the numbers of detections the last (100) count. category_ids: [K], ascending. thresholds: the T IoU thresholds.

    L2_ALL_NS is the mean over the samples of the three classes together: a class without ground truth drops out.
    """
    samples = {name: np.empty(0) for name, _ in CLASSES.values()}
    for k, category_id in enumerate(category_ids.tolist()):
        name, threshold = CLASSES[category_id]
        samples[name] = precision[list(thresholds).index(threshold), :, k, 0, -1]
    return {"L2_ALL_NS": _mean(np.concatenate(list(samples.values())))} | {
        name: _mean(values) for name, values in samples.items()
    }


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) * 100 if values.size else -1.0
