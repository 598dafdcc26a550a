"""The EXIF orientation of an image file, and whether its pixels are turned by it.

The size in the annotation file decides: where it is that of the upright picture, the boxes were drawn on that one and
the pixels are turned; where it is that of the stored pixels, they stay. A half turn, a mirror image and a square have
the same size either way; there `--exif` decides, and without it pixels stay as they are stored, as in the reference.
Orientations are those of EXIF 2.3, 1 to 8. Imports no torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detcore.data.jpeg_header import BadHeader, of_tiff, read_header

MODES = ("auto", "apply", "ignore")
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers of JPEG without a length


def of_jpeg(data: memoryview) -> int:
    """Orientation in the header of a JPEG file's bytes; 0 without one."""
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF):
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker in (0xDA, 0xD9):  # the pixels begin, or the file ends
            break
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if (
                marker == 0xE1
                and bytes(data[at + 4 : at + 10]) == b"Exif\0\0"
                and (found := of_tiff(data[at + 10 : end]))
            ):
                return found
            at = max(end, at + 2)
    return 0


def turns(orientation: object, stored: tuple[int, int], listed: tuple[int, int] | None, mode: str = "auto") -> bool:
    """Whether the pixels are turned. stored, listed: (height, width) of the file and of its entry; None: no entry.

    mode: one of MODES, for what the sizes leave open; "auto" turns where there is no entry, for every viewer shows the
    picture upright, and not where there is one.
    """
    if orientation not in range(2, 9):
        return False
    if listed is not None and told(orientation, stored):
        return tuple(listed) == (stored[1], stored[0])
    return mode == "apply" or (mode == "auto" and listed is None)


def told(orientation: object, stored: tuple[int, int]) -> bool:
    """Whether the size of the picture tells if it was turned."""
    return orientation in range(5, 9) and stored[0] != stored[1]


SURVEYED = 4096  # images whose headers are read when an index is built


def survey(folder: str | Path, names: Sequence[str], heights: np.ndarray, widths: np.ndarray) -> dict[str, int]:
    """What the EXIF of at most SURVEYED JPEG files says, evenly spread over all: how many were "looked at", are
    "turned" or "stored" as their listed size says, or are "undecided" because it does not tell."""
    found = {"looked at": 0, "turned": 0, "stored": 0, "undecided": 0}
    for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), SURVEYED)).astype(np.int64)).tolist():
        try:
            header = read_header(os.path.join(folder, names[i]))
        except (OSError, ValueError, BadHeader):  # missing, or no JPEG; the loader says what is wrong with it
            continue
        found["looked at"] += 1
        stored, listed = (header.height, header.width), (int(heights[i]), int(widths[i]))
        if header.orientation < 2:
            continue
        if not told(header.orientation, stored):
            found["undecided"] += 1
        elif listed in (stored, stored[::-1]):
            found["stored" if listed == stored else "turned"] += 1
    return found


def words(found: dict[str, int], images: int) -> list[str]:
    """A survey in words, for the summary; no line where there is nothing to say."""
    says = {
        "turned": "turned upright, as the listed size says",
        "stored": "as stored, as the listed size says",
        "undecided": "of which the size does not tell (--exif says what becomes of them)",
    }
    parts = [f"{found[key]:,} {text}" for key, text in says.items() if found.get(key)]
    if not parts:
        return []
    some = f", of {found['looked at']:,} looked at" if images > SURVEYED else ""
    return [f"images with an EXIF orientation{some}: {'; '.join(parts)}"]
