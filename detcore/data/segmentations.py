"""The masks of a COCO annotation file: polygons, RLE and bitmaps as edges to train with, or as RLE to score against.

An edge is a straight line of a mask's outline. A point is inside a part of a mask if a ray from it crosses an odd
number of the part's edges; a mask is the union of its parts. A polygon is a part. An RLE or a bitmap is one part, holes
included: the boundary between the pixels inside and outside. Rasterisation looks at the middles of pixel columns
(`detcore.ops.mask_targets`), which an edge straight down never crosses, so those are left out.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from detcore import UserError

EDGES, RLE = "edges", "rle"
KINDS = (EDGES, RLE)
"""What an index keeps of the masks: EDGES to train with, RLE to score against."""


class Runs(Struct, gc=False):
    """COCO's RLE: size (height, width); counts of pixels outside and inside in turn, column after column, or their
    text."""

    size: tuple[int, int]
    counts: str | list[int]


Segmentation = list[list[float]] | Runs | None


SHORT = "polygons under three points left out"
OUTSIDE = "masks wholly outside of their image"
BARE = {EDGES: "boxes without a mask left out", RLE: "annotations scored as empty masks"}
"""Without a polygon, RLE or bitmap; of those to train with also ones whose outline has no width."""


class Masks(NamedTuple):
    """The masks of n annotations. columns: see `masks`. treated: the annotations, from 0, of SHORT, OUTSIDE and BARE,
    once for each polygon of SHORT."""

    columns: dict[str, np.ndarray]
    treated: dict[str, list[int]]


def masks(
    kind: str, segmentations: Sequence[Segmentation], sizes: np.ndarray, refuse: Callable[[int, str], UserError]
) -> Masks:
    """The masks of annotations, as `kind` (of KINDS) says.

    sizes: int [n, 2] height and width of each one's image. refuse(k, words): the error of annotation k.
    EDGES: columns edges float32 [T, 4] (x1, y1, x2, y2 in pixels of the image), edge_parts int32 [T] and edge_counts
    int64 [n], edges of each annotation. RLE: columns rle_text uint8 [T] and rle_counts int64 [n], letters of each.
    Raises UserError for polygons with an odd number of coordinates or ones that float32 does not hold, and for RLE of
    another size than the image or whose counts do not sum to it.
    """
    polygons: list[list[list[float]]] = []
    runs: dict[int, np.ndarray] = {}
    short: list[int] = []
    for k, (one, (height, width)) in enumerate(zip(segmentations, sizes.tolist(), strict=True)):
        parts: list[list[float]] = []
        if isinstance(one, Runs):
            runs[k] = _checked_runs(one, height, width, lambda words, k=k: refuse(k, words))
        elif one and _is_bitmap(one, height, width):
            runs[k] = _runs_of(np.array(one, np.uint8))
        elif one:
            odd = next((part for part in one if len(part) % 2), None)
            if odd is not None:
                raise refuse(k, f"has a polygon of {len(odd)} numbers; x and y come in pairs")
            parts = [part for part in one if len(part) >= 6]
            short += [k] * (len(one) - len(parts))
        polygons.append(parts)
    columns = (_edges if kind == EDGES else _rles)(polygons, runs, sizes, refuse)
    if kind == EDGES:
        bare = np.flatnonzero(columns["edge_counts"] == 0).tolist()
    else:
        bare = [k for k, parts in enumerate(polygons) if not parts and k not in runs]
    return Masks(columns, {SHORT: short, OUTSIDE: _outside(polygons, sizes), BARE[kind]: bare})


def _outside(polygons: list[list[list[float]]], sizes: np.ndarray) -> list[int]:
    """The annotations each of whose polygons lies beyond a side of its image, height and width."""
    of = np.repeat(np.arange(len(polygons)), [len(parts) for parts in polygons])
    if not len(of):
        return []
    flat = list(chain.from_iterable(polygons))
    points = np.fromiter(chain.from_iterable(flat), np.float64).reshape(-1, 2)
    lengths = np.array([len(part) // 2 for part in flat])
    starts = np.cumsum(lengths) - lengths
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    within = ((high > 0) & (low < sizes[of][:, ::-1])).all(1)
    return np.setdiff1d(of, of[within]).tolist()


def _is_bitmap(rows: list[list[float]], height: int, width: int) -> bool:
    """Whether a list of lists is not polygons, but `height` rows of `width` zeros and ones."""
    return len(rows) == height and all(len(row) == width and set(row) <= {0, 1} for row in rows)


def _runs_of(bitmap: np.ndarray) -> np.ndarray:
    """int64: the counts of a bitmap [h, w]."""
    down = bitmap.ravel(order="F")
    changes = np.flatnonzero(np.diff(down, prepend=0))
    return np.diff(np.concatenate([[0], changes, [len(down)]]))


def _checked_runs(one: Runs, height: int, width: int, refuse: Callable[[str], UserError]) -> np.ndarray:
    """int64: the counts of an RLE of the image's size."""
    if tuple(one.size) != (height, width):
        raise refuse(
            f"has an RLE of {one.size[0]} x {one.size[1]} (height, width), but its image has {height} x {width}"
        )
    counts = np.array(one.counts, np.int64) if isinstance(one.counts, list) else _counts_of(one.counts)
    if (counts < 0).any() or counts.sum() != height * width:
        raise refuse(
            f"has an RLE whose counts sum to {counts.sum():,} and are at least {counts.min(initial=0):,}; they must "
            f"sum to the {height * width:,} pixels of the image, none below 0"
        )
    return counts


def _counts_of(text: str) -> np.ndarray:
    """int64: the counts of COCO's RLE text: six bits a letter from '0' on, five of a number and one if it goes on; from
    the fourth number on each is the difference to the one two before."""
    letters = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(letters):
        return letters
    ends = np.flatnonzero((letters & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if len(ends) == 0 or ends[-1] != len(letters) - 1 or (ends - starts > 11).any() or (letters >> 6).any():
        return np.array([-1])  # no such text: the numbers do not add up
    place = np.arange(len(letters)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((letters & 0x1F) << 5 * place, starts)
    values -= np.where(letters[ends] & 0x10, np.int64(1) << 5 * (ends - starts + 1), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _edges(
    polygons: list[list[list[float]]], runs: dict[int, np.ndarray], sizes: np.ndarray, refuse: Callable
) -> dict[str, np.ndarray]:
    of = np.repeat(np.arange(len(polygons)), [len(parts) for parts in polygons])
    flat = list(chain.from_iterable(polygons))
    lengths = np.array([len(part) // 2 for part in flat], np.int64)
    with np.errstate(over="ignore"):
        values = np.fromiter(chain.from_iterable(flat), np.float64, 2 * lengths.sum()).astype(np.float32)
    points = values.reshape(-1, 2)
    if not np.isfinite(points).all():
        k = int(np.repeat(of, lengths)[(~np.isfinite(points)).any(1).argmax()])
        raise refuse(k, "has a polygon with numbers beyond those of 32 bits")
    starts = np.cumsum(lengths) - lengths
    following = np.arange(1, len(points) + 1)
    following[starts + lengths - 1] = starts
    found = [np.concatenate([points, points[following]], 1)]
    owners = [np.repeat(of, lengths)]
    first = np.cumsum([0] + [len(parts) for parts in polygons])[:-1]
    parts = [np.repeat(np.arange(len(flat)) - first[of], lengths)]
    for k, counts in runs.items():
        boundary = run_edges(counts, int(sizes[k, 0]))
        found.append(boundary)
        owners.append(np.full(len(boundary), k))
        parts.append(np.zeros(len(boundary), np.int64))
    edges, owner, part = np.concatenate(found), np.concatenate(owners), np.concatenate(parts)
    kept = np.flatnonzero(edges[:, 0] != edges[:, 2])
    kept = kept[np.argsort(owner[kept], kind="stable")]
    return {
        "edges": edges[kept],
        "edge_parts": part[kept].astype(np.int32),
        "edge_counts": np.bincount(owner[kept], minlength=len(polygons)),
    }


def run_edges(counts: np.ndarray, height: int) -> np.ndarray:
    """float32 [e, 4]: the level edges between the pixels inside and outside of an RLE's counts, int64."""
    ends = np.cumsum(counts)
    begin, end = ends[: len(counts) // 2 * 2 : 2], ends[1::2]
    begin, end = begin[end > begin], end[end > begin]
    first, last = begin // height, (end - 1) // height
    columns = last - first + 1
    run = np.repeat(np.arange(len(begin)), columns)
    x = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(columns) - columns, columns)
    top = np.where(x == first[run], begin[run] % height, 0)
    bottom = np.where(x == last[run], end[run] - last[run] * height, height)
    across, down = np.concatenate([x, x]), np.concatenate([top, bottom])
    order = np.lexsort((across, down))
    across, down = across[order], down[order]
    new = np.ones(len(across), bool)  # edges of neighbouring columns at the same height are one
    new[1:] = (down[1:] != down[:-1]) | (across[1:] != across[:-1] + 1)
    starts = np.flatnonzero(new)
    stops = np.concatenate([starts[1:], [len(across)]])[: len(starts)] - 1
    return np.stack([across[starts], down[starts], across[stops] + 1, down[starts]], 1).astype(np.float32)


def _rles(
    polygons: list[list[list[float]]], runs: dict[int, np.ndarray], sizes: np.ndarray, refuse: Callable
) -> dict[str, np.ndarray]:
    from pycocotools import mask

    texts = []
    for k, (parts, size) in enumerate(zip(polygons, sizes.tolist(), strict=True)):
        if parts:
            texts.append(mask.merge(mask.frPyObjects(parts, *size))["counts"])
        else:  # nothing where there is no mask: all pixels are outside
            counts = runs.get(k, np.array([size[0] * size[1]]))
            texts.append(mask.frPyObjects({"size": size, "counts": counts.tolist()}, *size)["counts"])
    letters = np.frombuffer(b"".join(texts), np.uint8)
    return {"rle_text": letters, "rle_counts": np.array([len(text) for text in texts], np.int64)}


def empty(kind: str) -> dict[str, np.ndarray]:
    """The columns of no annotation."""
    return masks(kind, [], np.empty((0, 2), np.int64), lambda k, words: UserError(words)).columns


def annotation_type(base: type) -> Any:
    """A type of annotations, with its segmentation."""
    return msgspec.defstruct("Annotation", [("segmentation", Segmentation, None)], bases=(base,), gc=False)
