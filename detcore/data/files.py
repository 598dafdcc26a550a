"""Image files as bytes. Imports no torch: `CocoIndex` and what prepares data sets start without it."""

from pathlib import Path

import numpy as np

from detcore import UserError


def read_bytes(path: Path, image_id: int) -> np.ndarray:
    """The file as uint8 [n]. UserError, naming file and image, if it cannot be read or is empty."""
    try:
        data = np.fromfile(path, np.uint8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read image {image_id} ({reason}); restore the file.") from error
    if not len(data):
        raise UserError(f"{path}: the file of image {image_id} is empty; download it again.")
    return data
