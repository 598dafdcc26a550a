"""Data sets by name, as the program opens them."""

import json
from types import SimpleNamespace

import pytest

from detcore import UserError
from detcore.detection.detector import class_count, open_data, open_index
from single_stage_detector.config import Config
from single_stage_detector.data import DETECTOR


def test_coco_by_name_with_its_own_sparse_ids(shared_data, tmp_path):
    config = Config(dataset="coco", dataset_path=shared_data / "coco_permissive", cache_dir=tmp_path)
    index = open_index(config, "train")
    assert class_count(DETECTOR, config) == index.num_classes == 80
    assert index.category_ids[0] == 1 and index.category_ids[-1] == 90 and len(index) == 26


def make(folder, ids) -> None:
    for split in ("train", "validation"):
        (folder / split / "labels").mkdir(parents=True)
        (folder / split / "data").mkdir()
        (folder / split / "data/a.jpg").touch()
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}],
            "annotations": [],
            "categories": [{"id": i, "name": f"class {i}"} for i in ids],
        }
        (folder / split / "labels/openimages-mlperf.json").write_text(json.dumps(content))


@pytest.mark.parametrize("first", [0, 1])
def test_openimages_ids_may_start_at_0_or_1(tmp_path, first):
    make(tmp_path, range(first, first + 264))
    index = open_index(Config(dataset_path=tmp_path), "val")
    assert index.num_classes == 264 and index.category_ids[0] == first


@pytest.mark.parametrize("ids", [range(2, 266), range(263), [*range(263), 300]])
def test_other_openimages_ids_are_refused(tmp_path, ids):
    make(tmp_path, ids)
    with pytest.raises(UserError, match="264"):
        open_index(Config(dataset_path=tmp_path), "train")


def test_coco_with_another_number_of_classes_is_refused(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017/a.jpg").touch()
    image = {"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="--dataset custom"):
        open_index(Config(dataset="coco", dataset_path=tmp_path), "train")


@pytest.mark.parametrize(("loader", "told"), [("torch", ""), ("nvjpeg", "; --loader nvjpeg is not used, ")])
def test_synthetic_data_says_that_a_loader_is_not_used(loader, told):
    context = SimpleNamespace(seed=1, world=SimpleNamespace(rank=0))
    data = open_data(DETECTOR, Config(synthetic=True, loader=loader), context)
    assert data.summary.partition("no evaluation")[2].startswith(told) and bool(told) == ("--loader" in data.summary)
