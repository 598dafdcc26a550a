"""Image files as bytes. Imports no torch: `CocoIndex` and what prepares data sets start without it."""

from pathlib import Path

import numpy as np

from detcore import UserError


def read_bytes(path: Path, image_id: int | None) -> np.ndarray:
    """The file as uint8 [n]. UserError, naming file and image, if it cannot be read or is empty.

    image_id: its id in the annotation file; None where there is no such file, in prediction.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        name = "the image" if image_id is None else f"image {image_id}"
        remedy = "check its permissions, or leave it out" if image_id is None else "restore the file"
        raise UserError(f"{path}: cannot read {name} ({reason}); {remedy}.") from error
    if not len(data):
        name, remedy = ("", "leave it out") if image_id is None else (f" of image {image_id}", "download it again")
        raise UserError(f"{path}: the file{name} is empty; {remedy}.")
    return data
