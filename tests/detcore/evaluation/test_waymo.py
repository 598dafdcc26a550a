"""Waymo's score against pycocotools' own arrays, read as NVIDIA's validation reads them, and against golden values."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detcore import UserError
from detcore.evaluation import waymo
from detcore.evaluation.background import BackgroundEvaluator
from detcore.evaluation.coco import METRICS, GroundTruth, detected_only, evaluate

BACKENDS = ("hotcoco", "pycocotools")


def truth(rows, images, categories=(1, 2, 3)):
    """rows: image, category, x, y, w, h."""
    rows = np.asarray(rows, np.float64).reshape(-1, 6)
    boxes = rows[:, 2:]
    ids = (np.asarray(images, np.int64), np.asarray(categories, np.int64))
    columns = (rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), boxes, boxes[:, 2] * boxes[:, 3])
    return GroundTruth(*ids, *columns, np.zeros(len(rows), np.uint8))


def random_set(seed, images=40):
    """Boxes of all sizes and detections near them, some of them wrong, some images without any."""
    random = np.random.default_rng(seed)
    count = 5 * images
    boxes = np.column_stack([random.uniform(0, 600, (count, 2)), random.uniform(8, 200, (count, 2))])
    image, category = random.integers(1, images + 1, count), random.integers(1, 4, count)
    found = np.repeat(np.arange(count), 2)[random.random(2 * count) < 0.7]
    near = boxes[found] + random.normal(0, 6, (len(found), 4))
    near[:, 2:] = np.abs(near[:, 2:]) + 1
    labels = np.where(random.random(len(found)) < 0.9, category[found], random.integers(1, 4, len(found)))
    detections = np.column_stack([image[found], near, random.random(len(found)), labels])
    detections = detections[detections[:, 0] % 7 != 0]
    return truth(np.column_stack([image, category, boxes]), range(1, images + 1)), detections


def original(ground_truth, detections):
    """What NVIDIA's validation prints, by pycocotools: IoU index 4 for vehicles, 0 for the others."""
    images = [{"id": int(i)} for i in ground_truth.image_ids]
    columns = (ground_truth.ann_image_id, ground_truth.ann_category_id, ground_truth.bbox)
    annotations = [
        {"id": n, "image_id": int(i), "category_id": int(k), "bbox": b.tolist(), "area": b[2] * b[3], "iscrowd": 0}
        for n, (i, k, b) in enumerate(zip(*columns), 1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": k} for k in (1, 2, 3)]}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    vectors = [run.eval["precision"][iou, :, k, 0, 2] for k, iou in enumerate((4, 0, 0))]
    vectors = [vector[vector > -1] for vector in vectors]
    means = [100 * vector.mean() if len(vector) else -1.0 for vector in vectors]
    return [100 * np.concatenate(vectors).mean(), *means], run.stats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_as_the_original_beside_cocos_numbers(backend, seed):
    ground_truth, detections = random_set(seed)
    if seed == 3:  # no cyclist anywhere: the mean is over the other two
        kept = ground_truth.ann_category_id != 3
        ground_truth = GroundTruth(*ground_truth[:2], *(column[kept] for column in ground_truth[2:]))
    result = evaluate(ground_truth, detections, backend=backend, waymo=True)
    expected, stats = original(ground_truth, detections)
    assert [result[name] for name in waymo.METRICS] == pytest.approx(expected, abs=1e-9)
    assert [result[name] for name in METRICS] == pytest.approx(stats.tolist(), abs=1e-9)
    assert (result["cyclist"] == -1) == (seed == 3)
    assert result.keys() == {*METRICS, *waymo.METRICS}
    assert waymo.METRICS[0] not in evaluate(ground_truth, detections, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend):
    """IoU .6 is a hit at .5 and none at .7."""
    boxes = [(1, k, 50 * k, 10, 20, 20) for k in (1, 2, 3)]
    detections = np.array([(1, 50 * k, 10, 20, 12, 0.9, k) for k in (1, 2, 3)], np.float64)
    result = evaluate(truth(boxes, [1]), detections, backend=backend, waymo=True)
    assert (result["vehicle"], result["pedestrian"], result["cyclist"]) == pytest.approx((0, 100, 100))
    assert result["L2_ALL_NS"] == pytest.approx(66.667, abs=1e-3) and result["AP"] == pytest.approx(0.3)
    result = evaluate(truth(boxes[:2], [1]), detections[:2], backend=backend, waymo=True)
    assert result["L2_ALL_NS"] == pytest.approx(50) and result["cyclist"] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_without_a_detection(backend):
    """They count here; the original's own list of images leaves them out."""
    ground_truth = truth([(1, 2, 5, 5, 20, 20), (2, 2, 5, 5, 20, 20)], [1, 2])
    detections = np.array([(1, 5, 5, 20, 20, 0.9, 2), (2, 300, 5, 20, 20, 0.0009, 2)], np.float64)
    result = evaluate(ground_truth, detections[:1], backend=backend, waymo=True)
    assert result["L2_ALL_NS"] == result["pedestrian"] == pytest.approx(50.495, abs=1e-3)
    fewer = detected_only(ground_truth, detections)
    assert fewer.image_ids.tolist() == fewer.ann_image_id.tolist() == [1] and len(fewer.bbox) == 1
    result = evaluate(fewer, detections[:1], backend=backend, waymo=True)
    assert result["L2_ALL_NS"] == pytest.approx(100)


def test_no_detections_and_no_truth():
    nothing = np.zeros((0, 7))
    result = evaluate(truth([(1, 2, 5, 5, 20, 20)], [1]), nothing, waymo=True)
    assert [result[name] for name in waymo.METRICS] == [0, -1, 0, -1]
    result = evaluate(truth([], [1]), nothing, waymo=True)
    assert [result[name] for name in waymo.METRICS] == [-1] * 4


def test_other_categories_are_refused_at_once():
    ground_truth = truth([(1, 7, 5, 5, 20, 20)], [1], (1, 7))
    for start in (lambda: evaluate(ground_truth, np.zeros((0, 7)), waymo=True),
                  lambda: BackgroundEvaluator(ground_truth, waymo=True)):  # fmt: skip
        with pytest.raises(UserError, match="lists category 7, and Waymo's score is of 1 vehicle, 2 pedestrian"):
            start()


def test_in_the_background():
    ground_truth, detections = random_set(5)
    with BackgroundEvaluator(ground_truth, waymo=True) as evaluator:
        result = evaluator.submit(detections).wait(60)
    assert result == evaluate(ground_truth, detections, waymo=True)
