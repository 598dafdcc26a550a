"""From an image file to pixels of a given size: decode, cut, flip, resize, all in uint8.

The order is that of the reference recipes: flip, then resize to exactly (height, width) without keeping the aspect
ratio. Normalisation comes later, on the device: a quarter of the bytes to move and of the work here.
EXIF orientation is applied where `detcore.data.exif` says so; a file whose pixels then do not have the size that the
annotation file gives is an error.

Damage that changes pixels but still decodes stays unseen where the format carries no checksum: JPEG (where libjpeg
notices, it prints a warning and goes on), BMP, GIF, TIFF, WebP. The checksums of PNG are verified.
"""

import io
import re
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from detcore import UserError
from detcore.data import exif, files

MOST_PIXELS = 178_956_970  # Pillow's own limit; a damaged header must not ask for gigabytes
_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow knows stranger ones, some of which run programs
_FRAME_HEADERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}


def decode(
    data: np.ndarray, *, path: Path, image_id: int | None, size: tuple[int, int] | None = None, turn: str = "auto"
) -> Tensor:
    """Decode an image file's bytes to uint8 RGB [3, height, width], memory laid out as height, width, 3.

    size: the (height, width) it must have; None takes any. image_id: its id in the annotation file; None where there is
    no such file, in prediction. turn: whether EXIF turns the pixels, see `detcore.data.exif.turns`.

    Grey, palette and CMYK images come out as RGB; transparency is ignored. Raises UserError, naming file and image,
    for files that do not decode whole (truncated ones too), have more than 8 bits a channel, several frames or more
    than MOST_PIXELS, or are not of that size. The size is read from the header before anything is decoded.
    """
    orientation = 0

    def check(height: int, width: int) -> None:
        turned = exif.turns(orientation, (height, width), size, turn)
        if size:
            found = (width, height) if turned and orientation >= 5 else (height, width)
            check_size(*found, path=path, image_id=image_id, size=size)
        if height * width > MOST_PIXELS:
            raise ValueError(f"its header asks for {width}x{height} pixels; {MOST_PIXELS:,} are the most")

    try:
        if data[:2].tobytes() == b"\xff\xd8":
            header = memoryview(data)
            orientation = exif.of_jpeg(header)
            check(*_jpeg_size(header))
            image = decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
        else:
            orientation = orientation_of(data)
            image = _decode_other(data, check)
        check(image.shape[1], image.shape[2])
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
        remedy = (
            "replace the file or leave it out"
            if image_id is None
            else "replace the file or remove it from the annotation file"
        )
        name = "it" if image_id is None else f"image {image_id}"
        raise UserError(f"{path}: {name} does not decode ({_reason(error)}); {remedy}.") from error
    return _upright(image, orientation) if exif.turns(orientation, tuple(image.shape[1:]), size, turn) else image


def _reason(error: Exception) -> str:
    """In words, why an image does not decode."""
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own sentence speaks of attacks
        pixels = re.search(r"\d+", str(error))
        asks = f"its header asks for {int(pixels[0]):,} pixels" if pixels else "its header asks for too many pixels"
        return f"{asks}; {MOST_PIXELS:,} are the most"
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify it as an image of a known format"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if ".cpp:" in reason:  # torchvision's own, which begin with the place in its source
        reason = reason.rsplit(".cpp:", 1)[-1].split(",", 1)[-1]
    return reason.partition(" <_io")[0].strip()


def orientation_of(data: np.ndarray) -> int:
    """The EXIF orientation of an image file's bytes, 2 to 8; 0 where there is none, or none that makes sense."""
    if data[:2].tobytes() == b"\xff\xd8":
        found: object = exif.of_jpeg(memoryview(data))
    else:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                found = image.getexif().get(0x112)
        except Exception:  # what is wrong with the file is said by `decode`
            return 0
    return found if found in range(2, 9) else 0


def is_turned(data: np.ndarray, *, size: tuple[int, int] | None, turn: str = "auto") -> bool:
    """Whether `decode` would turn an image file's pixels; False where its header cannot be read."""
    if not (orientation := orientation_of(data)):
        return False
    try:
        if data[:2].tobytes() == b"\xff\xd8":
            return exif.turns(orientation, _jpeg_size(memoryview(data)), size, turn)
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return exif.turns(orientation, (image.height, image.width), size, turn)
    except (ValueError, OSError):
        return False


def _upright(image: Tensor, orientation: int) -> Tensor:
    """uint8 [3, h, w], turned and mirrored as orientation 2 to 8 says; memory laid out as height, width, 3."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    mirrored = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}[orientation]
    return image.flip(mirrored).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def is_plain_jpeg(data: np.ndarray, *, size: tuple[int, int], turn: str = "auto") -> bool:
    """Whether a file is a JPEG that a GPU's decoder takes for the same picture as `decode`, of (height, width).

    Baseline or progressive, 8 bits, three components coded as YCbCr with a common subsampling, complete, and not to be
    turned.
    """
    if data[:2].tobytes() != b"\xff\xd8":
        return False
    try:
        at = _jpeg_frame(memoryview(data))
    except ValueError:
        return False
    frame, before = data[at : at + 19].tolist(), data[:at].tobytes()
    if len(frame) < 19 or frame[1] not in (0xC0, 0xC2) or frame[4] != 8 or frame[9] != 3:
        return False
    if frame[11] not in (0x11, 0x12, 0x21, 0x22, 0x41) or frame[14] != 0x11 or frame[17] != 0x11:
        return False
    adobe = before.find(b"\xff\xee\x00\x0eAdobe")
    if bytes(frame[10:19:3]) == b"RGB" or (adobe >= 0 and before[adobe + 15 : adobe + 16] != b"\x01"):
        return False
    found = (int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[7:9], "big"))
    if exif.turns(exif.of_jpeg(memoryview(data)), found, size, turn):
        return False
    return found == size and size[0] * size[1] <= MOST_PIXELS and data[at:].tobytes().rfind(b"\xff\xd9") >= 0


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """Height and width in the frame header of a JPEG file. ValueError if there is none."""
    at = _jpeg_frame(data)
    return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")


def _jpeg_frame(data: memoryview) -> int:
    """Where the frame header of a JPEG file begins, found as libjpeg finds it. ValueError if there is none."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # bytes between segments are skipped
            at += 1
        elif data[at + 1] in _FRAME_HEADERS:
            return at
        elif data[at + 1] in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("it ends before its image header")


def _check_png(data: memoryview) -> None:
    """ValueError unless the checksum of every chunk holds and the last one is there; Pillow skips the pixels' own."""
    at, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = bytes(data[at + 4 : at + 8]), at + 8 + length
        if end + 4 > len(data):
            raise ValueError("it is cut off")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"the checksum of its {kind.decode('latin-1')} chunk is wrong: it is damaged")
        at = end + 4


def _decode_other(data: np.ndarray, check: Callable[[int, int], None]) -> Tensor:
    """PNG and what else Pillow reads. torchvision's PNG decoder crashes the process on a damaged file."""
    if data[:8].tobytes() == b"\x89PNG\r\n\x1a\n":
        _check_png(memoryview(data))
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        check(image.height, image.width)
        if getattr(image, "n_frames", 1) != 1:
            raise ValueError("it has several frames; save one of them")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); save it with 8")
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_size(found_height: int, found_width: int, *, path: Path, image_id: int, size: tuple[int, int]) -> None:
    """UserError unless the decoded size is the annotation file's, (height, width)."""
    height, width = size
    if (found_height, found_width) == (height, width):
        return
    exchanged = (found_height, found_width) == (width, height)
    remedy = "width and height are exchanged there, correct them" if exchanged else "correct one of them"
    raise UserError(
        f"{path}: image {image_id} is {found_width}x{found_height} pixels, but the annotation file says "
        f"{width}x{height}; {remedy}."
    )


def resize(
    image: Tensor,
    image_size: Sequence[int],
    *,
    flip: bool,
    antialias: bool,
    window: tuple[int, int, int, int] | None = None,
    cubic: bool = False,
) -> Tensor:
    """uint8 [3, h, w] -> uint8 [H, W, 3]: mirrored left to right if asked, then scaled, pixel centres at .5.

    window: x1, y1, x2, y2 of the part to take, in pixels. cubic: bicubic instead of bilinear interpolation, Keys' with
    a = -0.5 as in Pillow where it is anti-aliased, else with -0.75 as elsewhere in PyTorch.
    """
    if window:
        x1, y1, x2, y2 = window
        image = image[:, y1:y2, x1:x2]
        if not flip:  # mirroring copies; the resize is slower on rows that do not follow each other
            image = image[None].contiguous(memory_format=torch.channels_last)[0]
    if flip:
        image = image.flip(-1)
    method = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    resized = functional.resize(image, list(image_size), method, antialias=antialias)
    return resized.permute(1, 2, 0).contiguous()


def read_image(uri: str | Path) -> Tensor:
    """An image as uint8 [3, h, w], from a path, or a URL (http, https, file). Raises UserError, naming it."""
    if urlparse(str(uri)).scheme not in ("http", "https", "file"):
        data = files.read_bytes(Path(uri), 0)
    else:
        try:
            with urllib.request.urlopen(str(uri), timeout=60) as answer:
                data = np.frombuffer(bytearray(answer.read()), np.uint8)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise UserError(f"{uri} can't be fetched: {error}") from error
    return decode(data, path=Path(str(uri)), image_id=0)
