"""Masks through a detector: trained on edges, pasted, gathered, scored beside the boxes, written and drawn."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

from detcore.data.recipes import shortest_edge
from detcore.detection import detections, drawing, inference
from detcore.detection import detector as detection
from detcore.detection.config import DetectionConfig
from detcore.detection.detections import Detections
from detcore.detection.detector import Detector, examples, open_train
from detcore.device.cpu import CpuBackend
from detcore.evaluation.rle import Rles
from detcore.ops.mask_targets import mask_targets
from detcore.processes.launcher import World
from detcore.training.task import Context
from tests.detcore.data.conftest import Coco
from tests.detcore.device.tape import TapeRecorder

CPU = CpuBackend(torch.device("cpu"), "fp32")
CONTEXT = Context(CPU, World(0, 1, 0, 1), 3)
SLOTS = 4


@dataclass(frozen=True)
class Masked(DetectionConfig):
    """The config of a detector with masks."""

    max_edges: int = 0


class Truth(nn.Module):
    """Finds every true box with its true mask, in small; `worse` pixels of the canvas beside it."""

    def __init__(self, index, worse: float = 0.0) -> None:
        super().__init__()
        self.index, self.worse = index, worse

    def forward(self, batch):
        count = len(batch.images)
        boxes, labels = torch.zeros(count, SLOTS, 4), torch.full((count, SLOTS), -1)
        masks = torch.zeros(count, SLOTS, 28, 28)
        for n, image_id in enumerate(batch.image_id.tolist()):
            if image_id < 0:
                continue
            i = int(np.flatnonzero(self.index.image_ids == image_id)[0])
            own, classes, _ = self.index.boxes(i)
            edges, of = (torch.from_numpy(part)[None] for part in self.index.edges(i))
            own, k = torch.from_numpy(own), len(own)
            masks[n, :k] = mask_targets(edges, of, own[None], torch.arange(k)[None], 28)[0].float()
            boxes[n, :k] = own * (batch.extent[n] / batch.size[n]).flip(0).repeat(2)
            labels[n, :k] = torch.from_numpy(classes)
        scores = (labels >= 0) * torch.linspace(0.9, 0.6, SLOTS)
        return boxes + self.worse, scores, labels, masks, boxes


def infer(model, batch, autocast):
    with autocast():
        return model(batch)


RECIPE = shortest_edge(48, 80, multiple=16)
DETECTOR = Detector(lambda config: RECIPE, infer, classes=3, masks=lambda config: True)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Masked:
    """Seven images with one to three ellipses each, training and validation alike, the last one in RLE."""
    folder = tmp_path_factory.mktemp("masked")
    coco = Coco(folder)
    coco.categories(4, 9)
    rng, angles = np.random.default_rng(2), np.linspace(0.1, 6.3, 40)
    for number in range(7):
        width, height = 90 + 12 * number, 130 - 9 * number
        coco.add_image(number, width, height)
        for k in range(1 + number % 3):
            size = rng.uniform(25, 45, 2)
            x, y = rng.uniform(0, np.array([width, height]) - size)
            points = np.stack([x + size[0] * (1 + np.cos(angles)) / 2, y + size[1] * (1 + np.sin(angles)) / 2], 1)
            segmentation = [points.ravel().tolist()]
            if number == 6:
                one = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
                segmentation = {"size": one["size"], "counts": one["counts"].decode()}
            coco.add_box(number, [4, 9][k % 2], (x, y, *size), segmentation=segmentation)
    coco.write()
    files = {f"{split}_annotations_file": coco.file for split in ("train", "val")}
    folders = {f"{split}_data_path": coco.images for split in ("train", "val")}
    return Masked(dataset="custom", batch_size=2, max_boxes=5, workers=0, eval_batch_size=3, **files, **folders)


@pytest.fixture
def index(config):
    return open_train(DETECTOR, config)


def scores(config, model, detector=DETECTOR) -> dict:
    opened = detection.open_data(detector, config, CONTEXT)
    try:
        pending = opened.evaluate(model, lambda *told: None)
        while (result := pending.poll()) is None:
            continue
    finally:
        opened.close()
    return result


def test_both_are_scored_in_the_background(config, index):
    result = scores(config, Truth(index))
    assert result["AP"] > 0.99 and result["segm_AP50"] == 1 and result["segm_AP"] > 0.7
    assert list(result)[:24] == [*list(result)[:12], *(f"segm_{name}" for name in list(result)[:12])]
    assert set(result["per_class"]) == {"class 4", "class 9"}
    worse = scores(config, Truth(index, worse=15.0))
    assert worse["AP"] < 0.2 and worse["segm_AP"] == result["segm_AP"], "masks lie where the detector says"


def test_without_masks_the_same_detector_is_scored_as_ever(config, index):
    plain = DETECTOR._replace(
        masks=lambda config: False, infer=lambda *given: infer(*given)[:3]
    )  # fmt: skip
    result = scores(config, Truth(index), plain)
    assert result["AP"] > 0.99 and not [name for name in result if name.startswith("segm")]


def test_recorded_inference_hands_them_on(config, index):
    val = detection.open_val(DETECTOR, config)
    found = []
    for device in (CPU, CpuBackend(torch.device("cpu"), "fp32", TapeRecorder())):
        calls = detection.compiled_detect(DETECTOR, Truth(index), val.category_ids.tolist(), CPU)
        stream = detection.eval_stream(DETECTOR, config, val, World(0, 1, 0, 1), device, 3)
        found.append(detection.detect_all(calls, stream, device, lambda *told: None))
    assert torch.equal(found[0].rows, found[1].rows) and len(found[0].rows) == 13
    assert found[0].masks.dictionaries() == found[1].masks.dictionaries()


def test_ranks_are_gathered_in_order(config, index, monkeypatch):
    masks = Rles.of([{"size": [4, 5], "counts": b"02"}, {"size": [6, 7], "counts": b"0123"}])
    one = Detections(torch.arange(14.0).view(2, 7).double(), masks)
    monkeypatch.setattr(detections.distributed, "gather_rows", lambda rows: torch.cat([rows, rows[:0], rows]))
    found = detections.gathered(one, True, torch.device("cpu"))
    assert torch.equal(found.rows, one.rows.repeat(2, 1))
    assert found.masks.dictionaries() == 2 * masks.dictionaries()
    assert found.masks.areas.tolist() == 2 * masks.areas.tolist()
    assert detections.gathered(one._replace(masks=None), False, torch.device("cpu")).masks is None
    empty = Detections(torch.zeros(0, 7, dtype=torch.float64), None)
    assert detections.gathered(empty, True, torch.device("cpu")).masks.dictionaries() == []
    monkeypatch.setattr(detections.distributed, "gather_rows", lambda rows: None)
    assert detections.gathered(one, True, torch.device("cpu")) is None


def test_examples_have_the_shapes_of_training(config, index):
    batch = next(detection.train_stream(config, detection.train_plan(DETECTOR, config, index, CONTEXT), CPU, 0, 0))
    made = examples(DETECTOR, config, 2, seed=1)
    assert {one.edges.shape for one in made} == {batch.edges.shape} and batch.edges.shape[1] == index.most_edges("drop")
    assert all((one.edge_of[..., 0] >= 0).any() for one in made)
    fixed = examples(DETECTOR, Masked(batch_size=2, max_boxes=5, max_edges=333), 2, seed=1)
    assert {one.edges.shape for one in fixed} == {(2, 333, 4)}
    random = examples(DETECTOR, Masked(batch_size=2, max_boxes=5, synthetic=True), 2, seed=1)
    assert {one.edges.shape for one in random} == {(2, detection.SYNTHETIC_EDGES, 4)}
    boxes = examples(DETECTOR._replace(masks=lambda config: False), config, 2, seed=1)
    assert {one.edges.shape for one in boxes} == {(2, 0, 4)}


def test_a_prediction_refuses_a_centred_letterbox(config, index):
    def centred(sizes, canvas):
        view = DETECTOR.recipe(config).eval_view(sizes, canvas)
        return view._replace(sizes=view.sizes // 2, offsets=view.sizes // 4)

    recipe = dataclasses.replace(DETECTOR.recipe(config), predict_view=centred)
    image = torch.zeros(3, 130, 90, dtype=torch.uint8)
    detector = DETECTOR._replace(recipe=lambda config: recipe)
    with pytest.raises(ValueError, match="offsets must be 0"):
        inference.look(config, detector, Truth(index), image, CPU, torch.tensor([4, 9]))


def test_one_image_is_looked_at_written_and_drawn(config, index):
    image = torch.from_numpy(np.full((3, 130, 90), 90, np.uint8))  # image 0's size
    ids = torch.tensor([4, 9])
    found = inference.look(config, DETECTOR, Truth(index), image, CPU, ids)
    assert len(found.rows) == 1 and len(inference.look(config, DETECTOR, Truth(index), image, CPU, ids, 0.91).rows) == 0
    truth = detection.open_val(DETECTOR, config).masks().dictionaries()[0]
    assert coco_mask.iou(found.masks.dictionaries(), [truth], [False])[0, 0] > 0.8
    written = json.loads(json.dumps(inference.coco_results(found)))
    assert written[0]["segmentation"]["size"] == [130, 90] and written[0]["category_id"] == 4
    assert written[0]["segmentation"]["counts"].encode() == found.masks.dictionaries()[0]["counts"]
    names = {4: "four", 9: "nine"}
    drawn, plain = (drawing.draw(image, found.rows[:, 1:], names, masks) for masks in (found.masks, None))
    inside = torch.from_numpy(coco_mask.decode(truth) == 1)
    changed = (drawn != plain).any(0)
    assert changed[inside].float().mean() > 0.5 and changed[~inside].float().mean() < 0.05
    assert inference.coco_results(found._replace(masks=None))[0].keys() == {"image_id", "category_id", "bbox", "score"}
