"""COCO annotation files as the converters write them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dataprep.openimages_pieces import disk_errors
from detcore import UserError


def instance(mask: np.ndarray) -> dict[str, Any]:
    """segmentation (COCO's compressed RLE), area and bbox of one object; mask: bool [H, W], not empty."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    box, area = coco.toBbox(rle).tolist(), int(coco.area(rle))
    return {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "area": area, "bbox": box}


def rectangle(left: float, top: float, width: float, height: float) -> dict[str, Any]:
    """The same of an object of which the box alone is known, in pixels from the image's corner."""
    right, bottom = left + width, top + height
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {"segmentation": [corners], "area": width * height, "bbox": [left, top, width, height]}


def label_image(path: Path) -> np.ndarray:
    """The numbers that a PNG holds, [H, W]: palette indices or 16-bit values. Raises UserError for what is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG
        raise UserError(f"{path} can't be read as an image ({error}); unpack it again") from error
    if values.ndim != 2:
        raise UserError(f"{path} is a picture of colours, not of the objects' numbers; unpack it again")
    return values


def write(path: Path, description: str, names: Sequence[str], images: list[dict], objects: list[dict]) -> str:
    """Write the file, whole or not at all, and return a line about it.

    names: of categories 1, 2, ... objects: annotations without id and iscrowd, which are added where they are missing.
    Raises UserError where there are no images, or the disk is full.
    """
    if not images:
        raise UserError(f"{path}: not written, for there is no image")
    annotations: list[Mapping[str, Any]] = [{"iscrowd": 0, **one, "id": i} for i, one in enumerate(objects, 1)]
    categories = [{"id": i, "name": name, "supercategory": "object"} for i, name in enumerate(names, 1)]
    info = {"description": description}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    save(path, msgspec.json.encode(content))
    return f"{path}: {len(images):,} images, {len(annotations):,} objects"


def save(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with disk_errors(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
