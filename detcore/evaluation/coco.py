"""From detections to the twelve COCO numbers.

The numbers are those of pycocotools' `COCOeval` for boxes. hotcoco, a Rust implementation that takes arrays,
computes them when it can be imported, and pycocotools itself when not; both run through the same lines here.

Treatments, the same for both libraries:

* Annotation ids play no part. pycocotools stores a match as the id of the annotation, so that an annotation with
  id 0 counts as never matched; annotations are therefore numbered from 1 here, whatever the file says.
* Annotations of an image or category that the file does not list are not scored, as in pycocotools.
* Detections of an unknown image or category are an error; pycocotools drops unknown categories silently and
  hotcoco both. So are NaN and infinite numbers, on either side: the libraries disagree about them.
* Image and category ids are whole numbers from 0 to 2**53, which is what a float64 column holds exactly.
* No detections at all is a result like any other (AP 0 where there is ground truth); pycocotools raises.
* Of the boxes of one image and category the 100 with the highest scores count; ties keep the order of the rows.
"""

import contextlib
import io
import warnings
from typing import Any, NamedTuple

import numpy as np

from detcore import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
BACKENDS = ("auto", "hotcoco", "pycocotools")
LARGEST_ID = 2**53


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
    ground_truth: GroundTruth, detections: np.ndarray, *, per_class: bool = False, backend: str = "auto"
) -> dict[str, Any]:
    """Score detections once. To score several sets against one ground truth, keep a `Scorer`.

    detections: float64 [D, 7], rows of image_id, x, y, w, h, score, category_id, as pycocotools'
    `loadNumpyAnnotations` takes them: ids of the annotation file, pixels of the original image, any order.
    backend: "hotcoco", "pycocotools", or "auto": hotcoco if it can be imported, else pycocotools with a warning.

    Returns the keys of `METRICS` as floats, -1.0 where there is no ground truth to compare with, and with
    `per_class` also "per_class": {category_id: AP}. Raises UserError for numbers or ids that cannot be scored,
    ValueError for an array of another shape.
    """
    return Scorer(ground_truth, backend=backend)(detections, per_class=per_class)


class Scorer:
    """One ground truth, checked and indexed once, and the library that scores against it.

    Arguments, result and errors as for `evaluate`.
    """

    def __init__(self, ground_truth: GroundTruth, *, backend: str = "auto") -> None:
        check_ground_truth(ground_truth)
        self.backend = _choose(backend)
        self._image_ids = np.unique(ground_truth.image_ids)
        self._category_ids = np.unique(ground_truth.category_ids)
        index = _hotcoco_index if self.backend == "hotcoco" else _pycocotools_index
        self._truth, self._coco_eval = index(self._image_ids, self._category_ids, ground_truth)

    def __call__(self, detections: np.ndarray, *, per_class: bool = False) -> dict[str, Any]:
        detections = _as_rows(detections)
        self._check_detections(detections)
        if self.backend == "hotcoco":
            run = self._coco_eval(self._truth, self._truth.load_res(detections), "bbox")
            run.evaluate()
            run.accumulate()
            run.summary_lines()
        else:
            # pycocotools reports its progress on the standard output, which belongs to the program's own log.
            with contextlib.redirect_stdout(io.StringIO()):
                run = self._coco_eval(self._truth, _pycocotools_results(self._truth, detections), "bbox")
                run.evaluate()
                run.accumulate()
                run.summarize()
        result: dict[str, Any] = {name: float(value) for name, value in zip(METRICS, run.stats, strict=True)}
        if per_class:
            result["per_class"] = self._per_class(np.asarray(run.eval["precision"]))
        return result

    def _per_class(self, precision: np.ndarray) -> dict[int, float]:
        """precision: float64 [T, R, K, A, M], -1 where a category has no ground truth; area "all", 100 boxes."""
        columns = precision[:, :, :, 0, -1]
        averages = {}
        for k, category_id in enumerate(self._category_ids.tolist()):
            values = columns[:, :, k]
            values = values[values > -1]
            averages[category_id] = float(values.mean()) if values.size else -1.0
        return averages

    def _check_detections(self, detections: np.ndarray) -> None:
        columns = ("image_id", "x", "y", "width", "height", "score", "category_id")
        for column, name in enumerate(columns):
            values = detections[:, column]
            known = {"image_id": self._image_ids, "category_id": self._category_ids}.get(name)
            bad = ~np.isfinite(values) if known is None else ~_is_in(values, known)
            if not bad.any():
                continue
            row = int(bad.argmax())
            where = (
                f"detection row {row} has {name} {values[row]:.17g}; {int(bad.sum())} of {len(values)} rows are such"
            )
            if known is None:
                raise UserError(f"{where}. Only finite numbers can be scored: the model has diverged or is damaged.")
            raise UserError(
                f"{where}. The annotation file lists {len(known)} {name}s and not this one: "
                "score against the file that the detections were made for."
            )


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


def _as_rows(detections: np.ndarray) -> np.ndarray:
    detections = np.asarray(detections, dtype=np.float64)
    if detections.ndim != 2 or detections.shape[1] != 7:
        raise ValueError(f"detections have shape {detections.shape}; [D, 7] is wanted, also for D = 0")
    return detections


def _is_in(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which of the float64 values are one of the ids (int64, ascending). np.isin would sort millions of values."""
    if not len(ids):
        return np.zeros(len(values), dtype=bool)
    ids = ids.astype(np.float64)
    return ids[np.searchsorted(ids, values).clip(max=len(ids) - 1)] == values


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
            f"hotcoco cannot be imported ({error}); pycocotools scores instead, equally but about 90 times slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return "pycocotools"
    return "hotcoco"


def _listed(image_ids: np.ndarray, category_ids: np.ndarray) -> tuple[list[dict], list[dict]]:
    categories = [{"id": category_id, "name": str(category_id)} for category_id in category_ids.tolist()]
    return [{"id": image_id} for image_id in image_ids.tolist()], categories


def _hotcoco_index(image_ids: np.ndarray, category_ids: np.ndarray, truth: GroundTruth) -> tuple[Any, type]:
    from hotcoco import COCO, COCOeval

    images, categories = _listed(image_ids, category_ids)
    columns = (truth.ann_image_id, truth.ann_category_id, truth.bbox)
    return COCO.from_arrays(images, categories, *columns, area=truth.area, iscrowd=truth.iscrowd), COCOeval


def _pycocotools_index(image_ids: np.ndarray, category_ids: np.ndarray, truth: GroundTruth) -> tuple[Any, type]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, categories = _listed(image_ids, category_ids)
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    columns = (column.tolist() for column in truth[2:])
    annotations = [
        {"id": number, **dict(zip(names, values, strict=True))}
        for number, values in enumerate(zip(*columns, strict=True), start=1)
    ]
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, COCOeval


def _pycocotools_results(truth: Any, detections: np.ndarray) -> Any:
    if len(detections):
        return truth.loadRes(detections)
    empty = type(truth)()  # loadRes looks at the first detection and fails when there is none
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty
