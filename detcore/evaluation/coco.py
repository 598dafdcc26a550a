"""From detections to the twelve COCO numbers, of boxes and of masks.

The numbers are those of pycocotools' `COCOeval`, of types bbox and segm. hotcoco, a Rust implementation that takes
arrays, computes them when it can be imported, and pycocotools itself when not; both run through the same lines here.

Treatments, the same for both libraries:

* Annotation ids play no part. pycocotools stores a match as the id of the annotation, so that an annotation with
  id 0 counts as never matched; annotations are therefore numbered from 1 here, whatever the file says.
* Annotations of an image or category that the file does not list are not scored, as in pycocotools.
* Detections of an unknown image or category are an error; pycocotools drops unknown categories silently and
  hotcoco both. So are NaN and infinite numbers, on either side: the libraries disagree about them.
* Image and category ids are whole numbers from 0 to 2**53, which is what a float64 column holds exactly.
* No detections at all is a result like any other (AP 0 where there is ground truth); pycocotools raises.
* The area of a detected mask is the number of its pixels, as where pycocotools gets results without a bbox.
* Of the boxes of one image and category the 100 with the highest scores count; ties keep the order of the rows.
"""

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from detcore import UserError
from detcore.evaluation.proposals import average_recall
from detcore.evaluation.rle import Rles
from detcore.evaluation.waymo import check_categories, summarize

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SEGM_METRICS = tuple(f"segm_{name}" for name in METRICS)
BACKENDS = ("auto", "hotcoco", "pycocotools")
COLUMNS = ("image_id", "x", "y", "width", "height", "score", "category_id")  # of a row of detections
LARGEST_ID = 2**53

# What COCOeval works with when nothing is changed; both libraries return their arrays in this order.
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
AREAS = ("all", "s", "m", "l")
MAX_DETECTIONS = (1, 10, 100)


class GroundTruth(NamedTuple):
    """What the detections are compared with: every annotation of one COCO file, as columns.

    Boxes are in pixels of the original image, top-left corner first; `area` is the file's own area, which
    for a mask is not the box's. Annotation ids are left out on purpose (see the module).
    """

    image_ids: np.ndarray  # int64 [I], every image that counts, also those without annotations
    category_ids: np.ndarray  # int64 [K], every category that may be detected, the file's ids
    ann_image_id: np.ndarray  # int64 [B]
    ann_category_id: np.ndarray  # int64 [B]
    bbox: np.ndarray  # float64 [B, 4] x, y, w, h
    area: np.ndarray  # float64 [B]
    iscrowd: np.ndarray  # uint8 [B]


def evaluate(
    ground_truth: GroundTruth,
    detections: np.ndarray,
    *,
    per_class: bool = False,
    backend: str = "auto",
    waymo: bool = False,
    masks: tuple[Rles, Rles] | None = None,
    proposals: bool = False,
) -> dict[str, Any]:
    """Score detections once. To score several sets against one ground truth, keep a `Scorer`.

    detections: float64 [D, 7], rows of image_id, x, y, w, h, score, category_id, as pycocotools'
    `loadNumpyAnnotations` takes them: ids of the annotation file, pixels of the original image, any order.
    backend: "hotcoco", "pycocotools", or "auto": hotcoco if it can be imported, else pycocotools with a warning.
    masks: of the ground truth and of the detections, in their order. proposals: the detections have no class.

    Returns the keys of `METRICS` as floats, -1.0 where there is no ground truth to compare with, and with
    `per_class` also "per_class": {category_id: AP} and "per_class_by_iou": {category_id: AP at each of THRESHOLDS}, of
    which a benchmark makes metrics of its own; with `waymo` also those of `detcore.evaluation.waymo`; with masks also
    the keys of `SEGM_METRICS`, the same numbers of the masks. Of proposals those of
    `detcore.evaluation.proposals.average_recall` instead, and no class has a number.
    Raises UserError for numbers or ids that cannot be scored, ValueError for an array of another shape.
    """
    true_masks, found_masks = masks or (None, None)
    scorer = Scorer(ground_truth, backend=backend, waymo=waymo, masks=true_masks, proposals=proposals)
    return scorer(detections, per_class=per_class, masks=found_masks)


class Scorer:
    """One ground truth, checked once, and the library that scores against it.

    Arguments, result and errors as for `evaluate`; with masks, each set of detections must have some. `rows_at_once`
    bounds the memory: with more detections than that the categories, which COCOeval treats one by one, are scored in
    groups of about so many detections each.
    """

    def __init__(
        self, ground_truth: GroundTruth, *, backend: str = "auto", waymo: bool = False, rows_at_once: int = 1_000_000,
        masks: Rles | None = None, proposals: bool = False,
    ) -> None:  # fmt: skip
        check_ground_truth(ground_truth)
        if masks and len(masks.counts) != len(ground_truth.bbox):
            raise ValueError(f"{len(masks.counts)} masks for {len(ground_truth.bbox)} annotations")
        if waymo:
            check_categories(ground_truth.category_ids)
        self._waymo, self._proposals = waymo, proposals
        self.backend = _choose(backend)
        self._rows_at_once = rows_at_once
        self._truth, self._masks = ground_truth, masks
        self._image_ids = np.unique(ground_truth.image_ids)
        self._category_ids = np.unique(ground_truth.category_ids)

    def __call__(self, detections: np.ndarray, *, per_class: bool = False, masks: Rles | None = None) -> dict[str, Any]:
        detections = np.asarray(detections, dtype=np.float64)
        if detections.ndim != 2 or detections.shape[1] != 7:
            raise ValueError(f"detections have shape {detections.shape}; [D, 7] is wanted, also for D = 0")
        if (masks is None) != (self._masks is None) or (masks and len(masks.counts) != len(detections)):
            raise ValueError("detections have masks if the ground truth has, one each")
        self._check_numbers(detections)
        self._positions(detections, "image_id", self._image_ids)
        position = self._positions(detections, "category_id", self._category_ids)
        if self._proposals:
            classless = {"per_class": {}, "per_class_by_iou": {}} if per_class else {}
            return self._recall(detections) | classless
        precision, recall = self._score(detections, position, None)
        result: dict[str, Any] = _summarize(precision, recall)
        if per_class:
            every = [(i, precision[:, :, k, 0, -1]) for k, i in enumerate(self._category_ids.tolist())]
            result["per_class"] = {i: _mean(values) for i, values in every}
            result["per_class_by_iou"] = {i: [_mean(at_one) for at_one in values] for i, values in every}
        if self._waymo:
            result |= summarize(precision, self._category_ids, THRESHOLDS)
        if masks:
            self._check_sizes(detections, masks)
            of_masks = _summarize(*self._score(detections, position, masks))
            result |= {f"segm_{name}": value for name, value in of_masks.items()}
        return result

    def _recall(self, proposals: np.ndarray) -> dict[str, float]:
        truth = self._truth
        real = (truth.iscrowd == 0) & np.isin(truth.ann_image_id, self._image_ids)
        return average_recall(proposals, truth.ann_image_id[real], truth.bbox[real], truth.area[real])

    def _score(self, detections: np.ndarray, position: np.ndarray, masks: Rles | None) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall as `_summarize` takes them, of boxes or of masks. position: of each row's category."""
        run = _run_hotcoco if self.backend == "hotcoco" else _run_pycocotools
        precision = np.full((len(THRESHOLDS), 101, len(self._category_ids), len(AREAS), len(MAX_DETECTIONS)), -1.0)
        recall = np.full((len(THRESHOLDS), *precision.shape[2:]), -1.0)
        group = np.bincount(position, minlength=len(self._category_ids)).cumsum() // self._rows_at_once
        for number in np.unique(group):
            members = np.flatnonzero(group == number)
            whole = len(members) == len(group)
            kept = slice(None) if whole else np.flatnonzero(group[position] == number)
            truth, true_masks = self._part(members)
            pair = (true_masks, masks if whole else masks.take(kept)) if masks else None
            precision[:, :, members], recall[:, members] = run(truth, detections[kept], pair)
        return precision, recall

    def _check_sizes(self, detections: np.ndarray, masks: Rles) -> None:
        """ValueError where a mask has another size than the true ones of its image: such never overlap."""
        images, first = np.unique(self._truth.ann_image_id, return_index=True)
        at = np.searchsorted(images, detections[:, 0]).clip(max=max(len(images) - 1, 0))
        known = images[at] == detections[:, 0] if len(images) else np.zeros(len(detections), bool)
        wrong = known & (masks.sizes != self._masks.sizes[first][at]).any(1) if len(images) else known
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"detection row {row} has a mask of {masks.sizes[row].tolist()} pixels (height, width), but those of "
                f"image {detections[row, 0]:.17g} have {self._masks.sizes[first][at][row].tolist()}"
            )

    def _part(self, members: np.ndarray) -> tuple[GroundTruth, Rles | None]:
        """The ground truth of some of the categories, with all the images, and its masks."""
        category_ids = self._category_ids[members]
        kept = np.isin(self._truth.ann_category_id, category_ids)
        truth = GroundTruth(self._image_ids, category_ids, *(column[kept] for column in self._truth[2:]))
        return truth, self._masks.take(kept) if self._masks else None

    @staticmethod
    def _check_numbers(detections: np.ndarray) -> None:
        bad = ~np.isfinite(detections[:, 1:6])
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            column = int(bad[row].argmax())
            raise UserError(
                f"detection row {row} (image {detections[row, 0]:.17g}) has {COLUMNS[column + 1]} "
                f"{detections[row, column + 1]}; {int(bad.any(axis=1).sum())} of {len(bad)} rows are such. "
                "Only finite numbers can be scored: the model has diverged or its weights are damaged."
            )

    @staticmethod
    def _positions(detections: np.ndarray, name: str, ids: np.ndarray) -> np.ndarray:
        """Where each row's id stands among the ids (ascending). UserError for one that is not there."""
        values = detections[:, COLUMNS.index(name)]
        exact = ids.astype(np.float64)
        position = np.searchsorted(exact, values).clip(max=max(len(ids) - 1, 0))
        bad = exact[position] != values if len(ids) else np.ones(len(values), dtype=bool)
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"detection row {row} has {name} {values[row]:.17g}, one of {int(bad.sum())} such rows of {len(bad)}. "
                f"The annotation file lists {len(ids)} {name}s and not this one: score against the file that the "
                "detections were made for."
            )
        return position


def detected_only(ground_truth: GroundTruth, detections: np.ndarray, score: float = 0.001) -> GroundTruth:
    """The ground truth of the images that have a detection of at least this score; the rest is left out.

    What NVIDIA's EfficientDet scores: an image where the model finds nothing costs it nothing, so that results are too
    good and cannot be compared with others. For comparisons with its published numbers only.
    """
    kept_ids = np.unique(detections[detections[:, 5] >= score, 0])
    kept = np.isin(ground_truth.ann_image_id, kept_ids)
    image_ids = ground_truth.image_ids[np.isin(ground_truth.image_ids, kept_ids)]
    return GroundTruth(image_ids, ground_truth.category_ids, *(column[kept] for column in ground_truth[2:]))


def check_ground_truth(ground_truth: GroundTruth) -> None:
    """Raise ValueError if the columns do not fit together, UserError if an id or a number cannot be scored."""
    count = len(ground_truth.ann_image_id)
    for name in ("ann_category_id", "area", "iscrowd"):
        if getattr(ground_truth, name).shape != (count,):
            raise ValueError(f"ground truth {name} has shape {getattr(ground_truth, name).shape}, not ({count},)")
    if ground_truth.bbox.shape != (count, 4):
        raise ValueError(f"ground truth bbox has shape {ground_truth.bbox.shape}, not ({count}, 4)")
    for name in ("image_ids", "category_ids", "ann_image_id", "ann_category_id"):
        ids = getattr(ground_truth, name)
        bad = (ids < 0) | (ids > LARGEST_ID)
        if bad.any():
            raise UserError(f"{name} holds {ids[bad.argmax()]}: ids must be from 0 to 2**53; renumber the file's ids.")
    for name, values in (("bbox", ground_truth.bbox), ("area", ground_truth.area[:, None])):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"annotation {row} (counted from 0, image {ground_truth.ann_image_id[row]}) has {name} "
                f"{values[row].tolist()}: it must be finite; correct or remove it in the annotation file."
            )


def _choose(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"evaluation backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "pycocotools":
        return backend
    try:
        import hotcoco  # noqa: F401
    except ImportError as error:
        if backend == "hotcoco":
            raise UserError(f"hotcoco cannot be imported ({error}): pip install hotcoco") from error
        warnings.warn(
            f"hotcoco cannot be imported ({error}); pycocotools scores instead: the same numbers, far slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return "pycocotools"
    return "hotcoco"


def _mean(values: np.ndarray) -> float:
    """-1 marks what has no ground truth, here as in COCOeval."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _summarize(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """precision [T, R, K, A, M] and recall [T, K, A, M] over thresholds, recall points, categories, areas, maxima."""
    threshold = {"AP50": [THRESHOLDS.index(0.5)], "AP75": [THRESHOLDS.index(0.75)]}
    area = {name: AREAS.index(name[-1]) for name in METRICS if name[-1] in AREAS}
    most = {f"AR{count}": m for m, count in enumerate(MAX_DETECTIONS)}
    result = {}
    for name in METRICS:
        values = precision if name.startswith("AP") else recall
        values = values[threshold.get(name, slice(None))]
        result[name] = _mean(values[..., area.get(name, 0), most.get(name, -1)])
    return result


def _listed(truth: GroundTruth) -> tuple[list[dict], list[dict]]:
    categories = [{"id": category_id, "name": str(category_id)} for category_id in truth.category_ids.tolist()]
    return [{"id": image_id} for image_id in truth.image_ids.tolist()], categories


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Masks become some hundred thousand dictionaries, which Python's collector would look through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def _run_hotcoco(
    truth: GroundTruth, detections: np.ndarray, masks: tuple[Rles, Rles] | None
) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    true_masks, found_masks = (part.dictionaries() for part in masks) if masks else (None, None)
    columns = (truth.ann_image_id, truth.ann_category_id, truth.bbox)
    coco = COCO.from_arrays(*_listed(truth), *columns, area=truth.area, iscrowd=truth.iscrowd, segmentation=true_masks)
    if masks and len(detections):  # the area of a row is that of its box, which counts for nothing else here
        detections = detections.copy()
        detections[:, 3], detections[:, 4] = masks[1].areas, 1
    run = COCOeval(coco, coco.load_res(detections, segmentation=found_masks), "segm" if masks else "bbox")
    run.evaluate()
    run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def _run_pycocotools(
    truth: GroundTruth, detections: np.ndarray, masks: tuple[Rles, Rles] | None
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, categories = _listed(truth)
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    columns = (column.tolist() for column in truth[2:])
    annotations = [
        {"id": number, **dict(zip(names, values, strict=True))}
        for number, values in enumerate(zip(*columns, strict=True), start=1)
    ]
    if masks:
        images = [{**image, "height": 0, "width": 0} for image in images]  # read, but used for polygons alone
        for annotation, rle in zip(annotations, masks[0].dictionaries(), strict=True):
            annotation["segmentation"] = rle
        detections = [
            {"image_id": int(row[0]), "category_id": int(row[6]), "score": float(row[5]), "segmentation": rle}
            for row, rle in zip(detections, masks[1].dictionaries(), strict=True)
        ]
    # It reports its progress on the standard output, which belongs to the program's own log.
    with contextlib.redirect_stdout(io.StringIO()):
        coco, found = COCO(), COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        if len(detections):
            found = coco.loadRes(detections)
        else:  # loadRes looks at the first detection and fails when there is none
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        run = COCOeval(coco, found, "segm" if masks else "bbox")
        run.evaluate()
        run.accumulate()
    return run.eval["precision"], run.eval["recall"]
