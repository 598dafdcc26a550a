"""What the boxes of a whole annotation file look like: counted while its index is built, judged before training."""

from collections.abc import Sequence

import numpy as np

from detcore import UserError

_LARGEST_AREA = 1e10  # COCO's evaluation ignores truth of a larger area, and of one below 0
_PERCENT_SIDE = 200  # pixels; in images with shorter sides, boxes below 100 say nothing


def count(
    bbox: np.ndarray, area: np.ndarray, crowd: np.ndarray, size: np.ndarray, clipped: np.ndarray, keep: np.ndarray
) -> dict[str, int]:
    """The signs of n boxes.

    bbox: float64 [n, 4] x, y, w, h and area: float64 [n], as in the file; crowd: bool [n]; size: [n, 2] width, height
    of the image; clipped: float32 [n, 4] corners within the image; keep: bool [n], whether an area is left of the box.
    """
    x, y, w, h = bbox.T
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest ones
        right, low = x + w, y + h
        corners = (w > x) & (h > y) & (x >= 0) & (y >= 0) & (w <= size[:, 0] + 1) & (h <= size[:, 1] + 1)
        between, within = (w - x) * (h - y), w * h
        ends = np.maximum(right, low)
    positive = (w > 0) & (h > 0) & (x >= 0) & (y >= 0)
    signs = {
        "boxes": np.ones(len(bbox), bool),
        "trained": keep,
        "trained without crowd": keep & ~crowd,
        "crowd left out": keep & crowd,
        "scored": ~crowd & (area >= 0) & (area <= _LARGEST_AREA),
        "under one pixel": keep & ((clipped[:, 2:] - clipped[:, :2]) < 1).any(1),
        "fractions": positive & (right <= 1.01) & (low <= 1.01) & (bbox % 1 != 0).any(1),
        "percent": positive & (ends <= 100.5) & (size.min(1) >= _PERCENT_SIDE),
        "corners": corners,
        "corner areas": corners
        & (np.abs(area - between) <= 0.01 * np.abs(area))
        & (np.abs(area - within) > 0.05 * area),
        "leaving": keep & ((right > size[:, 0] + 1) | (low > size[:, 1] + 1)),
    }
    return {name: int(sign.sum()) for name, sign in signs.items()}


def suspicions(signs: dict[str, int]) -> list[str]:
    """What is likely wrong with all the boxes of a file, in sentences that say what to do."""
    n, words = signs["boxes"], []
    if not n:
        return []
    if signs["fractions"] > 0.5 * n:
        words.append(
            f"{signs['fractions']:,} of {n:,} boxes lie between 0 and 1: they seem to be fractions of the image, as "
            "YOLO writes them; COCO wants pixels, so multiply x and width by the image's width, y and height by its "
            "height"
        )
    elif n >= 20 and signs["percent"] > 0.98 * n:
        words.append(
            f"{signs['percent']:,} of {n:,} boxes lie within the first 100 pixels of larger images: they may be "
            "percent of the image, as Label Studio writes them; COCO wants pixels"
        )
    by_place = n >= 3 and signs["corners"] > 0.98 * n and signs["leaving"] > 0.25 * n
    if by_place or signs["corner areas"] > 0.9 * n:
        words.append(
            f"{signs['corners']:,} of {n:,} boxes fit their image as x1, y1, x2, y2, and {signs['leaving']:,} leave it "
            "as x, y, width, height, which COCO wants: they seem to be corners (Pascal VOC); store x2 - x1 and y2 - y1"
        )
    return words


def check_training(files: Sequence[tuple[str, dict[str, int]]], crowd: str) -> None:
    """Raises UserError where nothing would be learnt. files: name and signs of each; crowd: as `Layout` has it."""
    for name, signs in files:
        if signs["boxes"] and signs["fractions"] > 0.5 * signs["boxes"]:
            raise UserError(f"{name}: {suspicions(signs)[0]}.")
    if any(signs["trained" if crowd == "keep" else "trained without crowd"] for _, signs in files):
        return
    names = ", ".join(name for name, _ in files)
    total = {key: sum(signs[key] for _, signs in files) for key in ("boxes", "crowd left out")}
    if not total["boxes"]:
        reason = "there are no annotations"
    elif total["crowd left out"]:
        reason = (
            f"{total['crowd left out']:,} of {total['boxes']:,} boxes are marked iscrowd, and those are left out here"
        )
        reason += ": set iscrowd to 0 where a box is around one object"
    else:
        reason = f"none of the {total['boxes']:,} boxes has an area within its image"
    raise UserError(f"{names}: no box to train with, so nothing would be learnt; {reason}.")
