"""COCO 2014's minival, Pascal VOC and Cityscapes as COCO files, on small sets written as their makers write them."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dataprep import cityscapes, coco_minival, voc
from detcore import UserError
from detcore.data.coco import CocoIndex


def opened(path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def png(path, values: np.ndarray, palette: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8 if palette else np.uint16))
    if palette:
        image.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    image.save(path)


class Voc:
    """VOC2012 with two images: 2008_000001 (a dog, a difficult cat), 2008_000002 (a person), and masks of the first."""

    xml = """<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>{height}</height>
        <depth>3</depth></size><segmented>1</segmented>{objects}</annotation>"""
    thing = """<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult><bndbox>
        <xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""

    def __init__(self, root):
        self.root = root / "VOCdevkit/VOC2012"
        for kind in ("Main", "Segmentation"):
            (self.root / "ImageSets" / kind).mkdir(parents=True)
        for part in ("Annotations", "JPEGImages"):
            (self.root / part).mkdir()
        (self.root / "ImageSets/Main/train.txt").write_text("2008_000001\n2008_000002\n")
        (self.root / "ImageSets/Main/val.txt").write_text("2008_000002\n")
        (self.root / "ImageSets/Main/test.txt").write_text("2008_000009\n")
        (self.root / "ImageSets/Segmentation/train.txt").write_text("2008_000001\n")
        two = self.thing.format("dog", 0, 2, 3, 6, 8) + self.thing.format("cat", 1, 1, 1, 20, 10)
        self.write("2008_000001", two)
        self.write("2008_000002", self.thing.format("person", 0, 5, 5, 5, 5))
        self.values = np.zeros((10, 20), np.uint8)
        self.values[2:8, 1:6], self.values[0], self.values[2, 1] = 1, 2, 255
        png(self.root / "SegmentationObject/2008_000001.png", self.values, palette=True)

    def write(self, name: str, objects: str, width: object = 20) -> None:
        text = self.xml.format(name=name, objects=objects, width=width, height=10)
        (self.root / f"Annotations/{name}.xml").write_text(text)


def test_vocs_boxes(tmp_path, capsys):
    made = Voc(tmp_path)
    assert voc.main([str(tmp_path)]) == 0
    assert "test2012.json: not written, for VOC has not published the objects of 2008_000009" in capsys.readouterr().out
    content = json.loads((made.root / "Annotations/pascal_train2012.json").read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]][:1] == [(1, "aeroplane")]
    assert len(content["categories"]) == 20
    assert content["images"][0] == {"id": 2008000001, "file_name": "2008_000001.jpg", "width": 20, "height": 10}
    found = [(a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in content["annotations"]]
    assert found == [
        (2008000001, 12, [1, 2, 5, 6], 30, 0), (2008000001, 8, [0, 0, 20, 10], 200, 1),
        (2008000002, 15, [4, 4, 1, 1], 1, 0),
    ]  # fmt: skip
    assert content["annotations"][0]["segmentation"] == [[1, 2, 6, 2, 6, 8, 1, 8]]
    coco = opened(made.root / "Annotations/pascal_train2012.json")
    rows, columns = np.nonzero(coco.annToMask(coco.loadAnns(1)[0]))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 7, 1, 5)
    val = json.loads((made.root / "Annotations/pascal_val2012.json").read_text())
    assert [image["id"] for image in val["images"]] == [2008000002]


def test_voc_with_names_that_are_no_numbers(tmp_path):
    made = Voc(tmp_path)
    for name in ("cat a1", "dog_7"):
        made.write(name.split()[-1], made.thing.format(name[:3], 0, 2, 3, 6, 8))
    (made.root / "ImageSets/Main/train.txt").write_text("a1\n\ndog_7\n")
    assert voc.main([str(tmp_path)]) == 0
    content = json.loads((made.root / "Annotations/pascal_train2012.json").read_text())
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [(1, "a1.jpg"), (2, "dog_7.jpg")]
    assert [a["image_id"] for a in content["annotations"]] == [1, 2]


def test_vocs_masks(tmp_path):
    made = Voc(tmp_path)
    assert voc.main([str(tmp_path), "--masks"]) == 0
    coco = opened(made.root / "Annotations/pascal_train2012.json")
    assert coco.getImgIds() == [2008000001]
    dog, cat = coco.loadAnns([1, 2])
    assert (coco.annToMask(dog) == (made.values == 1)).all() and (coco.annToMask(cat) == (made.values == 2)).all()
    assert (dog["area"], dog["bbox"], cat["iscrowd"], cat["category_id"]) == (29, [1, 2, 5, 6], 1, 8)
    Image.new("RGB", (20, 10)).save(made.root / "JPEGImages/2008_000001.jpg")
    assert len(CocoIndex.open(made.root / "Annotations/pascal_train2012.json", made.root / "JPEGImages")) == 1


def test_vocs_masks_and_boxes_have_one_name(tmp_path):
    made = Voc(tmp_path)
    written = made.root / "Annotations/pascal_train2012.json"
    assert voc.main([str(tmp_path), "--masks"]) == voc.main([str(tmp_path), "--masks"]) == 0
    before = written.read_bytes()
    with pytest.raises(
        UserError, match=r"pascal_train2012.json holds .* of ImageSets/Segmentation, not .* of ImageSets/Main"
    ):
        voc.main([str(tmp_path)])
    assert written.read_bytes() == before


def test_what_is_wrong_with_voc(tmp_path):
    made = Voc(tmp_path)
    made.write("2008_000002", Voc.thing.format("unicorn", 0, 1, 1, 2, 2))
    with pytest.raises(UserError, match=r"2008_000002.xml: object 1 is a 'unicorn', which is no class of VOC"):
        voc.main([str(tmp_path)])
    made.write("2008_000002", Voc.thing.format("dog", 0, 1, "", 2, 2))
    with pytest.raises(UserError, match=r"2008_000002.xml: a bndbox lacks a number"):
        voc.main([str(tmp_path)])
    made.write("2008_000002", "", width="wide")
    with pytest.raises(UserError, match=r"2008_000002.xml can't be read as VOC's XML"):
        voc.main([str(tmp_path)])
    made.write("2008_000001", "", width=21)
    with pytest.raises(UserError, match=r"2008_000001.png has 20 x 10 pixels, its XML says 21 x 10"):
        voc.main([str(tmp_path), "--masks"])
    Image.new("RGB", (21, 10)).save(made.root / "SegmentationObject/2008_000001.png")
    with pytest.raises(UserError, match=r"2008_000001.png is a picture of colours"):
        voc.main([str(tmp_path), "--masks"])
    with pytest.raises(UserError, match="holds neither VOC2007 nor VOC2012"):
        voc.main([str(made.root)])
    (made.root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe2008")
    with pytest.raises(UserError, match=r"Main/train.txt can't be read as VOC's list of images"):
        voc.main([str(tmp_path)])
    assert not (made.root / "Annotations/pascal_train2012.json").exists()


def test_cityscapes(tmp_path, capsys):
    values = np.full((12, 16), 7)
    values[:4, :5], values[:4, 5:9], values[6:, 2:4], values[6:, 8:], values[5] = 26000, 26001, 24005, 33, 21
    png(tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_instanceIds.png", values, palette=False)
    png(tmp_path / "gtFine/val/bonn/bonn_0_gtFine_instanceIds.png", np.full((3, 3), 7), palette=False)
    assert cityscapes.main([str(tmp_path), "--workers", "2"]) == 0
    coco = opened(tmp_path / "annotations/instancesonly_filtered_gtFine_train.json")
    assert [category["name"] for category in coco.loadCats(range(1, 9))] == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ]  # fmt: skip
    image = coco.loadImgs(1)[0]
    assert image["file_name"] == "train/ulm/ulm_000001_000019_leftImg8bit.png"
    assert (image["width"], image["height"]) == (16, 12)
    found = {(a["category_id"], a["iscrowd"]): a for a in coco.loadAnns(coco.getAnnIds())}
    assert len(coco.anns) == 4 and found.keys() == {(3, 0), (1, 0), (8, 1)}
    for (category, _), value in (((1, 0), 24005), ((8, 1), 33)):
        assert (coco.annToMask(found[category, int(value < 1000)]) == (values == value)).all()
    cars = [coco.annToMask(a) for a in coco.anns.values() if a["category_id"] == 3]
    assert (sum(cars) == ((values == 26000) | (values == 26001))).all() and all(car.any() for car in cars)
    assert (tmp_path / "images").readlink().name == "leftImg8bit"
    assert "val.json: 1 images, 0 objects" in capsys.readouterr().out
    assert cityscapes.main([str(tmp_path)]) == 0  # again, over what is there


def test_what_is_wrong_with_cityscapes(tmp_path):
    with pytest.raises(UserError, match=r"gtFine has none of train, val and test; unpack gtFine_trainvaltest.zip"):
        cityscapes.main([str(tmp_path)])
    (tmp_path / "gtFine/train/ulm").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no file \*_gtFine_instanceIds.png"):
        cityscapes.main([str(tmp_path)])
    (tmp_path / "gtFine/train/ulm/a_gtFine_instanceIds.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"a_gtFine_instanceIds.png can't be read as an image"):
        cityscapes.main([str(tmp_path)])
    assert not (tmp_path / "annotations").exists()


def coco_file(path, ids: list[int]) -> dict:
    box = {"category_id": 1, "bbox": [0, 0, 1, 1.5], "area": 1.5, "iscrowd": 0, "segmentation": [[0, 0, 1, 0, 1, 1.5]]}
    content = {
        "info": {"year": 2014},
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg", "width": 4, "height": 4} for i in ids],
        "annotations": [{**box, "id": 10 * i + k, "image_id": i} for i in ids for k in (0, 1)],
        "categories": [{"id": 1, "name": "person"}],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("by", ["val2017", "json", "list"])
def test_minival(tmp_path, by):
    whole = coco_file(tmp_path / "annotations/instances_val2014.json", [5, 3, 9, 7])
    more = []
    if by == "list":
        (tmp_path / "ids.txt").write_text("3\n7\n")
        more = ["--ids", str(tmp_path / "ids.txt")]
    else:
        name = "annotations/instances_val2017.json" if by == "val2017" else "mine.json"
        coco_file(tmp_path / name, [7, 3])
        more = [] if by == "val2017" else ["--ids", str(tmp_path / name)]
    assert coco_minival.main([str(tmp_path), *more]) == 0
    for part, ids in (("minival", [3, 7]), ("valminusminival", [5, 9])):
        found = json.loads((tmp_path / f"annotations/instances_{part}2014.json").read_text())
        assert found == whole | {
            "images": [image for image in whole["images"] if image["id"] in ids],
            "annotations": [one for one in whole["annotations"] if one["image_id"] in ids],
        }


def test_what_is_wrong_with_minival(tmp_path):
    with pytest.raises(UserError, match=r"instances_val2017.json can't be read.*download_coco2014.sh"):
        coco_minival.main([str(tmp_path)])
    coco_file(tmp_path / "annotations/instances_val2017.json", [1, 2, 3])
    (tmp_path / "annotations/instances_val2014.json").write_text('{"images": 1}')
    with pytest.raises(UserError, match=r"instances_val2014.json is no COCO file"):
        coco_minival.main([str(tmp_path)])
    coco_file(tmp_path / "annotations/instances_val2014.json", [3, 4])
    with pytest.raises(UserError, match=r"has no image 1, nor 1 others that were chosen"):
        coco_minival.main([str(tmp_path)])
    (tmp_path / "ids.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"ids.txt can't be read as a list of image ids"):
        coco_minival.main([str(tmp_path), "--ids", str(tmp_path / "ids.txt")])
    assert len([*(tmp_path / "annotations").iterdir()]) == 2
