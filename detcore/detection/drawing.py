"""Boxes with class names and scores on an image, in whatever script the names are written.

Pillow's own font knows English letters alone. Others are looked for in the fonts of this machine; Debian's
fonts-unifont alone has nearly all of Unicode's first 65,536 characters. Letters that no font has are drawn as boxes,
which is said.
"""

import functools
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor

from detcore.evaluation.rle import Rles

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_FIRST = ("NotoSans-Regular", "NotoSansCJK-Regular", "DejaVuSans.", "DroidSansFallback", "unifont", "NotoSans")
_ABSENT = "\U0010fffd"  # the last private character, which fonts draw as they draw all that they lack


def draw(
    image: Tensor, found: Tensor, names: dict[int, str], masks: Rles | None = None, zoom: int | None = 1
) -> Tensor:
    """What was found in a uint8 image [3, h, w], on a copy of zoom times its height and width.

    found: float64 [d, 6] x, y, w, h in pixels, score, category id, the best first. names: of the categories by id; each
    has its colour, and each object where there is but one category. masks: of each row, in their own image's size,
    which are tinted; None: without. zoom None: up to 4, for a short side of about 600 pixels. A name is left out where
    it would hide another name or the middle of an object.
    """
    pixels, order = np.ascontiguousarray(image.permute(1, 2, 0).numpy()), list(names)
    kinds = range(len(found)) if len(order) == 1 else [order.index(int(category)) for category in found[:, 5].tolist()]
    colours = [COLOURS[kind % len(COLOURS)] for kind in kinds]
    if masks and len(found):
        pixels = _tinted(pixels, masks, colours)
    zoom = zoom or max(1, min(4, round(600 / min(pixels.shape[:2]))))
    picture = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    pen = ImageDraw.Draw(picture)
    width, size = max(1, picture.width // 300), max(11, min(picture.size) // 40)
    last = torch.tensor([picture.width - 1, picture.height - 1])
    corners = torch.stack([found[:, :2], found[:, :2] + found[:, 2:4]], 1) * zoom  # [d, 2, 2]
    boxes = corners.clamp(min=0).minimum(last).flatten(1).tolist()
    for (x, y, right, low), colour in zip(boxes, colours, strict=True):
        pen.rectangle((x, y, max(right, x), max(low, y)), outline=colour, width=width)
    kept_free = [((x + right) / 2, (y + low) / 2, (x + right) / 2, (y + low) / 2) for x, y, right, low in boxes]
    for box, (score, category), colour in zip(boxes, found[:, 4:].tolist(), colours, strict=True):
        name = "".join(c if c.isprintable() else " " for c in names[int(category)])
        text, font = f"{name} {score:.2f}", font_for(name, size)
        left, top, right, low = pen.textbbox((0, 0), text, font)
        if place := _free(box, right - left + 2, low - top + 2, width, kept_free, picture.size):
            pen.rectangle(place, fill=colour)
            pen.text((place[0] + 1 - left, place[1] + 1 - top), text, "white", font)
            kept_free.append(place)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _free(
    box: list[float], across: float, down: float, width: int, kept_free: list[tuple], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Where a name can stand, as x1, y1, x2, y2: at the top of its box inside, above or below it, inside the picture
    and off what is to be kept free; None: nowhere."""
    x, y, right, low = box
    inside = [y + width] if right - x >= across and low - y >= 2 * down else []
    left = max(0.0, min(x, size[0] - across))
    for top in (*inside, y - down, low + 1):
        place = (left, top, left + across, top + down)
        overlaps = (place[0] <= c and a <= place[2] and place[1] <= d and b <= place[3] for a, b, c, d in kept_free)
        if top >= 0 and place[3] < size[1] and not any(overlaps):
            return place
    return None


def _tinted(pixels: np.ndarray, masks: Rles, colours: list[str]) -> np.ndarray:
    """uint8 [h, w, 3]: the pixels, each mask half of its colour, the last (of the lowest score) first."""
    pixels = pixels.copy()
    for one, colour in reversed(list(zip(masks.dictionaries(), colours, strict=True))):
        inside = coco_mask.decode(one) == 1
        pixels[inside] = pixels[inside] // 2 + np.array(ImageColor.getrgb(colour), np.uint8) // 2
    return pixels


@functools.lru_cache(maxsize=4096)
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font of this machine that has all letters of a text, else the one that lacks the fewest, which is said
    on stderr."""
    best, fewest = None, ""
    for font in _fonts(size):
        lacks = lacking(text, font)
        if not lacks:
            return font
        if best is None or len(lacks) < len(fewest):
            best, fewest = font, lacks
    print(
        f"no font here has the letters {fewest[:20]!r} of {text!r}, drawn as boxes: install one, such as Debian's "
        "fonts-unifont",
        file=sys.stderr,
    )
    return best


def lacking(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The letters of a text that a font has no picture of."""
    absent = _picture(font, _ABSENT)
    seen = (c for c in dict.fromkeys(text) if not c.isspace() and unicodedata.category(c)[0] not in "CM")
    return "".join(c for c in seen if _picture(font, c) == absent)


def _picture(font: ImageFont.FreeTypeFont, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    yield ImageFont.load_default(size)
    for path in _files():
        try:
            yield ImageFont.truetype(path, size)
        except OSError:  # bitmap fonts of other sizes, damaged files
            continue


@functools.cache
def _files() -> tuple[str, ...]:
    """The font files of this machine, those with most scripts first."""
    found = []
    for folder in _FOLDERS:
        for place, _, names in os.walk(Path(folder).expanduser()):
            found += [os.path.join(place, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def rank(path: str) -> tuple[int, str]:
        name = os.path.basename(path)
        return next((k for k, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST)), path

    return tuple(sorted(found, key=rank))
