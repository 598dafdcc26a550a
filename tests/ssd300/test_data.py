"""SSD300's streams by config: augmentation, images without objects, and what counts in the validation."""

import dataclasses
import json
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detcore.data import transforms
from detcore.data.batch import Batch
from detcore.data.recipes import central_square
from detcore.detection import detector as detection
from detcore.device.cpu import CpuBackend
from detcore.processes.launcher import World
from detcore.training.task import Context
from ssd300 import data
from ssd300.config import Config

CPU = CpuBackend(torch.device("cpu"), "fp32")
ALONE = World(0, 1, 0, 1)
CONTEXT = Context(CPU, ALONE, 3)


def quiet(*told) -> None:
    """No watchdog."""


@pytest.fixture
def config(tmp_path) -> Config:
    """Ten photographs in a custom data set, training and validation alike; the even ones have two objects each."""
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "thing"}]}
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(10):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 72)).save(tmp_path / "images" / f"{number}.jpg")
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 72, "width": 96})
        for k in range(0 if number % 2 else 2):
            box = [5 + 40 * k, 8, 30 + 20 * k, 40]
            content["annotations"].append({"id": 2 * number + k, "image_id": number, "category_id": 7, "bbox": box})
    (tmp_path / "a.json").write_text(json.dumps(content))
    files = {f"{split}_annotations_file": tmp_path / "a.json" for split in ("train", "val")}
    folders = {f"{split}_data_path": tmp_path / "images" for split in ("train", "val")}
    return Config(dataset="custom", batch_size=2, max_boxes=4, workers=0, pretrained=False, **files, **folders)


def equal(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def stream(config: Config, epoch: int, step: int, count: int) -> list:
    plan = detection.train_plan(data.DETECTOR, config, detection.open_index(config, "train"), CONTEXT)
    return list(islice(detection.train_stream(config, plan, CPU, epoch, step), count))


def test_an_epoch_has_every_image_cropped_and_recoloured(config):
    batches = stream(config, 0, 0, 10)
    assert sorted(torch.cat([batch.image_id for batch in batches[:5]]).tolist()) == list(range(10))
    assert all(batch.images.shape == (2, 3, 300, 300) for batch in batches)
    boxes = torch.cat([batch.boxes[batch.labels >= 0] for batch in batches])
    assert len(boxes) >= 10 and boxes.min() >= 0 and boxes.max() <= 300
    whole = {(15.625, 8 * 300 / 72), (45 * 3.125, 8 * 300 / 72)}
    assert {tuple(box[:2].tolist()) for box in boxes} - whole
    assert equal(stream(config, 0, 7, 3), batches[7:])


def test_legacy_hardly_turns_the_hue(config):
    recipes = [data.recipe(dataclasses.replace(config, legacy=legacy)) for legacy in (False, True)]
    known = [recipe.view.keywords for recipe in recipes]
    assert [one["augment"].hue for one in known] == [18.0, 0.5] and known[0]["augment"].hue == 360 * 0.05
    assert known[0]["mirror"] == 0.5 and recipes[0].predict_view is None and recipes[1].predict_view is central_square
    ours, theirs = (stream(dataclasses.replace(config, legacy=legacy), 0, 0, 5) for legacy in (False, True))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)) and not torch.equal(a[0], b[0])


@pytest.mark.parametrize(("augmentation", "places"), [("flip", 2), ("none", 1)])
def test_softer_augmentation_shows_whole_images_as_they_are(config, augmentation, places):
    batches = stream(dataclasses.replace(config, augmentation=augmentation), 0, 0, 40)
    seen = {}
    for batch in batches:
        for number, image in zip(batch.image_id.tolist(), batch.images, strict=True):
            seen.setdefault(number, set()).add(image.numpy().tobytes())
    assert len(seen) == 10 and {len(views) for views in seen.values()} == {places}


def test_nvjpeg_gives_the_same_batches(config):
    assert equal(stream(dataclasses.replace(config, loader="nvjpeg"), 1, 2, 5), stream(config, 1, 2, 5))


@pytest.mark.dali
def test_dali_gives_the_same_batches(config):
    pytest.importorskip("nvidia.dali")
    theirs = stream(dataclasses.replace(config, loader="dali", workers=2), 1, 2, 5)
    for a, b in zip(stream(config, 1, 2, 5), theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
        assert (a.images.int() - b.images.int()).abs().max() <= 5


def test_validation_shows_the_whole_image_as_prediction_does(config):
    index = detection.open_index(config, "val")
    batch = next(detection.eval_stream(data.DETECTOR, config, index, ALONE, CPU, 10))
    assert batch.image_id.tolist() == list(range(10)) and batch.images.shape == (10, 3, 300, 300)
    image = transforms.decode(index.read(4), path=index.path(4), image_id=4)
    assert torch.equal(
        batch.images[4], transforms.resize(image, (300, 300), flip=False, antialias=True).permute(2, 0, 1)
    )


def oracle(model: nn.Module, batch: Batch, autocast: Callable):
    """Finds the two true boxes in every image, also where there is nothing, and there with more confidence."""
    count = len(batch.images)
    boxes = torch.tensor([[5.0, 8, 35, 48], [45, 8, 95, 48]]) * torch.tensor([300 / 96, 300 / 72] * 2)
    sure = torch.tensor([0.5 + 0.4 * (number % 2) for number in range(count)])
    return boxes.expand(count, 2, 4), sure[:, None].expand(count, 2), torch.zeros(count, 2, dtype=torch.int64)


@pytest.mark.parametrize("legacy", [False, True])
def test_images_without_annotations_are_scored_but_by_legacy(config, legacy):
    config = dataclasses.replace(config, legacy=legacy, eval_batch_size=4)
    opened = detection.open_data(data.DETECTOR._replace(infer=oracle), config, CONTEXT)
    try:
        assert opened.train_samples == opened.eval_samples == 10 and opened.steps_per_epoch == 5
        pending = opened.evaluate(nn.Identity(), quiet)
        while (result := pending.poll()) is None:
            continue
    finally:
        opened.close()
    assert result["AP"] == pytest.approx(1.0) if legacy else 0.4 < result["AP"] < 0.7
    assert result["per_class"] == {"thing": result["AP"]}


def test_coco_by_name(shared_data, tmp_path):
    config = Config(dataset_path=shared_data / "coco_permissive", cache_dir=tmp_path, batch_size=4, workers=0)
    index = detection.open_index(config, "train")
    assert detection.class_count(data.DETECTOR, config) == index.num_classes == 80 and len(index) == 26
    batches = stream(config, 0, 0, 6)
    assert max(int(batch.labels.max()) for batch in batches) < 80
    assert (
        Config(synthetic=True).num_classes == 0 and detection.class_count(data.DETECTOR, Config(synthetic=True)) == 80
    )
