"""Headers of JPEG files, against Pillow."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detcore.data import jpeg_header
from detcore.data.jpeg_header import BadHeader, read_header
from tools import make_openimages


def pillow(data: bytes) -> tuple:
    with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
        orientation = image.getexif().get(0x0112, 0)
        return *image.size, orientation if orientation in range(9) else 0, len(image.getbands()), len(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "a.jpg"


@pytest.mark.parametrize("seed", range(120))
def test_every_kind_of_header_as_pillow_reads_it(place, seed):
    data = make_openimages.jpeg(seed, 96)
    place.write_bytes(data)
    assert tuple(read_header(place)) == pillow(data)


def test_the_kinds_are_really_different(place):
    found = set()
    for seed in range(240):
        place.write_bytes(make_openimages.jpeg(seed, 16))
        header = read_header(place)
        found.add((header.components, header.orientation))
    assert {components for components, _ in found} == {1, 3, 4}
    assert {orientation for _, orientation in found} == set(range(9))


def test_real_images(shared_data):
    files = sorted(shared_data.rglob("*.jpg"))
    assert len(files) > 100
    for file in files:
        assert tuple(read_header(file)) == pillow(file.read_bytes()), file


@pytest.mark.parametrize("before", [b"\xff\xff\xff", b"\x00\x00", b"garbage", b"\xff\xd0\xff\x01"])
def test_what_decoders_skip_is_skipped(place, before):
    data = make_openimages.jpeg(1, 40)
    place.write_bytes(data[:2] + before + data[2:])
    assert read_header(place)[:2] == pillow(data)[:2]


def test_long_segments_are_jumped_over(place):
    out = io.BytesIO()
    exif = make_openimages.exif(6, ">", 60_000)
    Image.new("RGB", (21, 13)).save(out, "JPEG", icc_profile=bytes(1_000_000), exif=exif)
    place.write_bytes(out.getvalue())
    assert tuple(read_header(place)) == (21, 13, 6, 3, len(out.getvalue()))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", jpeg_header.EMPTY),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), jpeg_header.NOT_JPEG),
        (b"<html>404</html>", jpeg_header.NOT_JPEG),
        (b"\xff\xd8", jpeg_header.CUT_OFF),
        (b"\xff\xd8\xff\xd9", jpeg_header.NO_SIZE),
        (b"\xff\xd8\xff\xe0\x00\x01", jpeg_header.CUT_OFF),
        (b"\xff\xd8" + b"\xff" * 9000, jpeg_header.CUT_OFF),
    ],
)
def test_what_is_no_jpeg(place, data, kind):
    place.write_bytes(data)
    with pytest.raises(BadHeader, match=kind):
        read_header(place)


def test_a_pipe_is_no_file_and_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / "b.jpg")
    with pytest.raises(BadHeader, match=jpeg_header.NOT_JPEG):
        read_header(tmp_path / "b.jpg")
    with pytest.raises(IsADirectoryError):
        read_header(tmp_path)


def test_cut_off_at_every_byte_of_the_header(place):
    data = make_openimages.jpeg(4, 30)
    scan = data.index(b"\xff\xda")
    for length in range(scan):
        place.write_bytes(data[:length])
        with pytest.raises(BadHeader):
            read_header(place)
    place.write_bytes(data[: scan + 2])  # only the pixels are missing: a decoder's matter
    assert read_header(place)[:2] == pillow(data)[:2]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about EXIF, which is damaged here
@settings(max_examples=300)
@given(seed=st.integers(0, 60), damage=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_damaged_bytes_raise_nothing_else_and_agree_with_pillow(place, seed, damage, count):
    data = bytearray(make_openimages.jpeg(seed, 24))
    rng = np.random.default_rng(damage)
    for at in rng.integers(0, min(len(data), 700), count).tolist():
        data[at] = int(rng.integers(0, 256))
    place.write_bytes(data)
    try:
        ours = read_header(place)
    except BadHeader:
        return
    try:
        theirs = pillow(bytes(data))
    except Exception:  # Pillow refuses more: it reads the tables of the decoder, too
        return
    assert ours[:2] == theirs[:2]
