"""From detections to the twelve COCO numbers."""

from typing import NamedTuple

import numpy as np


class GroundTruth(NamedTuple):
    """What the detections are compared with: every annotation of one COCO file, as columns.

    Boxes are in pixels of the original image, top-left corner first; `area` is the file's own area, which
    for a mask is not the box's. Annotation ids are left out on purpose (see `evaluate`).
    """

    image_ids: np.ndarray  # int64 [I], every image that counts, also those without annotations
    category_ids: np.ndarray  # int64 [K], every category that may be detected, the file's ids
    ann_image_id: np.ndarray  # int64 [B]
    ann_category_id: np.ndarray  # int64 [B]
    bbox: np.ndarray  # float64 [B, 4] x, y, w, h
    area: np.ndarray  # float64 [B]
    iscrowd: np.ndarray  # uint8 [B]
