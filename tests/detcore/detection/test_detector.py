"""What a benchmark may say of its data and metrics: fixed classes, several sets, canvases, metrics of its own."""

from dataclasses import dataclass

import pytest

from detcore import UserError
from detcore.data.recipes import shortest_edge, stretch
from detcore.detection.config import DetectionConfig
from detcore.detection.detector import Detector, class_count, examples, metrics_of, open_index
from detcore.evaluation.coco import THRESHOLDS
from tests.detcore.data.conftest import Coco

IOU = {1: 0.7, 2: 0.5, 3: 0.5}  # Waymo's vehicle, pedestrian, cyclist


def at_iou(config, by_iou):
    """AP at each class' own threshold, and their mean."""
    found = {f"class {i}": by_iou[i][THRESHOLDS.index(iou)] for i, iou in IOU.items()}
    return {**found, "L2_ALL_NS": sum(found.values()) / 3}


DETECTOR = Detector(lambda config: stretch((32, 32)), infer=None, classes=7, extra_metrics=at_iou)


@dataclass(frozen=True)
class RawIds(DetectionConfig):
    """COCO's way in EfficientDet: outputs are the raw ids."""

    @property
    def class_ids(self):
        return range(1, 91)


def dataset(folder, *ids):
    """A custom set below the folder, with one image in each split."""
    for split in ("train", "val"):
        coco = Coco(folder / split)
        coco.categories(*ids)
        coco.add_image(7, 40, 30, [(ids[0], 1, 1, 20, 20)])
        coco.file = folder / "annotations" / f"instances_{split}.json"
        coco.file.parent.mkdir(exist_ok=True)
        coco.write()
        for image in coco.images.iterdir():
            image.rename(folder / split / image.name)
    return folder


def test_classes_of_the_model_are_those_of_the_config(tmp_path):
    config = RawIds(dataset="custom", dataset_path=dataset(tmp_path / "set", 18, 90))
    assert class_count(DETECTOR, config) == 90 and open_index(config, "val").boxes(0)[1].tolist() == [17]
    assert class_count(DETECTOR, RawIds(dataset="custom", synthetic=True)) == 90
    plain = DetectionConfig(dataset="custom", dataset_path=config.dataset_path)
    assert class_count(DETECTOR, plain) == 2 and open_index(plain, "train").boxes(0)[1].tolist() == [0]
    with pytest.raises(UserError, match="has 90 classes"):
        class_count(DETECTOR, RawIds(dataset="custom", dataset_path=config.dataset_path, num_classes=2))


def test_further_sets_train_and_do_not_validate(tmp_path):
    sets = [dataset(tmp_path / name, 3, 5) for name in ("one", "two", "three")]
    config = DetectionConfig(dataset="custom", dataset_path=sets[0], also_train_on=(str(sets[1]), str(sets[2])))
    train = open_index(config, "train")
    assert [train.path(i) for i in range(len(train))] == [folder / "train/000007.jpg" for folder in sets]
    assert len(open_index(config, "val")) == 1 and class_count(DETECTOR, config) == 2
    assert {folder / "train" for folder in sets} <= set(config.data_paths())


def test_a_detector_adds_metrics_of_each_class_at_its_own_threshold():
    by_iou = {i: [round(0.9 - 0.1 * t - 0.01 * i, 3) for t in range(10)] for i in (1, 2, 3)}
    result = {"AP": 0.4, "per_class": {1: 0.3, 2: 0.4, 3: 0.5}, "per_class_by_iou": by_iou}
    found = metrics_of(DETECTOR, None, result, {1: "vehicle", 2: "pedestrian", 3: "cyclist"})
    assert (found["class 1"], found["class 2"], found["class 3"]) == (0.49, 0.88, 0.87)
    assert found["L2_ALL_NS"] == pytest.approx((0.49 + 0.88 + 0.87) / 3)
    assert list(found) == ["AP", "class 1", "class 2", "class 3", "L2_ALL_NS", "per_class"]
    assert found["per_class"] == {"vehicle": 0.3, "pedestrian": 0.4, "cyclist": 0.5} and "per_class_by_iou" in result


def test_an_example_for_each_canvas():
    detector = DETECTOR._replace(recipe=lambda config: shortest_edge(32, 48, multiple=8))
    config = DetectionConfig(batch_size=2, max_boxes=5)
    found = examples(detector, config, 7, seed=1)
    assert [tuple(b.images.shape) for b in found] == [(2, 3, h, w) for h, w in detector.recipe(config).canvases]
    assert len(found) == 4 and all(b.boxes.shape == (2, 5, 4) for b in found)
