"""CocoIndex: every treatment it documents, and agreement with pycocotools."""

import contextlib
import io
import re

import numpy as np
import pytest
from pycocotools.coco import COCO

from detcore import UserError
from detcore.data import coco_json
from detcore.data.coco import CocoIndex


def refusal(coco, **more) -> str:
    with pytest.raises(UserError) as caught:
        coco.open(**more)
    assert str(coco.file) in str(caught.value) or str(coco.images) in str(caught.value)
    assert not list(coco.file.parent.glob(".*")), "a refused file must leave nothing behind"
    return str(caught.value)


def test_content(coco):
    index = coco.simple().open()
    assert len(index) == 2 and index.num_classes == 3
    assert index.image_ids.tolist() == [20, 10] and index.image_ids.dtype == np.int64
    assert index.heights.tolist() == [48, 40] and index.widths.tolist() == [64, 32]
    assert index.category_ids.tolist() == [3, 5, 9] and index.category_names == ["class 3", "class 5", "class 9"]
    assert index.path(0) == coco.images / "000020.jpg" and index.path(1) == coco.images / "000010.jpg"
    boxes, labels, crowd = index.boxes(0)
    assert boxes.dtype == np.float32 and labels.dtype == np.int64 and crowd.dtype == bool
    np.testing.assert_array_equal(boxes, np.array([[1.5, 2.25, 11.5, 22.25], [30, 20, 38, 28]], np.float32))
    assert labels.tolist() == [0, 2] and crowd.tolist() == [False, False]
    assert [len(part) for part in index.boxes(1)] == [0, 0, 0] and index.boxes(1)[0].shape == (0, 4)
    assert index.counts["images without annotations"] == 1
    assert "2 images, 2 annotations, 3 categories" in index.summary()
    assert len(index.content_hash) == 64


def test_agrees_with_pycocotools_also_when_annotations_are_shuffled(coco):
    coco.categories(*range(1, 8))
    rng = np.random.default_rng(1)
    for image_id in rng.permutation(12).tolist():
        coco.add_image(image_id, 50, 60)
    for _ in range(200):
        x, y, w, h = rng.uniform(1, 20, 4).tolist()
        coco.add_box(int(rng.integers(12)), int(rng.integers(1, 8)), (x, y, w, h), iscrowd=int(rng.random() < 0.2))
    coco.write()
    index = coco.open()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(coco.file)
    for i in range(12):
        expected = truth.imgToAnns[int(index.image_ids[i])]
        boxes, labels, crowd = index.boxes(i)
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in expected)]).reshape(-1, 4)
        np.testing.assert_array_equal(boxes, corners.astype(np.float32))
        assert index.category_ids[labels].tolist() == [a["category_id"] for a in expected]
        assert crowd.tolist() == [a["iscrowd"] == 1 for a in expected]
    got = index.ground_truth()
    annotations = coco.content["annotations"]
    for column, name in (("ann_image_id", "image_id"), ("ann_category_id", "category_id"), ("iscrowd", "iscrowd")):
        assert getattr(got, column).tolist() == [a[name] for a in annotations]
    assert got.bbox.tolist() == [a["bbox"] for a in annotations] and got.bbox.dtype == np.float64
    assert got.area.tolist() == [a["area"] for a in annotations] and got.iscrowd.dtype == np.uint8


def test_real_files(shared_data, tmp_path):
    for part in ("train", "val"):
        file = shared_data / "bccd" / "annotations" / f"instances_{part}.json"
        index = CocoIndex.open(file, shared_data / "bccd" / part, cache_dir=tmp_path)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(file)
        assert index.image_ids.tolist() == list(truth.imgs) and index.counts["missing images"] == 0
        assert index.counts["annotations"] == len(truth.anns) == len(index.ground_truth().bbox)
        assert index.category_names == [truth.cats[k]["name"] for k in sorted(truth.cats)]
        without_area = sum(a["bbox"][2] <= 0 or a["bbox"][3] <= 0 for a in truth.anns.values())
        kept = sum(len(index.boxes(i)[0]) for i in range(len(index)))
        assert kept == len(truth.anns) - index.counts["boxes dropped"] and index.counts["boxes dropped"] >= without_area


@pytest.mark.parametrize("first", [0, 1])
def test_contiguous_categories_are_accepted(coco, first):
    coco.categories(*reversed(range(first, first + 264)))
    coco.add_image(1, 16, 16, [(first + 263, 1, 1, 5, 5)])
    coco.write()
    index = coco.open(expected_classes=264)
    assert index.boxes(0)[1].tolist() == [263] and index.ground_truth().ann_category_id.tolist() == [first + 263]


@pytest.mark.parametrize("ids", [range(2, 266), range(263), range(1, 266), [*range(263), 400]])
def test_other_categories_are_refused(coco, ids):
    coco.categories(*ids)
    coco.add_image(1, 16, 16)
    coco.write()
    with pytest.raises(UserError, match="exactly 264, numbered 0 to 263 or 1 to 264"):
        coco.open(expected_classes=264)
    assert coco.open().num_classes == len(ids)


def test_boxes_outside_and_without_area(coco):
    coco.simple()
    cases = {
        (-5, -4, 20, 10): [0, 0, 15, 6],
        (60, 40, 100, 100): [60, 40, 64, 48],
        (0, 0, 64.005, 48): [0, 0, 64, 48],
        (5, 5, 0, 3): None,
        (5, 5, -3, 4): None,
        (5, 5, 4, 0): None,
        (70, 5, 4, 4): None,
        (5, -9, 4, 9): None,
    }
    for bbox in cases:
        coco.add_box(20, 5, bbox)
    coco.write()
    index = coco.open()
    expected = [[1.5, 2.25, 11.5, 22.25], [30, 20, 38, 28]] + [box for box in cases.values() if box]
    assert index.boxes(0)[0].tolist() == expected
    assert index.counts["boxes dropped"] == 5 and index.counts["boxes clipped"] == 2
    assert index.ground_truth().bbox[2:].tolist() == [list(map(float, bbox)) for bbox in cases]
    assert "boxes dropped 5" in index.summary()


@pytest.mark.filterwarnings("error")
def test_boxes_beyond_the_largest_number(coco):
    coco.simple()
    coco.add_box(20, 3, (1e308, 1e308, 1e308, 1e308), area=1.0)
    coco.add_box(20, 3, (-1e308, 5, 1.7e308, 8), area=1.0)
    coco.write()
    index = coco.open()
    assert index.counts["boxes dropped"] == 1
    np.testing.assert_array_equal(index.boxes(0)[0][2:], [[0, 5, 64, 13]])


def test_crowd_area_and_other_fields(coco):
    coco.simple()
    coco.add_box(10, 5, (1, 1, 4, 5), iscrowd=1)
    coco.add_box(10, 5, (1, 1, 4, 6), iscrowd=True, area=None, segmentation={"counts": "},{", "size": [1, 2]})
    bare = coco.add_box(10, 5, (1, 1, 4, 7))
    del bare["area"], bare["iscrowd"]
    coco.write()
    index = coco.open()
    assert index.boxes(1)[2].tolist() == [True, True, False]
    assert index.ground_truth().area.tolist()[2:] == [20, 24, 28]
    assert index.counts["crowd boxes"] == 2


def test_duplicates(coco):
    coco.simple()
    coco.content["images"].append(dict(coco.content["images"][0]))
    coco.content["images"].append(coco.content["images"][0] | {"id": 77})
    coco.add_box(10, 5, (1, 1, 4, 5), id=1)
    coco.write()
    index = coco.open()
    assert index.image_ids.tolist() == [20, 10, 77]
    counts = index.counts
    assert counts["duplicate images"] == 1
    assert counts["duplicate file names"] == 1 and counts["duplicate annotation ids"] == 1
    assert len(index.boxes(1)[0]) == 1


def test_images_missing_and_not_listed(coco):
    coco.simple()
    coco.add_image(30, 8, 8, name="x.png")
    coco.content["images"].pop()
    coco.content["images"].append({"id": 31, "file_name": "sub/gone.jpg", "height": 8, "width": 8})
    (coco.images / "notes.txt").write_text("no image")
    coco.write()
    for _ in range(2):  # built, then from the cache
        index = coco.open()
        assert index.counts["missing images"] == 1 and index.counts["unlisted files"] == 1
        with pytest.raises(UserError, match=r"1 of the 3 images .*sub/gone\.jpg"):
            index.check_images()
    (coco.images / "sub").mkdir()
    (coco.images / "sub" / "gone.jpg").write_bytes(b"x")
    index = coco.open()
    assert index.counts["missing images"] == 0
    index.check_images()


def test_wrong_folder(coco):
    coco.simple()
    with pytest.raises(UserError, match=r"none of the 2 images .*000020\.jpg"):
        CocoIndex.open(coco.file, coco.file.parent)
    with pytest.raises(UserError, match="not a directory"):
        CocoIndex.open(coco.file, coco.images / "nowhere")
    with pytest.raises(UserError, match="cannot read the annotation file"):
        CocoIndex.open(coco.file.with_name("other.json"), coco.images)


def change(name, entry, **fields):
    def apply(content):
        content[name][entry].update(fields)

    return apply


def drop(name, entry, field):
    def apply(content):
        del content[name][entry][field]

    return apply


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (change("annotations", 1, image_id=99), "annotation 2 is of image 99, which the file does not list"),
        (change("annotations", 1, category_id=4), "annotation 2 is of category 4"),
        (change("annotations", 1, image_id="20"), r"annotations\[1\]\.image_id: Expected `int`, got `str`"),
        (change("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\]\.bbox: .*length 4"),
        (change("annotations", 1, bbox=None), r"annotations\[1\]\.bbox"),
        (change("annotations", 0, bbox=[1, 2, 3, "4"]), r"annotations\[0\]\.bbox\[3\]: Expected `float`"),
        (change("annotations", 0, iscrowd=2), r"annotations\[0\]\.iscrowd"),
        (change("annotations", 0, bbox=[1, 2, float("nan"), 4]), r"not valid JSON at byte \d+.*NaN"),
        (change("annotations", 0, area=float("inf")), r"not valid JSON at byte \d+.*Infinity"),
        (drop("annotations", 1, "bbox"), r"annotations\[1\]: .*missing required field `bbox`"),
        (drop("images", 1, "height"), r"images\[1\]: .*missing required field `height`"),
        (change("images", 1, height=0), r"images\[1\]\.height"),
        (change("images", 1, file_name=""), r"images\[1\]\.file_name"),
        (change("images", 1, id=-1), r"images\[1\]\.id"),
        (change("images", 1, id=2**60), r"images\[1\]\.id"),
        (change("images", 1, id=20), r"image id 20 stands for 000020\.jpg \(64x48\) and for 000010\.jpg \(32x40\)"),
        (change("categories", 1, id=3), "category id 3 stands for 'class 3' and for 'class 5'"),
        (drop("categories", 1, "name"), r"categories\[1\]: .*`name`"),
        (lambda content: content.pop("images"), "missing required field `images`"),
        (lambda content: content.update(annotations={}), "annotations: Expected `array`, got `object`"),
        (lambda content: content.update(images=[]), "list of images is empty"),
        (lambda content: content.update(categories=[], annotations=[]), "list of categories is empty"),
    ],
)
def test_mistakes_are_named(coco, mistake, words):
    coco.simple()
    mistake(coco.content)
    coco.write()
    assert re.search(words, refusal(coco))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0 a picture", "not valid JSON at byte 0"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        ('{"images": []}'.encode("utf-16"), "UTF-16 text.*iconv -f UTF-16 -t UTF-8"),
        (b"[" * 100_000, "nested too deeply|ends in the middle|Expected `object`"),
        (b'{"a": ' * 100_000, "nested too deeply|ends in the middle"),
        (b'{"images": [24.', "ends in the middle, after 15 bytes"),
        (b"{'images': []}", "what Python prints of a dictionary.*json.dump"),
    ],
)
def test_files_that_are_no_annotations(coco, data, words):
    coco.file.write_bytes(data)
    assert re.search(words, refusal(coco))


def test_text_that_is_not_utf8(coco):
    coco.simple()
    coco.file.write_bytes(coco.file.read_bytes().replace(b"class 5", b"caf\xe9 55"))
    assert "categories" in refusal(coco) or "UTF-8" in refusal(coco)


def test_every_truncation_is_an_error(coco):
    coco.simple()
    data = coco.file.read_bytes()
    for cut in range(1, len(data) - 1, 7):
        coco.file.write_bytes(data[:cut])
        refusal(coco)


def test_random_corruption_ends_in_a_clear_error_or_a_valid_index(coco):
    coco.simple()
    data = coco.file.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        coco.file.write_bytes(damaged)
        try:
            coco.open()
        except UserError:
            refused += 1
    assert refused > 150


def test_decoding_in_pieces_gives_the_same(coco, monkeypatch):
    coco.categories(1)
    coco.add_image(1, 40, 40)
    for number in range(300):
        tricky = {"note": ["},{", {"a": 1}, {"b": '\\"}, {'}][number % 3], "parts": [{"x": 1}, {"y": [{}, {}]}]}
        coco.add_box(1, 1, (number * 0.1, 1, 3, 4 + number), **tricky)
    coco.write()
    whole = coco_json.parse(coco.file)
    for size in (1, 10, 150, 1000):
        monkeypatch.setattr(coco_json, "_PIECE", size)
        pieces = coco_json.parse(coco.file)
        assert pieces.counts == whole.counts and pieces.file_names == whole.file_names
        for name, column in whole.columns.items():
            np.testing.assert_array_equal(pieces.columns[name], column)
    coco.content["annotations"][250]["bbox"][1] = "1"
    coco.write()
    monkeypatch.setattr(coco_json, "_PIECE", 1000)
    with pytest.raises(UserError, match=r"annotations\[250\]\.bbox\[1\]"):
        coco_json.parse(coco.file)


def test_an_annotation_file_that_cannot_be_read(coco, monkeypatch):
    coco.simple()

    def refuse(file, masks):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(coco_json, "parse", refuse)
    assert "cannot read the annotation file (Permission denied)" in refusal(coco)
