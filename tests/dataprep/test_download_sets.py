"""Which images of OpenImages are wanted; what is known of published files; the way through fiftyone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataprep.download_sets import BACKBONES, METADATA, WEIGHTS, class_mids, coco_archives, image_ids, weights_item
from detcore import UserError

FIFTYONE = Path(__file__).resolve().parents[2] / "public-scripts" / "openimages_with_fiftyone.py"
HEADER = "ImageID,Source,LabelName,Confidence"
A, B, C = "000002b66c9c498e", "ffff0000ffff0000", "0123456789abcdef"


def write(path: Path, text: str, **options) -> Path:
    path.write_bytes(text.encode(**options))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_image_ids(tmp_path, end, encoding):
    rows = [f"{B},x,/m/1,1", f"{A.upper()},x,/m/2,1", f"{C},x,/m/3,1", f"{B},x,/m/2,1", f"{A},x,/m/1,1"]
    boxes = write(tmp_path / "boxes.csv", end.join([HEADER, *rows, "", ""]), encoding=encoding)
    assert image_ids(boxes, {"/m/1", "/m/2"}) == [A, B]
    assert image_ids(boxes, None) == [A, C, B]
    assert image_ids(boxes, {"/m/4"}) == []


def test_columns_may_stand_elsewhere(tmp_path):
    assert image_ids(write(tmp_path / "b.csv", f'LabelName,"ImageID"\n"/m/1",{A}\n'), {"/m/1"}) == [A]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageID,Label\n", "no columns ImageID and LabelName"),
        ("", "no columns ImageID and LabelName"),
        (f"{HEADER}\n{A},x,/m/1,1\n{A}\n", r"boxes\.csv, line 3: too few fields"),
    ],
)
def test_broken_boxes(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        image_ids(write(tmp_path / "boxes.csv", text), {"/m/1"})


def test_ids_that_are_none_are_left_out(tmp_path):
    names = ["../../etc/passwd", "0x01234567890123", "0123_4567890_123", "", A, f"{A}0"]
    boxes = write(tmp_path / "boxes.csv", "\n".join([HEADER, *(f"{name},x,/m/1,1" for name in names)]))
    assert image_ids(boxes, None) == [A]


def test_classes_by_name_and_mid(tmp_path):
    file = write(tmp_path / "c.csv", '/m/1,Zebra\n/m/2,"Kitchen, dining"\n/m/3,Egg (Food)\n', encoding="utf-8-sig")
    assert class_mids(file, ["Zebra", "/m/3", "Kitchen, dining"]) == {"/m/1", "/m/2", "/m/3"}
    with pytest.raises(UserError, match="knows no class 'Zebras', 'zebra'"):
        class_mids(file, ["Zebra", "Zebras", "zebra"])


def test_the_published_numbers():
    assert {len({name for name, _, _ in files}) for files in METADATA.values()} == {4}
    for year, count in ((2014, 82_783 + 40_504), (2017, 118_287 + 5_000)):
        archives = coco_archives(year)
        assert sum(a.files for a in archives if isinstance(a.files, int)) == count
        assert all(len(a.md5) == 32 and str(year) in a.path for a in archives)


def test_weights_carry_their_hash(tmp_path):
    for name, file in WEIGHTS.items():
        item = weights_item(name, "https://x", tmp_path)
        assert item.path == tmp_path / file and f"-{item.hashes[0][1]}.pth" in file
    assert [kind for kind, _ in weights_item("resnext50_32x4d", "https://x", tmp_path).hashes] == ["sha256", "sha512"]


def test_weights_of_detectrons_catalog_have_their_published_addresses(tmp_path):
    item = weights_item("catalog://Caffe2Detectron/COCO/35858933/e2e_mask_rcnn_R-50-FPN_1x", BACKBONES, tmp_path)
    assert item.url == (
        "https://dl.fbaipublicfiles.com/detectron/35858933/12_2017_baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml."
        "01_48_14.DzEQe4wC/output/train/coco_2014_train%3Acoco_2014_valminusminival/generalized_rcnn/model_final.pkl"
    )
    assert item.path == tmp_path / "e2e_mask_rcnn_R-50-FPN_1x_35858933.pkl"
    item = weights_item("MSRA/R-50", BACKBONES, tmp_path)
    assert item.url == "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
    assert item.hashes == (("md5", "b19105fdd7baafb40480251377de18f2"),)


STAND_IN = """
import json, os, sys
__version__ = "0"
class types:
    COCODetectionDataset = "coco"
class View:
    def export(self, labels_path, **words):
        calls = [["export", labels_path, words]]
        json.dump({"annotations": [{"id": 1, "IsGroupOf": True}, {"id": 2, "IsGroupOf": 0}]}, open(labels_path, "w"))
        print(json.dumps(calls))
class Dataset:
    def has_sample_field(self, name):
        return name == "ground_truth"
    def match_tags(self, split):
        return View()
"""
ZOO = """
import json, os
from fiftyone import Dataset
def load_zoo_dataset(name_or_url, **words):
    print(json.dumps(["load", name_or_url, words, os.environ["FIFTYONE_DATASET_ZOO_DIR"]]))
    return Dataset()
"""


def test_fiftyone_is_called_as_the_original_calls_it(tmp_path):
    package = tmp_path / "path" / "fiftyone"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "zoo.py").write_text(ZOO)
    folder = tmp_path / "set"
    (folder / "train" / "labels").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "FIFTYONE_DATASET_ZOO_DIR"}
    environment["PYTHONPATH"] = str(package.parent)
    words = ["--dataset-dir", str(folder), "--splits", "train", "--classes", "Zebra", "Egg (Food)"]
    done = subprocess.run([sys.executable, FIFTYONE, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load, export = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert load == ["load", "open-images-v6", {
        "classes": ["Zebra", "Egg (Food)"], "splits": ["train"], "label_types": "detections",
        "dataset_name": "open-images", "dataset_dir": str(folder),
    }, str(tmp_path)]  # fmt: skip
    assert export[0][2] == {"dataset_type": "coco", "label_field": "ground_truth", "classes": ["Zebra", "Egg (Food)"]}
    assert {path.name for path in (folder / "train" / "labels").iterdir()} == {"openimages-mlperf.json"}
    labels = json.loads((folder / "train" / "labels" / "openimages-mlperf.json").read_text())
    assert [a["iscrowd"] for a in labels["annotations"]] == [1, 0]


def test_without_fiftyone_it_says_so(tmp_path):
    (tmp_path / "fiftyone.py").write_text("raise ImportError('none here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, FIFTYONE, "--dataset-dir", tmp_path]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "none here" in done.stderr and "pip install fiftyone==" in done.stderr


def test_without_mongodb_it_says_so(tmp_path):
    (tmp_path / "fiftyone").mkdir()
    (tmp_path / "fiftyone" / "__init__.py").write_text("__version__ = '0'")
    (tmp_path / "fiftyone" / "zoo.py").write_text(
        "def load_zoo_dataset(name_or_url, **words):\n    raise OSError('MongoDB could not be installed here')"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, FIFTYONE, "--dataset-dir", tmp_path / "set"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "FIFTYONE_DATABASE_URI" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("fiftyone"), reason="fiftyone is not installed (extra openimages)")
def test_the_real_fiftyone_has_what_is_called():
    program = """
import inspect, fiftyone, fiftyone.zoo
names = set(inspect.signature(fiftyone.zoo.load_zoo_dataset).parameters)
assert {"splits", "dataset_name", "kwargs"} <= names, names
assert {"labels_path", "dataset_type", "label_field"} <= set(inspect.signature(fiftyone.Dataset.export).parameters)
assert fiftyone.types.COCODetectionDataset and fiftyone.Dataset.match_tags and fiftyone.Dataset.has_sample_field
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
