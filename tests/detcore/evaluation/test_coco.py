"""The evaluator against pycocotools itself, fed as its users feed it, and against numbers worked out by hand."""

import builtins
import contextlib
import io
from functools import partial

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detcore import UserError
from detcore.evaluation.coco import METRICS, GroundTruth, Scorer, evaluate

near = partial(pytest.approx, abs=1e-9, rel=0)
BACKENDS = ("hotcoco", "pycocotools")


def truth_of(boxes, *, image_ids=(1,), category_ids=(1,), images=None, categories=None, area=None, crowd=None):
    """Boxes as x, y, w, h; by default all of image 1 and category 1, area w * h, no crowd."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    return GroundTruth(
        np.asarray(image_ids, dtype=np.int64),
        np.asarray(category_ids, dtype=np.int64),
        np.asarray(np.ones(count) if images is None else images, dtype=np.int64),
        np.asarray(np.ones(count) if categories is None else categories, dtype=np.int64),
        boxes,
        np.asarray(boxes[:, 2] * boxes[:, 3] if area is None else area, dtype=np.float64),
        np.asarray(np.zeros(count) if crowd is None else crowd, dtype=np.uint8),
    )


def rows(*detections):
    return np.array(detections, dtype=np.float64).reshape(-1, 7)


def oracle(truth, detections):
    """pycocotools with dicts, sharing no line with the evaluator. Returns the twelve numbers and AP by category."""
    annotations = [
        {
            "id": i + 1,
            "image_id": int(truth.ann_image_id[i]),
            "category_id": int(truth.ann_category_id[i]),
            "bbox": [float(v) for v in truth.bbox[i]],
            "area": float(truth.area[i]),
            "iscrowd": int(truth.iscrowd[i]),
        }
        for i in range(len(truth.bbox))
    ]
    results = [
        {"image_id": int(r[0]), "bbox": [float(v) for v in r[1:5]], "score": float(r[5]), "category_id": int(r[6])}
        for r in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(i)} for i in truth.image_ids],
            "categories": [{"id": int(i), "name": f"c{i}"} for i in truth.category_ids],
            "annotations": annotations,
        }
        coco.createIndex()
        if results:
            found = coco.loadRes(results)
        else:
            found = COCO()
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        run = COCOeval(coco, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    per_class, by_iou = {}, {}
    for k, category_id in enumerate(run.params.catIds):
        precision = run.eval["precision"][:, :, k, 0, 2]
        by_iou[int(category_id)] = near(precision.mean(1).tolist())  # a class has ground truth at all IoU or at none
        precision = precision[precision > -1]
        per_class[int(category_id)] = precision.mean() if precision.size else -1
    return dict(zip(METRICS, run.stats, strict=True)), per_class, by_iou


def assert_equals_oracle(truth, detections, backend):
    wanted, wanted_classes, by_iou = oracle(truth, detections)
    got = evaluate(truth, detections, per_class=True, backend=backend)
    classes = got.pop("per_class")
    assert got.pop("per_class_by_iou") == by_iou
    assert list(got) == list(METRICS)
    assert got == near(wanted)
    assert classes == near(wanted_classes)


def random_case(rng):
    """Small pictures with much that coincides: coarse grids (ties in IoU, empty boxes), few scores (ties in score),
    areas on the edges of the area ranges, crowds, empty images and categories, sparse and big unsorted ids."""
    image_ids = rng.choice(2 ** int(rng.choice([4, 30, 52])), int(rng.integers(1, 8)), replace=False)
    category_ids = rng.choice(500, int(rng.integers(1, 5)), replace=False)
    count, found = int(rng.integers(0, 40)), int(rng.choice([0, 1, 10, 60, 300, 500]))
    step = float(rng.choice([1, 8, 16]))

    def boxes(n):
        if step == 16:
            return rng.uniform(0, 120, (n, 4))
        return np.concatenate([rng.integers(0, 6, (n, 2)), rng.integers(0, 8, (n, 2))], axis=1) * step

    bbox = boxes(count)
    area = bbox[:, 2] * bbox[:, 3]
    kind = rng.integers(0, 3)
    if kind == 1:
        edges = [0, 5, 1023.999, 1024, 1024.001, 9215.9, 9216, 9216.1, 1e10, 2e10]
        area = rng.choice(edges, count)
    elif kind == 2:
        area = area * rng.uniform(0.3, 1, count)
    images = rng.choice(image_ids, count)
    categories = rng.choice(category_ids[: max(1, len(category_ids) - 1)], count)
    crowd = rng.random(count) < rng.choice([0, 0.2, 0.9])
    truth = truth_of(
        bbox,
        image_ids=image_ids,
        category_ids=category_ids,
        images=images,
        categories=categories,
        area=area,
        crowd=crowd,
    )

    box, image, category = boxes(found), rng.choice(image_ids, found), rng.choice(category_ids, found)
    if count:
        copied = rng.random(found) < 0.6
        source = rng.integers(0, count, found)
        jitter = 1 + rng.choice([0, 0, 0.05, 0.2]) * rng.uniform(-1, 1, (found, 4))
        box = np.where(copied[:, None], bbox[source] * jitter, box)
        image = np.where(copied, images[source], image)
        category = np.where(copied & (rng.random(found) < 0.9), categories[source], category)
    score = rng.choice([0, 0.1, 0.5, 0.5, 0.9, 1], found) if rng.random() < 0.5 else rng.random(found)
    return truth, np.column_stack([image, box, score, category]).astype(np.float64)


@pytest.mark.parametrize("block", range(4))
def test_hotcoco_equals_pycocotools_on_random_cases(block):
    for seed in range(block * 75, block * 75 + 75):
        truth, detections = random_case(np.random.default_rng(seed))
        assert_equals_oracle(truth, detections, "hotcoco")


def test_fallback_equals_pycocotools_on_random_cases():
    for seed in range(1000, 1040):
        truth, detections = random_case(np.random.default_rng(seed))
        assert_equals_oracle(truth, detections, "pycocotools")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_at_once", [1, 40])
def test_categories_scored_in_groups_give_the_same_numbers(backend, rows_at_once):
    for seed in range(2000, 2020):
        truth, detections = random_case(np.random.default_rng(seed))
        whole = Scorer(truth, backend=backend, rows_at_once=10**9)(detections, per_class=True)
        assert Scorer(truth, backend=backend, rows_at_once=rows_at_once)(detections, per_class=True) == whole


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    def test_one_box_of_iou_06(self, backend):
        # 100 x 100 against 100 x 60 inside it: IoU 0.6 passes 0.5, 0.55 and 0.6, three of the ten thresholds.
        got = evaluate(truth_of([[0, 0, 100, 100]]), rows([1, 0, 0, 100, 60, 0.9, 1]), backend=backend)
        ones = {"AP": 0.3, "AP50": 1.0, "AP75": 0.0, "APl": 0.3, "AR1": 0.3, "AR10": 0.3, "AR100": 0.3, "ARl": 0.3}
        undefined = dict.fromkeys(["APs", "APm", "ARs", "ARm"], -1.0)
        assert got == near({**ones, **undefined})
        assert all(type(value) is float for value in got.values())

    def test_two_boxes_one_found_with_a_higher_false_one(self, backend):
        # Ranked wrong, right: precision 1/2 up to recall 1/2, which is 51 of the 101 recall points.
        truth = truth_of([[0, 0, 40, 40], [100, 100, 40, 40]])
        found = rows([1, 300, 0, 40, 40, 0.9, 1], [1, 0, 0, 40, 40, 0.8, 1])
        got = evaluate(truth, found, backend=backend)
        assert got["AP"] == near(0.5 * 51 / 101)
        assert (got["AR1"], got["AR10"], got["AR100"]) == (0.0, 0.5, 0.5)

    def test_only_the_hundred_highest_scores_of_an_image_and_category_count(self, backend):
        truth = truth_of([[0, 0, 40, 40]])
        wrong = [[1, 300 + i, 0, 40, 40, 0.9, 1] for i in range(99)]
        right = [1, 0, 0, 40, 40, 0.5, 1]
        assert evaluate(truth, rows(*wrong, right), backend=backend)["AP"] == near(0.01)
        assert evaluate(truth, rows(*wrong, wrong[0], right), backend=backend)["AP"] == 0.0
        # Another category has a hundred of its own.
        truth = truth_of([[0, 0, 40, 40]], category_ids=[1, 2])
        others = [[1, 300 + i, 0, 40, 40, 0.9, 2] for i in range(200)]
        assert evaluate(truth, rows(*others, right), backend=backend)["AP"] == near(1.0)

    def test_ties_in_score_keep_the_order_of_the_rows(self, backend):
        truth = truth_of([[0, 0, 40, 40]])
        right, wrong = [1, 0, 0, 40, 40, 0.5, 1], [1, 300, 0, 40, 40, 0.5, 1]
        assert evaluate(truth, rows(right, wrong), backend=backend)["AP"] == near(1.0)
        assert evaluate(truth, rows(wrong, right), backend=backend)["AP"] == near(0.5)

    def test_a_crowd_is_neither_missed_nor_a_mistake(self, backend):
        truth = truth_of([[0, 0, 40, 40], [100, 0, 200, 200]], crowd=[0, 1])
        right, in_crowd = [1, 0, 0, 40, 40, 0.5, 1], [1, 120, 20, 40, 40, 0.9, 1]
        assert evaluate(truth, rows(right), backend=backend)["AP"] == near(1.0)
        assert evaluate(truth, rows(in_crowd, in_crowd, right), backend=backend)["AP"] == near(1.0)

    def test_area_ranges_include_their_edges(self, backend):
        # 32 * 32 belongs to small and medium, 96 * 96 to medium and large.
        truth = truth_of([[0, 0, 32, 32], [200, 0, 96, 96]])
        found = rows([1, 0, 0, 32, 32, 0.9, 1])
        got = evaluate(truth, found, backend=backend)
        assert (got["ARs"], got["ARm"], got["ARl"]) == (1.0, 0.5, 0.0)

    def test_the_area_of_the_file_decides_the_range_not_the_box(self, backend):
        got = evaluate(truth_of([[0, 0, 200, 200]], area=[500.0]), rows([1, 0, 0, 200, 200, 0.9, 1]), backend=backend)
        assert (got["APs"], got["APm"], got["APl"]) == near((1.0, -1.0, -1.0))

    def test_the_first_annotation_can_be_matched(self, backend):
        # pycocotools never matches an annotation whose id is 0; numbering from 1 makes this 1 instead of 0.
        assert evaluate(truth_of([[0, 0, 9, 9]]), rows([1, 0, 0, 9, 9, 0.9, 1]), backend=backend)["AP"] == near(1.0)

    def test_images_without_detections_count(self, backend):
        truth = truth_of([[0, 0, 40, 40]] * 4, image_ids=[9, 4, 7, 5], images=[9, 4, 7, 5])
        got = evaluate(truth, rows([4, 0, 0, 40, 40, 0.9, 1]), backend=backend)
        assert got["AR100"] == 0.25
        assert got["AP"] == near(26 / 101)

    def test_nothing_found(self, backend):
        got = evaluate(truth_of([[0, 0, 40, 40]]), np.zeros((0, 7)), per_class=True, backend=backend)
        assert (got["AP"], got["AR100"], got["APl"], got["per_class"]) == (0.0, 0.0, -1.0, {1: 0.0})

    def test_no_ground_truth(self, backend):
        got = evaluate(truth_of([]), rows([1, 0, 0, 9, 9, 0.9, 1]), per_class=True, backend=backend)
        assert got == {**dict.fromkeys(METRICS, -1.0), "per_class": {1: -1.0}, "per_class_by_iou": {1: [-1.0] * 10}}

    def test_no_images_and_no_categories(self, backend):
        truth = truth_of([], image_ids=[], category_ids=[])
        assert evaluate(truth, np.zeros((0, 7)), backend=backend) == dict.fromkeys(METRICS, -1.0)

    def test_per_class_keeps_the_file_s_ids(self, backend):
        truth = truth_of([[0, 0, 40, 40]] * 2, category_ids=[90, 3, 17], categories=[90, 3])
        got = evaluate(truth, rows([1, 0, 0, 40, 40, 0.9, 90]), per_class=True, backend=backend)
        assert got["per_class"] == near({3: 0.0, 17: -1.0, 90: 1.0})
        assert got["AP"] == near(0.5)

    def test_annotations_of_unlisted_images_and_categories_are_not_scored(self, backend):
        boxes = [[0, 0, 40, 40]] * 3
        truth = truth_of(boxes, images=[1, 2, 1], categories=[1, 1, 8])
        assert evaluate(truth, rows([1, 0, 0, 40, 40, 0.9, 1]), backend=backend)["AR100"] == 1.0

    def test_the_order_of_rows_and_annotations_is_free(self, backend):
        rng = np.random.default_rng(5)
        truth, found = random_case(np.random.default_rng(11))
        found[:, 5] = rng.permutation(len(found)) / len(found)
        before = evaluate(truth, found, backend=backend)
        order = rng.permutation(len(truth.bbox))
        mixed = GroundTruth(*truth[:2], *(column[order] for column in truth[2:]))
        got = evaluate(mixed, np.asfortranarray(found[rng.permutation(len(found))]), backend=backend)
        assert got == near(before)

    def test_prints_nothing(self, backend, capfd):
        evaluate(truth_of([[0, 0, 9, 9]]), rows([1, 0, 0, 9, 9, 0.9, 1]), backend=backend)
        assert capfd.readouterr() == ("", "")

    def test_memory_mapped_columns(self, backend, tmp_path):
        truth, found = random_case(np.random.default_rng(13))
        mapped = []
        for i, column in enumerate(truth):
            np.save(tmp_path / f"{i}.npy", column)
            mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
        assert evaluate(GroundTruth(*mapped), found, backend=backend) == evaluate(truth, found, backend=backend)

    def test_a_scorer_may_be_used_again(self, backend):
        truth, found = random_case(np.random.default_rng(12))
        scorer = Scorer(truth, backend=backend)
        first = scorer(found, per_class=True)
        assert scorer(np.zeros((0, 7)))["AP"] == 0.0
        assert scorer(found, per_class=True) == first


@pytest.mark.parametrize("backend", BACKENDS)
class TestErrors:
    @pytest.mark.parametrize("column", range(1, 6))
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_numbers_that_cannot_be_scored(self, backend, column, value):
        found = rows([1, 0, 0, 9, 9, 0.9, 1], [1, 0, 0, 9, 9, 0.8, 1])
        found[1, column] = value
        name = ("image_id", "x", "y", "width", "height", "score")[column]
        with pytest.raises(UserError, match=rf"row 1 \(image 1\) has {name} {value}; 1 of 2 rows"):
            evaluate(truth_of([[0, 0, 9, 9]]), found, backend=backend)

    @pytest.mark.parametrize(("column", "name"), [(0, "image_id"), (6, "category_id")])
    @pytest.mark.parametrize("value", [7, -1, 1.5, 2.0**60, np.nan, np.inf])
    def test_unknown_ids(self, backend, column, name, value):
        found = rows([1, 0, 0, 9, 9, 0.9, 1])
        found[0, column] = value
        with pytest.raises(UserError, match=f"row 0 has {name} {value:.17g}".replace("+", r"\+")):
            evaluate(truth_of([[0, 0, 9, 9]], image_ids=[1, 9], category_ids=[1, 9]), found, backend=backend)

    @pytest.mark.parametrize("shape", [(0,), (7,), (3, 6), (3, 8), (1, 3, 7)])
    def test_shapes(self, backend, shape):
        with pytest.raises(ValueError, match="detections have shape"):
            evaluate(truth_of([[0, 0, 9, 9]]), np.ones(shape), backend=backend)

    @pytest.mark.parametrize(("name", "value"), [("bbox", [[0, 0, np.nan, 9.0]]), ("area", [np.inf])])
    def test_ground_truth_that_is_not_finite(self, backend, name, value):
        truth = truth_of([[0, 0, 9, 9]])._replace(**{name: np.array(value)})
        with pytest.raises(UserError, match=f"annotation 0 .counted from 0, image 1. has {name}"):
            Scorer(truth, backend=backend)

    @pytest.mark.parametrize("name", ["image_ids", "category_ids", "ann_image_id", "ann_category_id"])
    @pytest.mark.parametrize("value", [-1, 2**53 + 1])
    def test_ground_truth_with_ids_out_of_range(self, backend, name, value):
        with pytest.raises(UserError, match=f"{name} holds {value}"):
            Scorer(truth_of([[0, 0, 9, 9]])._replace(**{name: np.array([value])}), backend=backend)

    @pytest.mark.parametrize("name", ["ann_category_id", "bbox", "area", "iscrowd"])
    def test_ground_truth_columns_of_different_lengths(self, backend, name):
        truth = truth_of([[0, 0, 9, 9]] * 2)
        with pytest.raises(ValueError, match=f"ground truth {name} has shape"):
            Scorer(truth._replace(**{name: getattr(truth, name)[:1]}), backend=backend)


class TestChoice:
    def test_auto_takes_hotcoco(self):
        assert Scorer(truth_of([[0, 0, 9, 9]])).backend == "hotcoco"

    def test_auto_falls_back_with_a_warning_and_equal_numbers(self, monkeypatch):
        truth, found = random_case(np.random.default_rng(3))
        fast = evaluate(truth, found)
        hide(monkeypatch, "hotcoco")
        with pytest.warns(RuntimeWarning, match="hotcoco cannot be imported"):
            slow = evaluate(truth, found)
        assert slow == near(fast)

    def test_hotcoco_asked_for_and_missing(self, monkeypatch):
        hide(monkeypatch, "hotcoco")
        with pytest.raises(UserError, match="pip install hotcoco"):
            Scorer(truth_of([[0, 0, 9, 9]]), backend="hotcoco")

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="'fast' is none of auto, hotcoco, pycocotools"):
            Scorer(truth_of([[0, 0, 9, 9]]), backend="fast")


def hide(monkeypatch, package):
    real = builtins.__import__

    def importer(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importer)
