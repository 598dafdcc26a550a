"""Average recall of proposals: against the definition written out, and against pycocotools where both say the same."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detcore import UserError
from detcore.evaluation.background import BackgroundEvaluator
from detcore.evaluation.coco import GroundTruth, evaluate

SIZES = {"": (0, 1e5**2), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e5**2)}


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """x, y, w, h in whole pixels, of all sizes, many of them overlapping; some without area."""
    return np.column_stack([rng.integers(0, 60, (count, 2)), rng.integers(0, rng.choice([20, 60, 200]), (count, 2))])


def case(seed: int) -> tuple[GroundTruth, np.ndarray]:
    """Images without truth or proposals, crowds, an annotation of an unknown image, areas that are not the box's."""
    rng = np.random.default_rng(seed)
    images, count, found = np.arange(5) * 7, int(rng.integers(0, 40)), int(rng.choice([0, 50, 900]))
    box = boxes(rng, count).astype(float)
    area = box[:, 2:].prod(1) * rng.choice([1, 0.6], count)
    of_image, of_category = rng.choice([*images[1:], 999], count), rng.choice([3, 9], count)
    truth = GroundTruth(images, np.array([3, 9]), of_image, of_category, box, area, (rng.random(count) < 0.2) * 1)
    near = boxes(rng, found).astype(float)
    if count and found:
        near[: found // 2] = (box[rng.integers(0, count, found // 2)] + rng.integers(-3, 4, (found // 2, 4))).clip(0)
    scores = rng.permutation(found) / 1000 + 0.001  # no ties, whose order neither fixes
    return truth, np.column_stack([rng.choice(images[:-1], found), near, scores, np.full(found, 3)])


def overlap(a: list[float], b: list[float]) -> float:
    """As the original has it: pixels counted one by one along each side."""
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    union = a[2] * a[3] + b[2] * b[3] - both
    return both / union if union else 0.0


def plain(truth: GroundTruth, proposals: np.ndarray, limit: int, size: str) -> float:
    least, most = SIZES[size]
    found, positives = [], 0
    for image in truth.image_ids:
        mine = (truth.ann_image_id == image) & (truth.iscrowd == 0) & (truth.area >= least) & (truth.area <= most)
        true, rows = truth.bbox[mine].tolist(), proposals[proposals[:, 0] == image]
        positives += len(true)
        rows = rows[np.argsort(-rows[:, 5], kind="stable")][:limit]
        pairs = {(i, j): overlap(t, row[1:5]) for i, t in enumerate(true) for j, row in enumerate(rows.tolist())}
        while pairs:
            i, j = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
            found.append(pairs[i, j])
            pairs = {pair: value for pair, value in pairs.items() if pair[0] != i and pair[1] != j}
    if not positives:
        return -1.0
    return float(np.mean([sum(value >= step / 20 for value in found) / positives for step in range(10, 20)]))


def recall_of(truth: GroundTruth, proposals: np.ndarray) -> dict[str, float]:
    return evaluate(truth, proposals, proposals=True)


@pytest.mark.parametrize("seed", range(12))
def test_the_definition_written_out(seed):
    truth, proposals = case(seed)
    wanted = {f"AR{size}@{limit}": plain(truth, proposals, limit, size) for limit in (100, 1000) for size in SIZES}
    assert recall_of(truth, proposals) == pytest.approx(wanted, abs=1e-12)


def test_a_proposal_finds_one_box_and_the_best_of_its_image():
    """Two boxes, one proposal on the first that overlaps the second as well; another image's proposals do not count."""
    box = np.array([[0, 0, 10, 10], [0, 0, 10, 8]], float)
    truth = GroundTruth(np.array([1, 2]), np.array([1]), np.array([1, 1]), np.array([1, 1]), box, np.full(2, 90.0),
                        np.zeros(2, np.uint8))  # fmt: skip
    one = [1, 0, 0, 10, 10, 0.5, 1]
    assert recall_of(truth, np.array([one], float))["AR@100"] == 0.5
    assert recall_of(truth, np.array([one, [2, 0, 0, 10, 8, 0.9, 1]], float))["AR@100"] == 0.5
    assert recall_of(truth, np.array([one, one], float))["AR@100"] == pytest.approx((1 + 0.7) / 2)  # .8 of it
    assert recall_of(truth, np.zeros((0, 7)))["AR@1000"] == 0.0


def test_only_the_best_scores_count():
    truth = GroundTruth(np.array([1]), np.array([1]), np.array([1]), np.array([1]), np.array([[0, 0, 10.0, 10]]),
                        np.array([100.0]), np.zeros(1, np.uint8))  # fmt: skip
    others = [[1, 500, 500, 5, 5, 0.5 + k / 1000, 1] for k in range(100)]
    found = recall_of(truth, np.array([[1, 0, 0, 10, 10, 0.1, 1], *others]))
    assert (found["AR@100"], found["AR@1000"], found["ARs@1000"], found["ARl@1000"]) == (0, 1, 1, -1)


def test_pycocotools_says_the_same_where_boxes_do_not_compete():
    """Without classes. Each box has proposals of its own, of which the best overlap has the best score."""
    rng = np.random.default_rng(1)
    annotations, results = [], []
    for number in range(300):
        image, x = number // 20 + 1, number % 20 * 200
        w, h = rng.uniform(5, 150, 2)
        one = {"id": number + 1, "image_id": image, "category_id": int(rng.integers(1, 4)), "iscrowd": 0}
        annotations.append(one | {"bbox": [x, 0.0, w, h], "area": w * h})
        least = rng.uniform(0, 0.9)  # so that some boxes have no proposal among the 100 of 160
        for part, score in zip(sorted(rng.uniform(0.3, 1, 8)), sorted(rng.uniform(least, 1, 8)), strict=True):
            results.append({"image_id": image, "category_id": 1, "bbox": [x, 0.0, w * part, h], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(1, 16)], "annotations": annotations,
                        "categories": [{"id": i} for i in (1, 2, 3)]}  # fmt: skip
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.params.useCats, scorer.params.maxDets = 0, [1, 100, 1000]
        scorer.evaluate()
        scorer.accumulate()
    columns = {key: np.array([one[key] for one in annotations]) for key in annotations[0]}
    truth = GroundTruth(np.arange(1, 16), np.array([1, 2, 3]), columns["image_id"], columns["category_id"],
                        columns["bbox"], columns["area"], columns["iscrowd"])  # fmt: skip
    rows = np.array([(r["image_id"], *r["bbox"], r["score"], r["category_id"]) for r in results])
    theirs, found = scorer.eval["recall"], recall_of(truth, rows)  # [thresholds, 1, areas, maxima]
    for at, limit in ((1, 100), (2, 1000)):
        for place, size in enumerate(("", "s", "m", "l")):
            assert found[f"AR{size}@{limit}"] == pytest.approx(theirs[:, 0, place, at].mean(), abs=1e-12)
    assert 0.5 < found["AR@100"] < found["AR@1000"] < 1


def test_an_evaluation_of_proposals_has_recalls_alone():
    truth, proposals = case(4)
    wanted = recall_of(truth, proposals)
    whole = wanted | {"per_class": {}, "per_class_by_iou": {}}
    assert evaluate(truth, proposals, per_class=True, proposals=True) == whole
    with BackgroundEvaluator(truth, proposals=True) as evaluator:
        assert evaluator.submit(proposals, per_class=True).wait(60) == whole
    proposals[0, 0] = 12345
    with pytest.raises(UserError, match="image_id 12345"):
        recall_of(truth, proposals)
