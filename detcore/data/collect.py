"""What the index of an annotation file holds: its contents, how the boxes are treated, and which images there are."""

from pathlib import Path

import numpy as np

from detcore import UserError
from detcore.data import coco_json, exif, image_names, shards, signs


def training_boxes(
    bbox: np.ndarray, height: int | np.ndarray, width: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The training treatment of float64 [n, 4] x, y, w, h boxes in images of height and width pixels (scalars or [n]).

    Returns float32 [n, 4] x1, y1, x2, y2 clipped to the image, bool [n] whether an area is left, and bool [n] whether
    clipping moved an edge by more than 0.01 pixel.
    """
    corners = bbox.copy()
    with np.errstate(over="ignore"):  # an edge beyond the largest number is outside the image all the same
        corners[:, 2:] += bbox[:, :2]
    clipped = np.empty((len(bbox), 4), np.float32)
    for axis, side in ((0, width), (1, height)):
        clipped[:, axis::2] = np.clip(corners[:, axis::2], 0, np.reshape(side, (-1, 1)))
    keep = (clipped[:, 2:] > clipped[:, :2]).all(1) & (bbox[:, 2:] > 0).all(1)
    return clipped, keep, (np.abs(corners - clipped) > 0.01).any(1)


def within(counts: np.ndarray) -> np.ndarray:
    """int64 [counts.sum()]: each item's position in its group, for groups of int [n] counts one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def collect(key: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and columns of the cache, from the annotation file and the image folder."""
    file = Path(key["annotation_file"])
    try:
        parsed = coco_json.parse(file, key.get("masks"))
    except OSError as error:
        raise UserError(
            f"{file}: cannot read the annotation file ({error.strerror}); check its permissions."
        ) from error
    columns, counts = parsed.columns, parsed.counts
    order = np.argsort(columns["ann_image"], kind="stable")
    per_image = np.bincount(columns["ann_image"], minlength=len(columns["image_ids"]))
    columns["order"] = order.astype(np.int32 if len(order) < 2**31 else np.int64)
    columns["starts"] = np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64)
    del order
    counts |= {"images without annotations": int((per_image == 0).sum())}
    told = _count_boxes(columns, counts)
    found = image_names.scan(parsed.file_names, Path(key["image_dir"]), shards.open_folder(Path(key["image_dir"])))
    counts |= {
        "missing images": len(found.missing),
        "unlisted files": found.unlisted,
        "names of another spelling": len(found.renamed),
    }
    names = [found.renamed.get(i, name) for i, name in enumerate(parsed.file_names)]
    seen = {} if key["shards"] else exif.survey(key["image_dir"], names, columns["heights"], columns["widths"])
    encoded = [name.encode() for name in names]
    columns["names"] = np.frombuffer(b"".join(encoded), np.uint8)
    columns["name_ends"] = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    header = {"category_names": parsed.category_names, "counts": counts, "content_hash": parsed.content_hash}
    header |= {"named": parsed.named}
    return {"key": key, **header, "signs": told, "exif": seen}, columns


def _count_boxes(columns: dict[str, np.ndarray], counts: dict[str, int]) -> dict[str, int]:
    """The boxes' signs; adds how they were treated to the counts."""
    totals: dict[str, int] = {}
    treated = dict.fromkeys(("boxes dropped", "boxes clipped", "boxes under one pixel", "areas below 0"), 0)
    for first in range(0, max(len(columns["bbox"]), 1), 1 << 20):
        rows = slice(first, first + (1 << 20))
        at, bbox, area = columns["ann_image"][rows], columns["bbox"][rows], columns["area"][rows]
        size = np.stack([columns["widths"][at], columns["heights"][at]], 1)
        clipped, keep, moved = training_boxes(bbox, size[:, 1], size[:, 0])
        told = signs.count(bbox, area, columns["iscrowd"][rows] != 0, size, clipped, keep)
        totals = {name: totals.get(name, 0) + value for name, value in told.items()}
        treated["boxes dropped"] += int((~keep).sum())
        treated["boxes clipped"] += int((moved & keep).sum())
        treated["areas below 0"] += int((area < 0).sum())
    counts |= treated | {"boxes under one pixel": totals["under one pixel"]}
    return totals
