"""Annotation files as users' tools write them: each is read, or refused with its likely cause."""

import gzip
import json
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dataprep import shard_writer
from detcore import UserError
from detcore.data import classes, exif, image_names, signs
from detcore.data.coco import CocoIndex


def refusal(coco, **more) -> str:
    with pytest.raises(UserError) as caught:
        coco.open(**more)
    return str(caught.value)


def renamed(coco, listed: str, there: str):
    """One image, in the folder under one name and in the file under another."""
    coco.categories(1)
    (coco.images / there).parent.mkdir(parents=True, exist_ok=True)
    coco.add_image(1, 40, 30, [(1, 2, 2, 20, 20)], name=there)
    coco.content["images"][0]["file_name"] = listed
    coco.write()
    return coco


ACCENT = "café.jpg"


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        (r"images\001.jpg", "images/001.jpg"),
        (r".\images\001.jpg", "images/001.jpg"),
        ("my%20picture.jpg", "my picture.jpg"),
        (r"a%20b\c%23.jpg", "a b/c#.jpg"),
        ("001.JPG", "001.jpg"),
        ("Images/001.jpg", "images/001.JPG"),
        (unicodedata.normalize("NFC", ACCENT), unicodedata.normalize("NFD", ACCENT)),
        (unicodedata.normalize("NFD", ACCENT), unicodedata.normalize("NFC", ACCENT)),
    ],
)
def test_another_spelling_of_a_name_is_found(coco, tmp_path, listed, there):
    index = renamed(coco, listed, there).open()
    assert index.file_name(0) == there and len(index.read(0)) and index.counts["names of another spelling"] == 1
    assert index.counts["unlisted files"] == 0 and "names of another spelling 1" in index.summary()
    index.check_images()
    shard_writer.pack(index, tmp_path / "shards", threads=1)
    packed = CocoIndex.open(coco.file, tmp_path / "shards")
    packed.check_images()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).read(0), index.read(0))


def test_a_file_that_comes_later_in_another_spelling_is_found(coco):
    coco.simple()
    coco.content["images"][1]["file_name"] = "NEW.JPG"
    coco.write()
    assert coco.open().missing.tolist() == [1]
    (coco.images / "000010.jpg").rename(coco.images / "new.jpg")
    index = pickle.loads(pickle.dumps(coco.open()))
    assert index.file_name(1) == "new.jpg" and len(index.read(1))


def test_a_spelling_that_two_files_or_two_entries_share_is_not_guessed(coco):
    coco.categories(1)
    for number, name in enumerate(("a.jpg", "b.JPG", "B.jpg"), 1):
        coco.add_image(number, 40, 30, name=name)
    coco.content["images"][1:] = [
        {"id": k, "file_name": name, "height": 30, "width": 40} for k, name in ((2, "A.jpg"), (3, "b.jpg"))
    ]
    coco.write()
    index = coco.open()
    assert index.missing.tolist() == [1, 2] and index.counts["names of another spelling"] == 0
    with pytest.raises(UserError, match=r"There is a\.jpg: if that is meant by A\.jpg"):
        index.check_images()


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("train/001.jpg", "001.jpg"),
        ("001.jpeg", "001.jpg"),
        ("http://host/x/001.jpg", "001.jpg"),
        ("0001.jpg", "001.jpg"),
    ],
)
def test_a_similar_file_is_named(coco, listed, there):
    assert f"There is {there}: if that is meant by {listed}" in refusal(renamed(coco, listed, there))


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", r"..\x.jpg", r"C:\x.jpg", r"\x.jpg"])
def test_names_that_lead_out_of_the_folder_never_get_into_shards(coco, tmp_path, name):
    assert image_names.leaves_folder(name)
    coco.simple()
    coco.content["images"][0]["file_name"] = name
    coco.write()
    if not name.startswith("/etc"):
        (coco.images / "a").mkdir()
        Image.new("RGB", (64, 48)).save(coco.images / name, "JPEG")
    index = coco.open()
    index.missing = np.empty(0, np.int64)  # as where the file is there
    with pytest.raises(UserError, match="leads out of"):
        shard_writer.pack(index, tmp_path / "shards", threads=1)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["a..b.jpg", "c/..d.jpg", "x:y.jpg/z.jpg"])
def test_names_that_stay_inside_are_packed(name):
    assert not image_names.leaves_folder(name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16 text"),
        (lambda text: text.encode("utf-16-le"), "UTF-16 or UTF-32"),
        (lambda text: text.encode("utf-32"), "UTF-32 text"),
        (lambda text: text.encode("latin-1"), "iconv -f WINDOWS-1252"),
        (lambda text: gzip.compress(text.encode()), "gunzip"),
        (lambda text: b"PK\3\4" + text.encode(), "unzip"),
        (lambda text: repr(json.loads(text)).encode(), "json.dump"),
        (lambda text: b"<!DOCTYPE html><html>404", "HTML or XML"),
        (lambda text: b'<?xml version="1.0"?><annotation/>', "HTML or XML"),
        (lambda text: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (lambda text: b'{"a": 1}\n{"a": 2}\n', "JSON Lines"),
    ],
)
def test_what_a_file_is_instead_is_said(coco, make, words):
    coco.simple().content["categories"][0]["name"] = "café"
    coco.file.write_bytes(make(json.dumps(coco.content, ensure_ascii=False)))
    said = refusal(coco)
    assert words in said and str(coco.file) in said


def test_a_byte_order_mark_is_read(coco):
    plain = coco.simple().open()
    coco.file.write_bytes(b"\xef\xbb\xbf" + coco.file.read_bytes())
    index = coco.open()
    assert index.image_ids.tolist() == plain.image_ids.tolist() and len(index.boxes(0)[0]) == 2


def test_a_category_listed_twice(coco):
    coco.simple()
    coco.content["categories"] += [{"id": 3, "name": "class 3"}, {"id": 11, "name": "class 5"}]
    coco.write()
    index = coco.open()
    assert index.category_ids.tolist() == [3, 5, 9, 11] and index.num_classes == 4
    assert "duplicate categories 1" in index.summary() and "categories that share a name 1" in index.summary()


def boxes(coco, change, images: int = 4, size: tuple[int, int] = (96, 64), **more):
    """Images with two boxes each, which `change` writes in another way from x, y, w, h."""
    coco.categories(1)
    rng = np.random.default_rng(0)
    for image in range(1, images + 1):
        coco.add_image(image, *size)
        for _ in range(2):
            x, y = (int(rng.integers(5, side // 2)) for side in size)
            w, h = (int(rng.integers(20, side // 2 - 2)) for side in size)
            coco.add_box(image, 1, change(x, y, w, h), **{"area": w * h, **more})
    coco.write()
    return coco.open()


def test_ordinary_boxes_raise_no_suspicion(coco, thirteen):
    for index in (boxes(coco, lambda *box: box), thirteen.open()):
        assert signs.suspicions(index.signs) == [] and "Warning" not in index.summary()
        signs.check_training([("x", index.signs)], "drop")


def test_boxes_as_fractions_are_refused_for_training(coco):
    index = boxes(coco, lambda x, y, w, h: (x / 96, y / 64, w / 96, h / 64))
    assert "fractions of the image" in index.summary() and index.counts["boxes under one pixel"] == 8
    with pytest.raises(UserError, match=r"t\.json: 8 of 8 boxes lie between 0 and 1.*multiply"):
        signs.check_training([("t.json", index.signs)], "keep")


def test_boxes_as_percent_raise_suspicion(coco):
    to_percent = lambda x, y, w, h: (x / 4, y / 3, w / 4, h / 3)  # noqa: E731
    assert "percent of the image" in boxes(coco, to_percent, 12, (400, 300)).summary()


@pytest.mark.parametrize("area", [{}, {"area": None}])
def test_boxes_as_corners_raise_suspicion(coco, area):
    index = boxes(coco, lambda x, y, w, h: (x, y, x + w, y + h), 12, **area)
    assert "they seem to be corners (Pascal VOC)" in index.summary()


def test_a_few_pixels_too_many_raise_no_suspicion(coco):
    index = boxes(coco, lambda x, y, w, h: (96 - w, 64 - h, w + 3, h + 3), 6)
    assert index.counts["boxes clipped"] == 12 and "Warning" not in index.summary()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "2 of 2 boxes are marked iscrowd"),
        (lambda c: c["annotations"].clear(), "there are no annotations"),
        (
            lambda c: [a.update(bbox=[500, 500, 5, 5]) for a in c["annotations"]],
            "none of the 2 boxes has an area within",
        ),
    ],
)
def test_a_file_that_teaches_nothing_is_refused_for_training(coco, change, words):
    change(coco.simple().content)
    coco.write()
    told = [("t.json", coco.open().signs)]
    with pytest.raises(UserError, match=f"nothing would be learnt; {words}"):
        signs.check_training(told, "drop")
    if "iscrowd" in words:
        signs.check_training(told, "keep")


def test_crowd_boxes_that_are_left_out_are_counted(coco):
    coco.simple().content["annotations"][0]["iscrowd"] = 1
    coco.write()
    assert "left out as crowd 1" in coco.open().summary("drop") and "left out" not in coco.open().summary("keep")


def test_areas_below_0_are_counted_and_not_scored(coco):
    for box, area in zip(coco.simple().content["annotations"], (-200, 64), strict=True):
        box["area"] = area
    coco.write()
    index = coco.open()
    assert index.counts["areas below 0"] == 1 and index.signs["scored"] == 1 and index.signs["trained"] == 2


def test_exif_is_surveyed(coco):
    """Upright sizes, stored sizes, a half turn, a square, none, and a file that is no JPEG."""
    coco.categories(1)
    upright, stored, square = (30, 40), (40, 30), (32, 32)
    for number, (size, orientation, listed) in enumerate(
        [(stored, 6, upright), (stored, 8, stored), (stored, 3, stored), (square, 6, square), (stored, 1, stored)]
    ):
        tags = Image.Exif()
        tags[0x112] = orientation
        coco.add_image(number, *size, exif=tags)
        coco.content["images"][-1] |= dict(zip(("width", "height"), listed, strict=True))
    coco.add_image(9, 40, 30, name="nine.png")
    coco.write()
    index = coco.open()
    assert index.exif == {"looked at": 5, "turned": 1, "stored": 1, "undecided": 2}
    assert "1 turned upright" in index.summary() and "2 of which the size does not tell (--exif" in index.summary()
    assert exif.words({"looked at": 5, "turned": 0, "stored": 0, "undecided": 0}, 5) == []


def test_categories_are_compared_by_id_and_name():
    one, two = [(1, "red"), (2, "blue")], [(1, "blue"), (2, "red"), (3, "green")]
    assert classes.differing_files(one, one, "a", "b") == []
    assert classes.differing_files(one, two, "a", "b") == [
        "id 1 is 'red' in a and 'blue' in b", "id 2 is 'blue' in a and 'red' in b", "id 3 ('green') is only in b",
    ]  # fmt: skip
    assert classes.differing_classes(one, [(0, "red"), (1, "blue")]) == [], "the same classes, counted from 0"
    assert classes.differing_classes([], one) == []
    assert classes.differing_classes(one, [(1, "blue"), (2, "red")])[0] == "'red' (id 1) is 'blue' (id 1) there"
    assert classes.differing_classes(two, two[:2]) == ["'green' (id 3) is not there"]
    assert classes.differing_classes([(4, "a (4)"), (7, "a (7)")], [(1, "a (1)"), (2, "a (2)")]) == []
    assert classes.some(list("abcdef"), 2) == "a; b; and 4 more"
