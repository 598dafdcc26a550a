"""Damaged image files: refused by name, or the pixels are those that an independent reading of the same bytes gives.

JPEG, WebP, BMP, GIF and TIFF carry no checksum: damage that still decodes cannot be seen (`detcore.data.transforms`
says so). What must never happen is a crash, a hang, an image of another size, gigabytes for a kilobyte, or pixels that
are not what the file says. Decoders work in another process, as memory errors would end this one.
"""

import io
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 70, 50
FORMS = {
    "jpeg": {"format": "JPEG", "quality": 85},
    "jpeg progressive": {"format": "JPEG", "progressive": True},
    "jpeg 4:4:4": {"format": "JPEG", "subsampling": 0},
    "jpeg restarts": {"format": "JPEG", "restart_marker_rows": 1},
    "jpeg grey": {"format": "JPEG", "mode": "L"},
    "jpeg cmyk": {"format": "JPEG", "mode": "CMYK"},
    "png": {"format": "PNG"},
    "png palette": {"format": "PNG", "mode": "P"},
    "png alpha": {"format": "PNG", "mode": "RGBA"},
    "webp": {"format": "WEBP"},
    "bmp": {"format": "BMP"},
    "gif": {"format": "GIF", "mode": "P"},
    "tiff": {"format": "TIFF", "compression": "tiff_lzw"},
}


def encoded(form: str, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    options = dict(FORMS[form])
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    picture.convert(options.pop("mode", "RGB")).save(out, **options)
    return out.getvalue()


def damaged(whole: bytes, other: bytes, rng: random.Random) -> bytes:
    data, at, kind = bytearray(whole), rng.randrange(len(whole)), rng.randrange(9)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        n = rng.randint(1, 300)
        data[at : at + n] = bytes(len(data[at : at + n]))
    elif kind == 3:  # the headers, where sizes and tables stand
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 200))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    elif kind == 4:
        del data[at : at + rng.randint(1, 40)]
    elif kind == 5:
        data[at:at] = data[at : at + rng.randint(1, 60)]
    elif kind == 6:
        data[at:] = other[at:]
    elif kind == 7:  # the end of the file stays, so that it looks whole
        del data[at : max(at, len(data) - rng.randint(2, 30))]
    else:
        data = bytearray(rng.randbytes(len(data)))
        data[: rng.randrange(1, 40)] = whole[: rng.randrange(1, 40)]
    return bytes(data)


WORKER = """
import json, random, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_images import FORMS, check_one, encoded, {cases}
accepted, seen = {{}}, 0
for form in FORMS:
    check_one(encoded(form))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 29), now + (1 << 29)))
for form in FORMS:
    accepted[form] = 0
    for case, data in enumerate({cases}(form)):
        print(form, case, file=sys.stderr)
        signal.alarm(20)  # a hang ends the process
        accepted[form] += check_one(data)
        seen += 1
print(json.dumps([seen, accepted]))
"""


def randomly(form: str):
    rng, whole, other = random.Random(form), encoded(form), encoded(form, 1)
    for _ in range(250):
        yield damaged(whole, other, rng)


def header_bytes(form: str):
    """Two and four bytes at a time, over the whole header: every size that it can claim."""
    whole = encoded(form)
    for at in range(min(len(whole), 700) - 4):
        yield whole[:at] + b"\xff\xdc\xff\xdc" + whole[at + 4 :]
        yield whole[:at] + b"\0\0" + whole[at + 2 :]


def check_one(data: bytes) -> bool:
    """Whether the program takes the file; asserts that its answer is right."""
    from detcore import UserError
    from detcore.data import transforms

    if not data:
        return False  # `read_bytes` refuses an empty file
    try:
        image = transforms.decode(
            np.frombuffer(bytearray(data), np.uint8), path=Path("some/x.jpg"), image_id=7, size=(HEIGHT, WIDTH)
        )
    except UserError as error:
        words = str(error)
        assert "memory" not in words.lower(), "a damaged header is found out before memory is asked for"
        assert "some/x.jpg: image 7 " in words and "\n" not in words and "Traceback" not in words and len(words) < 500
        return False
    assert tuple(image.shape) == (3, HEIGHT, WIDTH) and str(image.dtype) == "torch.uint8"
    if data.startswith(b"\xff\xd8") and data[2] != 0xFF:  # libjpeg skips bytes between segments; Pillow not these
        data = data[:2] + data[data.index(b"\xff", 2) :]
    truth = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - truth).max() <= 3, "other pixels than Pillow reads"
    if data.startswith(b"\x89PNG"):  # a PNG has checksums: only an undamaged one may pass
        assert any(np.array_equal(truth, picture) for picture in undamaged()), "damaged pixels of a PNG"
    return True


@cache
def undamaged() -> list[np.ndarray]:
    """uint8 RGB of all that tests damage."""
    return [np.array(Image.open(io.BytesIO(encoded(f, s))).convert("RGB")) for f in FORMS for s in (0, 1)]


@pytest.mark.parametrize("cases", [randomly, header_bytes])
def test_damaged_files(cases):
    """Never a crash, a hang, half a gigabyte, another size, or other pixels than the bytes say."""
    program = [sys.executable, "-W", "ignore", "-c", WORKER.format(cases=cases.__name__), Path(__file__).parent]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=300)
    assert result.returncode == 0, f"ended with {result.returncode}\n{result.stderr[-3000:]}"
    seen, accepted = json.loads(result.stdout.splitlines()[-1])
    assert seen > 3000 and len(accepted) == len(FORMS)
    assert 50 < sum(accepted.values()) < seen * 0.8


def test_swapped_files():
    """Another picture's bytes: found out by its size, and only by that."""
    for form in FORMS:
        assert check_one(encoded(form, seed=1)), "the same size: nothing tells the two apart"
        assert not check_one(encoded(form, width=HEIGHT, height=WIDTH))
        assert not check_one(encoded(form, width=WIDTH + 1))


@pytest.mark.parametrize(
    "content",
    [
        b"<html>404 not found</html>", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 5000, bytes(1000),
        b"\xff\xd8" + bytes(99999), b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, b"GIF89a", b"BM",
        b"II*\0", b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4\n", b"P6 99999 99999 255\n",
        b"{}", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"version https://git-lfs.github.com/spec/v1\n",
        b"\x00\x00\x00\x1cftypavif",
    ],
)  # fmt: skip
def test_files_that_are_no_images(content):
    assert not check_one(content)
