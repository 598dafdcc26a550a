"""What happens to an image on its way to the network: one affine map, a fill and colours, as arrays over a batch.

Training, evaluation, prediction and pictures use it alike; loaders execute it on pixels, and it moves boxes and the
edges of polygons in the same way. A recipe (`detcore.data.recipes`) makes it. Evaluation and prediction take fewer
kinds than loaders can execute: `View.scorable`.
"""

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """Of each of n images: which part is taken, mirrored or not, how large it becomes and where it lies on the canvas.

    windows: int64 [n, 4] x1, y1, x2, y2 of the part, in whole pixels of the original. mirrored: bool [n], left to
    right. sizes: int64 [n, 2] height and width that the part is scaled to. offsets: int64 [n, 2] y and x, on the
    canvas, of the scaled part's top left corner; what lies outside of the canvas, by a negative offset too, is cut off.
    `Batch.extent` is counted from the canvas's corner, so that only training can have offsets other than 0, of models
    that do not read the extent.
    canvas: (height, width) of all. fill: RGB, 0..255, of the canvas beside the part. colours: float32 [n, 3, 4], the
    maps of `augment.jitter`; None: as they are. cubic: bool [n], scaled by bicubic instead of bilinear interpolation;
    None: none is.
    """

    windows: np.ndarray
    mirrored: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    canvas: tuple[int, int]
    fill: tuple[int, int, int] = (0, 0, 0)
    colours: np.ndarray | None = None
    cubic: np.ndarray | None = None

    @property
    def extents(self) -> np.ndarray:
        """int64 [n, 2]: bottom and right end of the part on the canvas, in pixels."""
        return np.clip(self.offsets + self.sizes, 0, self.canvas)

    def scorable(self, sizes: np.ndarray | None = None) -> "View":
        """The view itself, if detections on its canvas can be scaled back to the original.

        That is done by `Batch.size / Batch.extent` from the top left corner of the canvas. So ValueError where a part
        lies elsewhere (a centred letterbox), is cut off or mirrored, or is not all of images of int64 [n, 2] height and
        width `sizes`; None: any part.
        """
        if self.offsets.any():
            found = self.offsets[self.offsets.any(1)][0].tolist()
            raise ValueError(
                f"a view of evaluation or prediction with offsets {found} (y, x): detections are scaled back from the "
                "top left corner of the canvas, so offsets must be 0; put the image there and the fill to its right "
                "and below, as `letterboxed` of detcore/data/recipes.py does"
            )
        if self.mirrored.any() or (self.sizes > self.canvas).any():
            raise ValueError("a view of evaluation or prediction neither mirrors images nor reaches past its canvas")
        if sizes is not None and (self.windows != whole(sizes)).any():
            raise ValueError("a view of evaluation shows whole images; only `predict_view` may take a part of them")
        return self

    def covers(self, k: int | np.ndarray) -> np.ndarray:
        """bool: whether part k is exactly the canvas: nothing cut off, no fill. k: one, or int64 [m]."""
        return (self.offsets[k] == 0).all(-1) & (self.sizes[k] == self.canvas).all(-1)

    def boxes(self, k: int | np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """float32 [m, 4] x1, y1, x2, y2: boxes of image k, in pixels of the original, on the canvas, not clipped.

        k: of all boxes, or int64 [m], of each one.
        """
        moved = self.edges(k, boxes)
        return np.where(self.mirrored[k, None], moved[:, [2, 1, 0, 3]], moved)

    def edges(self, k: int | np.ndarray, edges: np.ndarray) -> np.ndarray:
        """float32 [e, 4] x1, y1, x2, y2: both ends of edges of image k, in pixels of the original, on the canvas.

        k: as `boxes` has it.
        """
        x1, y1, x2, y2 = np.moveaxis(self.windows[k], -1, 0)
        (height, width), (top, left) = np.moveaxis(self.sizes[k], -1, 0), np.moveaxis(self.offsets[k], -1, 0)

        def twice(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.stack([x, y, x, y], -1).astype(np.float32)

        mirrored = self.mirrored[k]
        edges = (edges - twice(x1, y1)) * twice(np.where(mirrored, -1, 1), np.ones_like(y1))
        edges = edges + twice(np.where(mirrored, x2 - x1, 0), np.zeros_like(y1))
        return edges * twice(width / (x2 - x1), height / (y2 - y1)) + twice(left, top)

    def invert(self, k: int, boxes: np.ndarray) -> np.ndarray:
        """float64 [m, 4] x1, y1, x2, y2 in pixels of the original: boxes on the canvas of image k."""
        x1, y1, x2, y2 = self.windows[k].tolist()
        (height, width), (top, left) = self.sizes[k].tolist(), self.offsets[k].tolist()
        across, down = (x2 - x1) / width, (y2 - y1) / height
        boxes = (boxes - np.array([left, top, left, top])) * np.array([across, down, across, down])
        if self.mirrored[k]:
            boxes = np.stack([x2 - x1 - boxes[:, 2], boxes[:, 1], x2 - x1 - boxes[:, 0], boxes[:, 3]], 1)
        return boxes + np.array([x1, y1, x1, y1])


def whole(sizes: np.ndarray) -> np.ndarray:
    """int64 [n, 4]: the windows that take all of images of (height, width) sizes, int64 [n, 2]."""
    return np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], 1)
