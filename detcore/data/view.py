"""What happens to an image on its way to the network: one affine map, a fill and colours, as arrays over a batch.

Training, evaluation, prediction and pictures use it alike; loaders execute it on pixels, and it moves boxes and the
edges of polygons in the same way. A recipe (`detcore.data.recipes`) makes it.
"""

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """Of each of n images: which part is taken, mirrored or not, how large it becomes and where it lies on the canvas.

    windows: int64 [n, 4] x1, y1, x2, y2 of the part, in whole pixels of the original. mirrored: bool [n], left to
    right. sizes: int64 [n, 2] height and width that the part is scaled to. offsets: int64 [n, 2] y and x, on the
    canvas, of the scaled part's top left corner; what lies outside of the canvas, by a negative offset too, is cut off.
    canvas: (height, width) of all. fill: RGB, 0..255, of the canvas beside the part. colours: float32 [n, 3, 4], the
    maps of `augment.jitter`; None: as they are.
    """

    windows: np.ndarray
    mirrored: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    canvas: tuple[int, int]
    fill: tuple[int, int, int] = (0, 0, 0)
    colours: np.ndarray | None = None

    @property
    def extents(self) -> np.ndarray:
        """int64 [n, 2]: bottom and right end of the part on the canvas, in pixels."""
        return np.clip(self.offsets + self.sizes, 0, self.canvas)

    def covers(self, k: int) -> bool:
        """Whether part k is exactly the canvas: nothing cut off, no fill."""
        return self.offsets[k].tolist() == [0, 0] and tuple(self.sizes[k].tolist()) == self.canvas

    def boxes(self, k: int, boxes: np.ndarray) -> np.ndarray:
        """float32 [m, 4] x1, y1, x2, y2: boxes of image k, in pixels of the original, on the canvas, not clipped."""
        moved = self.edges(k, boxes)
        return moved[:, [2, 1, 0, 3]] if self.mirrored[k] else moved

    def edges(self, k: int, edges: np.ndarray) -> np.ndarray:
        """float32 [e, 4] x1, y1, x2, y2: both ends of edges of image k, in pixels of the original, on the canvas."""
        x1, y1, x2, y2 = self.windows[k].tolist()
        (height, width), (top, left) = self.sizes[k].tolist(), self.offsets[k].tolist()
        edges = edges - np.array([x1, y1, x1, y1], np.float32)
        if self.mirrored[k]:
            edges = np.stack([x2 - x1 - edges[:, 0], edges[:, 1], x2 - x1 - edges[:, 2], edges[:, 3]], 1)
        across, down = width / (x2 - x1), height / (y2 - y1)
        edges = edges * np.array([across, down, across, down], np.float32)
        return edges + np.array([left, top, left, top], np.float32)

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
