"""The demo's scenes: the same everywhere, and annotations that say what was drawn."""

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tools import make_scenes


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_scenes.main(["--out", str(tmp_path / name), "--train", "4", "--val", "2", "--seed", str(seed)])
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 8
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert not any((tmp_path / "a" / f).read_bytes() == (tmp_path / "c" / f).read_bytes() for f in files)


def test_annotations_agree_with_themselves_and_the_images(tmp_path):
    make_scenes.main(["--out", str(tmp_path), "--train", "40", "--val", "1"])
    path = tmp_path / "annotations/instances_train.json"
    coco = COCO(str(path))
    sizes, classes, counts = set(), set(), []
    for image in coco.imgs.values():
        with Image.open(tmp_path / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.format == "JPEG"
        sizes.add(image["width"])
        counts.append(len(coco.getAnnIds(image["id"])))
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        image = coco.imgs[annotation["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] + 0.01 and y + h <= image["height"] + 0.01
        points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        assert [x, y] == points.min(0).tolist() and [x + w, y + h] == pytest.approx(points.max(0), abs=0.011)
        mask = coco.annToMask(annotation)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.15, abs=20)
        classes.add(annotation["category_id"])
    assert len(sizes) > 5 and classes == set(range(1, 7)) and max(counts) >= 4 and min(counts) <= 1


def test_fewer_and_larger_shapes_on_request(tmp_path):
    make_scenes.main(["--out", str(tmp_path), "--train", "20", "--val", "1", "--most", "2", "--radius", "30", "32"])
    coco = COCO(str(tmp_path / "annotations/instances_train.json"))
    assert max(len(coco.getAnnIds(image)) for image in coco.imgs) == 2
    sides = [max(annotation["bbox"][2:]) for annotation in coco.anns.values()]
    assert max(sides) <= 64 and sorted(sides)[len(sides) // 2] > 40
    for wrong in (["--most", "0"], ["--radius", "9", "8"], ["--radius", "1", "8"]):
        with pytest.raises(SystemExit):
            make_scenes.main(["--out", str(tmp_path), *wrong])


def test_shapes_that_others_hide_are_not_labelled():
    def square(shift: float):
        outline = np.array([(10.0, 10), (30, 10), (30, 30), (10, 30)]) + np.array([shift, 0])
        return make_scenes.Item(outline, make_scenes.fill(outline, 40, 40), 2)

    below, near, far = square(0), square(4), square(8)
    assert make_scenes.visible_shapes([below, near]) == [near]  # a fifth of the lower one is left to see
    assert len(make_scenes.visible_shapes([below, far])) == 2  # two fifths
