"""AP of masks against pycocotools itself, fed as its users feed it; and masks as arrays."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detcore.evaluation.background import BackgroundEvaluator
from detcore.evaluation.coco import METRICS, SEGM_METRICS, GroundTruth, Scorer, evaluate
from detcore.evaluation.rle import Rles

BACKENDS = ("hotcoco", "pycocotools")
near = pytest.approx


def encoded(bitmaps: list[np.ndarray]) -> Rles:
    return Rles.of([coco_mask.encode(np.asfortranarray(bitmap)) for bitmap in bitmaps])


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A rectangle with a corner cut out; now and then nothing, a pixel, or everything."""
    found = np.zeros((height, width), np.uint8)
    kind = rng.integers(0, 12)
    y, x = rng.integers(0, height), rng.integers(0, width)
    if kind == 0:
        found[:] = rng.integers(0, 2)
    elif kind == 1:
        found[y, x] = 1
    else:
        high, wide = rng.integers(1, max(2, height // 2), 2), rng.integers(1, max(2, width // 2), 2)
        found[y : y + high[0], x : x + wide[0]] = 1
        found[y : y + high[1] // 2, x : x + wide[1] // 2] = 0
    return found


def random_case(seed: int) -> tuple[GroundTruth, Rles, np.ndarray, Rles]:
    """Images of two sizes, crowds, ties, all ranges of areas, images and categories without truth."""
    rng = np.random.default_rng(seed)
    images, categories = rng.choice(2**40, 6, replace=False), rng.choice(300, 3, replace=False)
    sizes = [(20, 30), (150, 120)]
    size_of = {int(image): sizes[k % 2] for k, image in enumerate(images)}
    count, found = int(rng.integers(0, 40)), int(rng.choice([0, 30, 150, 350]))
    of_image = rng.choice(images[:-1], count)
    true = [blob(rng, *size_of[int(image)]) for image in of_image]
    area = np.array([bitmap.sum() for bitmap in true], float).reshape(-1)
    if seed % 3 == 1:
        area = area * rng.uniform(0.5, 20, count)
    elif seed % 3 == 2:
        area = rng.choice([0, 1023.999, 1024, 1024.001, 9216, 9216.1, 1e11], count)
    bbox = rng.uniform(0, 20, (count, 4))
    crowd = (rng.random(count) < 0.2).astype(np.uint8)
    of_category = rng.choice(categories[:-1], count)
    truth = GroundTruth(np.sort(images), np.sort(categories), of_image, of_category, bbox, area, crowd)
    image, category = rng.choice(images, found), rng.choice(categories, found)
    masks = []
    for k in range(found):
        if count and rng.random() < 0.7:
            source = int(rng.integers(count))
            image[k], category[k] = of_image[source], of_category[source]
            masks.append(np.roll(true[source], rng.integers(-1, 3), int(rng.integers(2))))
        else:
            masks.append(blob(rng, *size_of[int(image[k])]))
    score = rng.choice([0.1, 0.5, 0.5, 0.9], found) if seed % 2 else rng.random(found)
    rows = np.column_stack([image, rng.uniform(0, 9, (found, 4)), score, category]).astype(np.float64)
    return truth, encoded(true), rows, encoded(masks)


def oracle(truth: GroundTruth, true: Rles, rows: np.ndarray, masks: Rles) -> dict[str, float]:
    """The twelve numbers of COCOeval, from dictionaries with masks and no boxes."""
    annotations = [
        {
            "id": k + 1, "image_id": int(truth.ann_image_id[k]), "category_id": int(truth.ann_category_id[k]),
            "segmentation": rle, "area": float(truth.area[k]), "iscrowd": int(truth.iscrowd[k]),
        }
        for k, rle in enumerate(true.dictionaries())
    ]  # fmt: skip
    results = [
        {"image_id": int(row[0]), "category_id": int(row[6]), "score": float(row[5]), "segmentation": rle}
        for row, rle in zip(rows, masks.dictionaries(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(i), "height": 1, "width": 1} for i in truth.image_ids],
            "categories": [{"id": int(i)} for i in truth.category_ids],
            "annotations": annotations,
        }
        coco.createIndex()
        found = COCO()
        found.dataset = {**coco.dataset, "annotations": []}
        found.createIndex()
        run = COCOeval(coco, coco.loadRes(results) if results else found, "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(SEGM_METRICS, run.stats, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(24))
def test_equals_pycocotools(seed, backend):
    truth, true, rows, masks = random_case(seed)
    got = evaluate(truth, rows, backend=backend, masks=(true, masks))
    assert {name: got[name] for name in SEGM_METRICS} == near(oracle(truth, true, rows, masks), abs=1e-9, rel=0)
    assert {name: got[name] for name in METRICS} == evaluate(truth, rows, backend=backend), "boxes as without masks"


def test_groups_of_categories_are_the_whole():
    truth, true, rows, masks = random_case(6)
    assert len(rows) > 100
    parts = Scorer(truth, masks=true, rows_at_once=40)(rows, masks=masks)
    assert parts == near(Scorer(truth, masks=true)(rows, masks=masks), abs=1e-12)


def test_perfect_masks_with_poor_boxes_tell_the_two_apart():
    rng = np.random.default_rng(1)
    bitmaps = [blob(rng, 60, 60) for _ in range(20)]
    bitmaps = [bitmap for bitmap in bitmaps if bitmap.any()]
    n = len(bitmaps)
    area = np.array([bitmap.sum() for bitmap in bitmaps], float)
    ids, one = np.arange(n), np.ones(n, int)
    truth = GroundTruth(ids, one[:1], ids, one, np.tile([0.0, 0, 9, 9], (n, 1)), area, np.zeros(n, np.uint8))
    rows = np.column_stack([np.arange(n), np.tile([30.0, 30, 9, 9], (n, 1)), np.ones(n), np.ones(n)])
    got = evaluate(truth, rows, masks=(encoded(bitmaps), encoded(bitmaps)))
    assert got["AP"] == 0 and got["segm_AP"] == near(1) and got["segm_AP50"] == near(1)


def test_the_background_process_scores_both():
    truth, true, rows, masks = random_case(8)
    assert len(rows) and len(true.counts)
    wanted = evaluate(truth, rows, per_class=True, masks=(true, masks))
    with BackgroundEvaluator(truth, masks=true) as evaluator:
        pending = [
            evaluator.submit(rows, per_class=True, masks=masks),
            evaluator.submit(rows[:0], masks=masks.take(rows[:0, 0] > 0)),
        ]
        assert pending[0].wait(300) == wanted
        assert pending[1].wait(300)["segm_AP"] in (0.0, -1.0)


def test_masks_that_do_not_belong_are_refused():
    truth, true, rows, masks = random_case(8)
    for given in (None, masks.take(np.arange(3))):
        with pytest.raises(ValueError, match="one each"):
            Scorer(truth, masks=true)(rows, masks=given)
    with pytest.raises(ValueError, match="one each"):
        Scorer(truth)(rows, masks=masks)
    with pytest.raises(ValueError, match="annotations"):
        Scorer(truth, masks=masks)
    known = np.flatnonzero(np.isin(rows[:, 0], truth.ann_image_id))[0]
    wrong = masks.sizes.copy()
    wrong[known] += 1
    with pytest.raises(ValueError, match=f"detection row {known} has a mask of"):
        Scorer(truth, masks=true)(rows, masks=masks._replace(sizes=wrong))


def test_masks_as_arrays():
    rng = np.random.default_rng(3)
    dictionaries = [coco_mask.encode(np.asfortranarray(blob(rng, 17, 9))) for _ in range(30)]
    rles = Rles.of(dictionaries)
    assert rles.dictionaries() == dictionaries
    assert Rles.of([{**one, "counts": one["counts"].decode()} for one in dictionaries]).dictionaries() == dictionaries
    order = rng.permutation(30)[:12]
    assert rles.take(order).dictionaries() == [dictionaries[k] for k in order]
    assert rles.areas.tolist() == [coco_mask.decode(one).sum() for one in dictionaries]
    assert rles.take(order).areas.tolist() == rles.areas[order].tolist()
    chosen = rng.random(30) < 0.4
    assert rles.take(chosen).dictionaries() == [one for one, kept in zip(dictionaries, chosen, strict=True) if kept]
    joined = Rles.joined([rles.take(order), Rles.of([]), rles])
    assert joined.dictionaries() == [*(dictionaries[k] for k in order), *dictionaries]
    assert Rles.of([]).dictionaries() == Rles.joined([]).dictionaries() == [] and Rles.of([]).sizes.shape == (0, 2)
