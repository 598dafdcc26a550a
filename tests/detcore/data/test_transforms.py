"""Decoding, mirroring and resizing against Pillow, numpy and float64 interpolation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detcore import UserError
from detcore.data import files, transforms
from detcore.data.recipes import stretched
from detcore.data.view import View

WIDTH, HEIGHT = 61, 47


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(data: bytes, height=HEIGHT, width=WIDTH) -> torch.Tensor:
    array = np.frombuffer(bytearray(data), np.uint8)
    return transforms.decode(array, path="some/picture.jpg", image_id=42, size=(height, width))


def refusal(data: bytes, **size) -> str:
    with pytest.raises(UserError) as caught:
        decode(data, **size)
    assert "some/picture.jpg" in str(caught.value) and "image 42" in str(caught.value)
    assert ".cpp" not in str(caught.value) and " object at 0x" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "form", "tolerance"),
    [
        ("RGB", "JPEG", 1),
        ("L", "JPEG", 1),
        ("CMYK", "JPEG", 1),
        ("RGB", "PNG", 0),
        ("L", "PNG", 0),
        ("LA", "PNG", 0),
        ("P", "PNG", 0),
        ("1", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "WEBP", 0),
        ("CMYK", "TIFF", 0),
    ],
)
def test_modes_decode_as_pillow_does(picture, mode, form, tolerance):
    data = encoded(picture.convert(mode), form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).astype(int)
    got = decode(data)
    assert got.dtype == torch.uint8 and got.shape == (3, HEIGHT, WIDTH)
    assert np.abs(got.numpy() - expected).max() <= tolerance
    assert expected.std() > 20


def test_progressive_jpeg(picture):
    plain, progressive = encoded(picture, "JPEG"), encoded(picture, "JPEG", progressive=True)
    assert torch.equal(decode(plain), decode(progressive))


def oriented(picture: Image.Image, orientation: int, form="JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(picture, form, exif=exif)


def turned(data: bytes, size=None, turn="auto") -> torch.Tensor:
    array = np.frombuffer(bytearray(data), np.uint8)
    assert transforms.is_turned(array, size=size, turn=turn) in (True, False)
    return transforms.decode(array, path="some/picture.jpg", image_id=42, size=size, turn=turn)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_listed_size_decides_whether_exif_turns(picture, orientation, form):
    """Pillow's exif_transpose is the truth of what an orientation means."""
    data = oriented(picture, orientation, form)
    stored = decode(encoded(picture, form))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    upright = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    for turn in ("auto", "apply", "ignore"):
        if orientation >= 5:  # the sides tell, whatever --exif says
            assert torch.equal(turned(data, (HEIGHT, WIDTH), turn), stored)
            assert torch.equal(turned(data, (WIDTH, HEIGHT), turn), upright)
        else:
            applied = turned(data, (HEIGHT, WIDTH), turn)
            assert torch.equal(applied, upright if turn == "apply" else stored)
        without = turned(data, None, turn)
        assert torch.equal(without, stored if turn == "ignore" else upright)
        assert without.permute(1, 2, 0).is_contiguous()


def test_a_square_is_turned_when_told(picture):
    data = oriented(picture.resize((40, 40)), 6)
    assert not torch.equal(turned(data, (40, 40), "apply"), turned(data, (40, 40)))
    assert torch.equal(turned(data, (40, 40), "apply"), turned(data, None))


def test_exchanged_sides_are_recognised(picture):
    data = encoded(picture, "JPEG")
    assert "width and height are exchanged there" in refusal(data, height=WIDTH, width=HEIGHT)
    other = refusal(data, height=HEIGHT, width=WIDTH + 1)
    assert "is 61x47 pixels, but the annotation file says 62x47; correct one of them" in other


def test_a_huge_header_is_explained_in_our_words(monkeypatch):
    """Pillow's own sentence speaks of a denial of service attack."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = (30000).to_bytes(4, "little") * 2
    words = refusal(bytes(data))
    assert "900,000,000 pixels; 178,956,970 are the most" in words and "bomb" not in words and "attack" not in words


def test_prediction_gets_advice_that_fits(tmp_path):
    data = np.frombuffer(b"<html>404</html>", np.uint8)
    with pytest.raises(UserError) as caught:
        transforms.decode(data, path="a.jpg", image_id=None)
    assert str(caught.value).startswith("a.jpg: it does not decode") and "leave it out" in str(caught.value)
    assert "annotation" not in str(caught.value) and "BytesIO" not in str(caught.value)
    (tmp_path / "b.jpg").touch()
    for path in (tmp_path / "b.jpg", tmp_path / "c.jpg"):
        with pytest.raises(UserError, match="leave it out") as caught:
            files.read_bytes(path, None)
        assert "None" not in str(caught.value)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
def test_every_truncation_is_an_error(picture, form, options):
    data = encoded(picture, form, **options)
    for cut in [*range(1, len(data), 29), len(data) - 1]:
        refusal(data[:cut])


def test_other_files_are_refused(picture):
    assert "does not decode" in refusal(b"<html>404 not found</html>")
    assert "does not decode" in refusal(bytes(1000))
    deep = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH))
    assert "more than 8 bits" in refusal(encoded(deep, "PNG"))
    frames = [picture.rotate(90 * k) for k in range(3)]
    assert "several frames" in refusal(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_programs_are_not_run_for_an_image():
    """Pillow hands Encapsulated PostScript to Ghostscript."""
    assert "does not decode" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 61 47\n%%EndComments\n")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [None, (HEIGHT, WIDTH)])
def test_a_jpeg_header_cannot_ask_for_gigabytes(picture, monkeypatch, progressive, size):
    monkeypatch.setattr(transforms, "decode_jpeg", lambda *_, **__: pytest.fail("decoded before the size was checked"))
    data = bytearray(encoded(picture, "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = (65500).to_bytes(2, "big") * 2
    with pytest.raises(UserError, match="65500x65500 pixels"):
        transforms.decode(np.frombuffer(data, np.uint8), path="x.jpg", image_id=1, size=size)


def test_every_changed_bit_of_a_png_is_an_error(picture):
    data = encoded(picture, "PNG")
    rng = np.random.default_rng(2)
    for at in [*range(60), *rng.integers(0, len(data), 400)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        refusal(bytes(damaged))


def test_random_corruption_is_an_error_or_an_image(picture):
    rng = np.random.default_rng(1)
    refused = 0
    for form in ("JPEG", "PNG"):
        data = encoded(picture, form)
        for _ in range(300):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), rng.integers(1, 10)):
                damaged[at] = rng.integers(256)
            try:
                assert decode(bytes(damaged)).shape == (3, HEIGHT, WIDTH)
            except UserError:
                refused += 1
    assert refused > 200


def test_read_bytes(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"abc")
    assert files.read_bytes(file, 1).tobytes() == b"abc"
    file.write_bytes(b"")
    for path, words in (
        (file, "a.jpg: the file of image 7 is empty"),
        (tmp_path / "none.jpg", "none.jpg: cannot read image 7 .No such file"),
        (tmp_path, "cannot read image 7"),
        (tmp_path / "a\0b", "cannot read image 7"),
    ):
        with pytest.raises(UserError, match=words):
            files.read_bytes(path, 7)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("target", [(30, 100), (HEIGHT, WIDTH), (94, 122), (13, 17)])
def test_resize_is_within_one_level_of_float64(picture, antialias, flip, target, cubic):
    """Bicubic weights, whose absolute sum passes 1, enlarge the rounding between the two directions a little."""
    image = decode(encoded(picture, "PNG"))
    got = transforms.resize(image, target, flip=flip, antialias=antialias, cubic=cubic)
    assert got.shape == (*target, 3) and got.dtype == torch.uint8 and got.is_contiguous()
    exact = image.double()[None]
    if flip:
        exact = torch.from_numpy(exact.numpy()[..., ::-1].copy())
    exact = torch.nn.functional.interpolate(
        exact, size=target, mode="bicubic" if cubic else "bilinear", align_corners=False, antialias=antialias
    ).clamp(0, 255)
    assert (got.permute(2, 0, 1) - exact[0]).abs().max() <= (1.25 if cubic else 1)
    assert (got.permute(2, 0, 1) - exact[0]).abs().mean() < 0.5


def test_antialias_makes_a_difference_when_shrinking(picture):
    image = decode(encoded(picture, "PNG"))
    plain, smooth = (transforms.resize(image, (10, 12), flip=False, antialias=a).int() for a in (False, True))
    assert (plain - smooth).abs().max() > 5


def view_of(size: tuple[int, int], target: tuple[int, int], flip: bool) -> View:
    return stretched(np.array([size]), target)._replace(mirrored=np.array([flip]))


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_follow_the_pixels(flip):
    """Paint each box into an image, take both through the same steps, and look where the paint is."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        height, width = rng.integers(40, 90, 2)
        x1, y1 = rng.integers(0, width - 12), rng.integers(0, height - 12)
        x2, y2 = rng.integers(x1 + 10, width), rng.integers(y1 + 10, height)
        image = torch.zeros(3, int(height), int(width), dtype=torch.uint8)
        image[:, y1:y2, x1:x2] = 255
        target = (int(height) * 4, int(width) * 3)
        painted = transforms.resize(image, target, flip=flip, antialias=False)[..., 0].numpy() > 127
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        boxes = np.array([[x1, y1, x2, y2]], np.float32)
        got = view_of((height, width), target, flip).boxes(0, boxes)
        assert got.dtype == np.float32
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(got[0], found, atol=1)


class TestIsPlainJpeg:
    def plain(self, data: bytes, height=HEIGHT, width=WIDTH) -> bool:
        return transforms.is_plain_jpeg(np.frombuffer(data, np.uint8), size=(height, width))

    @pytest.mark.parametrize("more", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
    def test_colour(self, picture, more):
        assert self.plain(encoded(picture, "JPEG", **more))

    def test_grey_cmyk_rgb_and_others_are_not(self, picture):
        assert not self.plain(encoded(picture.convert("L"), "JPEG"))
        assert not self.plain(encoded(picture.convert("CMYK"), "JPEG"))
        assert not self.plain(encoded(picture, "JPEG", keep_rgb=True))
        assert not self.plain(encoded(picture, "PNG"))
        assert not self.plain(b"") and not self.plain(b"\xff\xd8")

    def test_of_another_size(self, picture):
        assert not self.plain(encoded(picture, "JPEG"), width=HEIGHT, height=WIDTH)

    @pytest.mark.parametrize("kept", [0.1, 0.3, 0.6, 0.9, 0.999])
    def test_incomplete_even_with_a_whole_picture_in_its_exif(self, picture, kept):
        exif = b"Exif\x00\x00" + encoded(picture.resize((16, 12)), "JPEG")
        data = encoded(picture, "JPEG", exif=exif)
        assert self.plain(data) and b"\xff\xd9" in data[: len(data) // 2]
        assert not self.plain(data[: int(len(data) * kept)])
