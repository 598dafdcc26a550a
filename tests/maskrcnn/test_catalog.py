"""Names of data sets, as the original has them, and where they are."""

import json

import pytest

from detcore import UserError
from detcore.config import load
from detcore.data.layouts import LAYOUTS
from maskrcnn.catalog import PLACES, find
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.flags import translate_flags

KNOWN = {  # name: annotation file, image folder
    "coco_2014_train": ("annotations/instances_train2014.json", "train2014"),
    "coco_2014_val": ("annotations/instances_val2014.json", "val2014"),
    "coco_2014_minival": ("annotations/instances_minival2014.json", "val2014"),
    "coco_2014_valminusminival": ("annotations/instances_valminusminival2014.json", "val2014"),
    "coco_2017_train": ("annotations/instances_train2017.json", "train2017"),
    "coco_2017_val": ("annotations/instances_val2017.json", "val2017"),
    "voc_2007_train": ("VOC2007/Annotations/pascal_train2007.json", "VOC2007/JPEGImages"),
    "voc_2007_test": ("VOC2007/Annotations/pascal_test2007.json", "VOC2007/JPEGImages"),
    "voc_2012_val_cocostyle": ("VOC2012/Annotations/pascal_val2012.json", "VOC2012/JPEGImages"),
    "cityscapes_fine_instanceonly_seg_train_cocostyle": (
        "annotations/instancesonly_filtered_gtFine_train.json", "images",
    ),
}  # fmt: skip


def place(root, file: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))


def config(*words: object) -> Config:
    return load(Config, translate_flags([str(word) for word in words]), {}, IGNORED_FLAGS)[0]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("inside", ["", "data", "own"])
def test_a_name_of_the_original(tmp_path, name, inside):
    """Below the folder itself, below its data/, and below the folder that the original's own catalog has there."""
    root = tmp_path / (name.partition("_")[0] if inside == "own" else inside)
    place(root, KNOWN[name][0])
    assert find(name, tmp_path) == (root / KNOWN[name][0], root / KNOWN[name][1])


def test_the_original_has_these_names():
    parts = ("train", "val", "test")
    voc = {f"voc_{year}_{part}{end}" for year in (2007, 2012) for part in parts for end in ("", "_cocostyle")}
    cities = {f"cityscapes_fine_instanceonly_seg_{part}_cocostyle" for part in parts}
    assert set(PLACES) == voc | cities | {name for name in KNOWN if name.startswith("coco")}


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("name", ["my_dataset_train", "cells_val"])
def test_a_set_of_the_users_own(tmp_path, inside, name):
    folder, _, part = name.rpartition("_")
    place(tmp_path / inside / folder, f"instances_{part}.json")
    expected = tmp_path / inside / folder
    assert find(name, tmp_path) == (expected / f"instances_{part}.json", expected / f"images_{part}")


def test_the_folder_of_the_users_own_set_itself(tmp_path):
    place(tmp_path / "my_dataset", "instances_train.json")
    assert find("my_dataset_train", tmp_path / "my_dataset")[1] == tmp_path / "my_dataset/images_train"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco_2014_minival", ["instances_minival2014.json", "public-scripts/coco_minival.py", "--dataset-path"]),
        ("voc_2007_train", ["pascal_train2007.json", "public-scripts/voc_to_coco.py"]),
        ("cityscapes_fine_instanceonly_seg_val_cocostyle", ["public-scripts/cityscapes_to_coco.py"]),
        ("coco_2017_train", ["public-scripts/download_coco2017.sh"]),
        ("coco_2017_trian", ["did you mean coco_2017_train?"]),
        ("my_dataset_train", ["my_dataset/instances_train.json", "my_dataset/images_train"]),
        ("keypoints_coco_2014_train", ["no keypoint head"]), ("plain", ["unknown", "FOLDER_PART"]),
        ("a/b_train", ["unknown"]),
    ],
)  # fmt: skip
def test_what_is_not_there(tmp_path, name, words):
    with pytest.raises(UserError) as error:
        find(name, tmp_path)
    assert all(word in str(error.value) for word in (name, *words))


def test_a_runs_sets(tmp_path):
    for name in ("coco_2014_train", "coco_2014_valminusminival", "coco_2014_minival"):
        place(tmp_path, KNOWN[name][0])
    place(tmp_path / "more", "annotations/instances_train2017.json")
    run = config("--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", "--dataset-path", tmp_path)
    notes = tmp_path / "annotations"
    assert run.train_sets() == [
        (notes / "instances_train2014.json", tmp_path / "train2014"),
        (notes / "instances_valminusminival2014.json", tmp_path / "val2014"),
    ]
    assert run.split("val") == (notes / "instances_minival2014.json", tmp_path / "val2014")
    assert run.layout == LAYOUTS["coco"]
    also = config("--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", "--dataset-path", tmp_path,
                  "--also-train-on", tmp_path / "more")  # fmt: skip
    assert also.train_sets()[2] == (tmp_path / "more/annotations/instances_train2017.json", tmp_path / "more/train2017")
    assert len(also.train_sets()) == 3


def test_a_set_of_the_users_own_in_a_run(tmp_path):
    for part in ("train", "val"):
        place(tmp_path / "my_dataset", f"instances_{part}.json")
    run = config("--dataset-path", tmp_path, "DATASETS.TRAIN", '("my_dataset_train")',
                 "DATASETS.TEST", '("my_dataset_val")')  # fmt: skip
    assert run.layout == LAYOUTS["custom"]
    assert run.train_sets() == [(tmp_path / "my_dataset/instances_train.json", tmp_path / "my_dataset/images_train")]
    assert run.split("val")[1] == tmp_path / "my_dataset/images_val"
    scored = config("--mode", "evaluate", "MODEL.WEIGHT", "x.pth", "DATASETS.TRAIN", "coco_2014_train",
                    "DATASETS.TEST", "my_dataset_val")  # fmt: skip
    assert scored.layout == LAYOUTS["custom"], "the set that is scored decides"
    other = config("--dataset-path", tmp_path, "DATASETS.TRAIN", "my_dataset_train", "--train-data-path", "/elsewhere")
    assert str(other.split("train")[1]) == "/elsewhere"


def test_each_of_several_training_sets_is_looked_for_before_anything_slow(tmp_path):
    for name in ("a_train", "b_train", "a_val"):
        folder, _, part = name.rpartition("_")
        place(tmp_path, f"{folder}/instances_{part}.json")
        (tmp_path / folder / f"images_{part}").mkdir()
    words = ("--dataset-path", tmp_path, "DATASETS.TRAIN", '("a_train", "b_train")', "DATASETS.TEST", '("a_val",)')
    config(*words).check_folders()
    (tmp_path / "b/images_train").rmdir()
    with pytest.raises(UserError, match=r"b/images_train: there is no such folder, the training images"):
        config(*words).check_folders()
    config("--mode", "evaluate", "MODEL.WEIGHT", "x.pth", *words).check_folders()


def test_91_classes_on_coco_are_its_ids():
    names = ("DATASETS.TRAIN", "coco_2017_train", "DATASETS.TEST", "coco_2017_val")
    assert config(*names).class_ids is None
    assert list(config(*names, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", 91).class_ids) == list(range(1, 91))
    assert config("--dataset", "custom", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", 91).class_ids is None


def test_without_names_the_layout_says_where_the_data_is(tmp_path):
    run = config("--dataset-path", tmp_path, "--dataset", "custom")
    assert run.split("train") == (tmp_path / "annotations/instances_train.json", tmp_path / "train")
    assert run.train_sets() == [run.split("train")]


def test_what_the_command_line_says_of_the_data_set_wins_over_the_file(tmp_path):
    place(tmp_path, "annotations/instances_val.json")

    def said(*words: object):
        argv = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", "--dataset-path", str(tmp_path), *words]
        loaded = load(Config, translate_flags(argv), {}, IGNORED_FLAGS)
        return (*loaded.config.with_said_dataset(loaded.sources), loaded.sources)

    for words in (["--dataset", "custom"], ["--dataset", "custom", "DATASETS.TEST", "()"]):
        run, notes, sources = said(*words)
        assert (run.datasets_train, run.datasets_test, run.layout) == ((), (), LAYOUTS["custom"])
        assert run.split("val") == (tmp_path / "annotations/instances_val.json", tmp_path / "val")
        assert "--dataset custom overrules DATASETS.TRAIN coco_2014_train" in notes[0]
        assert sources["datasets_train"] == "command line --dataset"
    run, notes, _ = said("--dataset", "coco")
    assert run.datasets_test == ("coco_2014_minival",) and not notes, "the file's names are of COCO, too"
    run, notes, _ = said()
    assert run.datasets_test == ("coco_2014_minival",) and not notes
    with pytest.raises(UserError, match=r"--dataset custom and DATASETS.TEST coco_2017_val name different data sets"):
        said("--dataset", "custom", "DATASETS.TEST", "coco_2017_val")
