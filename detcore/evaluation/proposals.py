"""Average recall of proposals, which have no class: what maskrcnn-benchmark's `evaluate_box_proposals` computes."""

import numpy as np

LIMITS = (100, 1000)  # proposals of an image that count, those with the highest scores
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}  # square pixels, ends included
THRESHOLDS = np.arange(10, 20) / 20


def average_recall(
    proposals: np.ndarray, of_image: np.ndarray, boxes: np.ndarray, areas: np.ndarray
) -> dict[str, float]:
    """AR@100, ARs@100, ARm@100, ARl@100 and the same @1000: the part of the true boxes that are found, mean over
    `THRESHOLDS` of overlap; of all sizes, small, medium and large. -1 where there are no such boxes.

    proposals: float64 [D, 7], rows of image_id, x, y, w, h, score, category_id, which is not looked at; any order.
    of_image [B], boxes [B, 4] x, y, w, h, areas [B]: the true boxes, without crowds. In an image the pair of a proposal
    and a true box that overlap most is taken, then the best of the others, and so on, so that a proposal finds one box
    at most.
    """
    proposals = proposals[np.lexsort((-proposals[:, 5], proposals[:, 0]))]
    order = np.argsort(of_image, kind="stable")
    images, first = np.unique(of_image[order], return_index=True)
    begin, stop = (np.searchsorted(proposals[:, 0], images, side) for side in ("left", "right"))
    found: dict[str, list[np.ndarray]] = {f"AR{area}@{limit}": [] for limit in LIMITS for area in AREAS}
    for n, mine in enumerate(np.split(order, first[1:])[: len(images)]):
        overlaps = _overlaps(boxes[mine], proposals[begin[n] : min(stop[n], begin[n] + max(LIMITS)), 1:5])
        for area, (least, most) in AREAS.items():
            counted = overlaps[(areas[mine] >= least) & (areas[mine] <= most)]
            for limit in LIMITS:
                found[f"AR{area}@{limit}"].append(_found(counted[:, :limit].copy()))
    recalls = {}
    for name, parts in found.items():
        every = np.concatenate(parts) if parts else np.zeros(0)
        recalls[name] = float((every[:, None] >= THRESHOLDS).mean()) if len(every) else -1.0
    return recalls


def _overlaps(truth: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union [G, P] of boxes x, y, w, h; 0 where both have no area."""
    low = np.maximum(truth[:, None, :2], boxes[None, :, :2])
    high = np.minimum(truth[:, None, :2] + truth[:, None, 2:], boxes[None, :, :2] + boxes[None, :, 2:])
    both = (high - low).clip(min=0).prod(2)
    union = truth[:, 2:].prod(1)[:, None] + boxes[:, 2:].prod(1) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _found(overlaps: np.ndarray) -> np.ndarray:
    """The overlap [G] of each true box with its own proposal, 0 without one. overlaps: [G, P], overwritten."""
    found = np.zeros(len(overlaps))
    for _ in range(min(overlaps.shape)):
        box, proposal = np.unravel_index(overlaps.argmax(), overlaps.shape)
        found[box] = overlaps[box, proposal]
        overlaps[box] = overlaps[:, proposal] = -1
    return found
