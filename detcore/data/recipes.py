"""What each kind of detector does to its images: a recipe makes the `View` of a batch, for training and for evaluation.

All that is random is drawn by `Draws` from seed, epoch and position in the file, so that it depends neither on the
batch nor on the process that an image is seen in. Recipes can be pickled: their functions are partial ones of this
module's.

Benchmarks choose theirs in `data.py`: `stretch` single_stage_detector, `ssd_crop` ssd300, `letterbox` efficientdet,
`shortest_edge` maskrcnn. A new one begins its images at the top left corner of the canvas: a centred letterbox is
refused when it is evaluated (`View.scorable`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from detcore.data.augment import Augment, uniform
from detcore.data.coco import CocoIndex
from detcore.data.view import View, whole


class Draws(NamedTuple):
    """The random numbers of a batch. images: int64 [n] positions in the file."""

    seed: int
    epoch: int
    images: np.ndarray

    def uniform(self, *numbers: int) -> np.ndarray:
        """float64 in [0, 1): [n] without numbers, else [n, draws], one for each number."""
        if not numbers:
            return uniform(self.seed, self.epoch, self.images)
        return uniform(self.seed, self.epoch, self.images[:, None], np.array(numbers))


TrainView = Callable[[Draws, np.ndarray, list[np.ndarray], tuple[int, int]], View]
EvalView = Callable[[np.ndarray, tuple[int, int]], View]


@dataclass(frozen=True)
class Recipe:
    """How a detector sees its images.

    canvases: (height, width) of each kind of batch that there is. view(draws, sizes, boxes, canvas): the training view
    of images of sizes int64 [n, 2] (height, width) with boxes, each float32 [m, 4], in pixels of the original;
    eval_view(sizes, canvas): the one of evaluation, of whole images from the canvas's top left corner on; predict_view:
    of prediction, where that differs: also of parts of images. canvas_of(sizes):
    int64 [n], which canvas each image belongs on. trains(index): bool [n], which images are trained with; None: all.
    evaluation: the recipe of evaluation and prediction, where that has canvases of its own.
    clip: boxes end where the visible part of their image does. centred: training leaves out boxes whose own centre lies
    outside of the window (nothing is said of where images lie). Boxes not wider and higher than min_box pixels of the
    canvas are left out. What loaders prepare for: cuts: training windows may be parts of the images; recolours:
    training views have colours; places: a view may leave some of its canvas to the fill, in evaluation as well;
    methods: the interpolations that views ask for.
    """

    canvases: tuple[tuple[int, int], ...]
    view: TrainView
    eval_view: EvalView
    predict_view: EvalView | None = None
    canvas_of: Callable[[np.ndarray], np.ndarray] | None = None
    trains: Callable[[CocoIndex], np.ndarray] | None = None
    evaluation: "Recipe | None" = None
    clip: bool = False
    centred: bool = False
    min_box: float = 0.0
    cuts: bool = False
    recolours: bool = False
    places: bool = False
    methods: frozenset[str] = frozenset({"bilinear"})

    @property
    def of_evaluation(self) -> "Recipe":
        return self.evaluation or self


def stretched(sizes: np.ndarray, canvas: tuple[int, int]) -> View:
    """All of each image, scaled to the canvas whatever its aspect."""
    n = len(sizes)
    return View(whole(sizes), np.zeros(n, bool), np.tile(canvas, (n, 1)), np.zeros((n, 2), np.int64), canvas)


def central_square(sizes: np.ndarray, canvas: tuple[int, int]) -> View:
    """The largest square in the middle of each image, scaled to the canvas."""
    side = sizes.min(1, keepdims=True)
    corner = ((sizes - side) // 2)[:, ::-1]
    return stretched(sizes, canvas)._replace(windows=np.concatenate([corner, corner + side], 1))


def _stretch(draws: Draws, sizes: np.ndarray, boxes: list[np.ndarray], canvas: tuple[int, int], *, mirror: float):
    return stretched(sizes, canvas)._replace(mirrored=draws.uniform() < mirror)


def stretch(canvas: tuple[int, int], mirror: float = 0.5, min_box: float = 0.0) -> Recipe:
    """RetinaNet's: the whole image, mirrored with probability `mirror`, scaled to the canvas."""
    return Recipe((canvas,), partial(_stretch, mirror=mirror), stretched, min_box=min_box)


def _ssd_crop(
    draws: Draws,
    sizes: np.ndarray,
    boxes: list[np.ndarray],
    canvas: tuple[int, int],
    *,
    mirror: float,
    augment: Augment,
) -> View:
    view = _stretch(draws, sizes, boxes, canvas, mirror=mirror)
    windows = augment.windows(*draws, sizes, boxes)
    return view._replace(windows=windows, colours=augment.colours(*draws))


def ssd_crop(canvas: tuple[int, int], augment: Augment, mirror: float = 0.5) -> Recipe:
    """SSD's: a random window by `augment`, mirrored with probability `mirror`, scaled to the canvas, recoloured."""
    view = partial(_ssd_crop, mirror=mirror, augment=augment)
    return Recipe((canvas,), view, stretched, clip=True, centred=True, cuts=True, recolours=True)


def letterboxed(
    sizes: np.ndarray,
    canvas: tuple[int, int],
    fill: tuple[int, int, int],
    scale: np.ndarray | float = 1.0,
    interpolation: str = "bilinear",
) -> View:
    """All of each image, its aspect kept, as large as fits into `scale` canvases, from the top left corner on.

    interpolation: bilinear or bicubic.
    """
    factor = np.min(np.array(canvas) * np.reshape(scale, (-1, 1)) / sizes, 1, keepdims=True)
    scaled = np.maximum((sizes * factor).astype(np.int64), 1)
    cubic = np.ones(len(sizes), bool) if interpolation == "bicubic" else None
    return stretched(sizes, canvas)._replace(sizes=scaled, fill=fill, cubic=cubic)


def visible(view: View, corners: np.ndarray) -> View:
    """The same with only what is seen of each image, in whole pixels of the original, which is all that gets resized.

    view: of whole images. corners: int64 [n, 2] y and x, in pixels of the scaled images, from which on they are seen.
    """
    whole_sizes, seen = view.windows[:, :1:-1], np.minimum(view.sizes, view.canvas)
    cut = np.maximum(np.rint(seen * whole_sizes / view.sizes).astype(np.int64), 1)
    start = np.minimum(np.rint(corners * whole_sizes / view.sizes).astype(np.int64), whole_sizes - cut)
    return view._replace(windows=np.concatenate([start[:, ::-1], (start + cut)[:, ::-1]], 1), sizes=seen)


def _letterbox(
    draws: Draws, sizes: np.ndarray, boxes: list[np.ndarray], canvas: tuple[int, int], *, mirror: float,
    scales: tuple[float, float], fill: tuple[int, int, int], interpolation: str,
) -> View:  # fmt: skip
    scale, *place = draws.uniform(0, 1, 2).T
    view = letterboxed(sizes, canvas, fill, scales[0] + (scales[1] - scales[0]) * scale, interpolation)
    if interpolation == "random":
        view = view._replace(cubic=draws.uniform(3)[:, 0] < 0.5)
    corners = (np.maximum(view.sizes - canvas, 0) * np.stack(place, 1)).astype(np.int64)
    return visible(view, corners)._replace(mirrored=draws.uniform() < mirror)


def letterbox(
    canvas: tuple[int, int],
    fill: tuple[int, int, int],
    mirror: float = 0.5,
    scales: tuple[float, float] = (0.1, 2.0),
    interpolation: str = "bilinear",
    evaluation: str = "bilinear",
) -> Recipe:
    """EfficientDet's: aspect kept; in training a random scale of the canvas, cropped at random where it is larger.

    interpolation: bilinear, bicubic or random, one of the two for each image, of training; evaluation: bilinear or
    bicubic, of evaluation and prediction. The original crops on whole pixels of the scaled image, this on those of the
    image itself, so scales differ by less than half a pixel in a window and borders have no pixels beside them.
    """
    view = partial(_letterbox, mirror=mirror, scales=scales, fill=fill, interpolation=interpolation)
    still = partial(letterboxed, fill=fill, interpolation=evaluation)
    methods = frozenset({"bilinear", "bicubic"} if interpolation == "random" else {interpolation}) | {evaluation}
    return Recipe((canvas,), view, still, clip=True, cuts=True, places=True, methods=methods)


def shortest_edge_sizes(sizes: np.ndarray, short: int, longest: int) -> np.ndarray:
    """int64 [n, 2]: height and width whose shorter side is `short`, less where the longer one would pass `longest`.

    The arithmetic of maskrcnn-benchmark: a capped short side is rounded (halves to even), the long side cut off. So the
    long side of very long images can pass `longest`.
    """
    least, most = sizes.min(1), sizes.max(1)
    capped = np.round(longest * least / most).astype(np.int64)
    side = np.where(most / least * short > longest, capped, short)[:, None]
    along = (side * sizes / least[:, None]).astype(np.int64)
    return np.maximum(np.where(sizes == least[:, None], side, along), 1)


def _fitted(sizes: np.ndarray, canvas: tuple[int, int], *, short: int, longest: int) -> View:
    scaled = np.minimum(shortest_edge_sizes(sizes, short, longest), canvas)  # where rounding made it longer
    return stretched(sizes, canvas)._replace(sizes=scaled)


def _shortest_edge(
    draws: Draws, sizes: np.ndarray, boxes: list[np.ndarray], canvas: tuple[int, int], *, mirror: float, short: int,
    longest: int,
) -> View:  # fmt: skip
    return _fitted(sizes, canvas, short=short, longest=longest)._replace(mirrored=draws.uniform() < mirror)


def _smallest(sizes: np.ndarray, *, canvases: tuple[tuple[int, int], ...], short: int, longest: int) -> np.ndarray:
    scaled = np.minimum(shortest_edge_sizes(sizes, short, longest), np.max(canvases))
    fits = (scaled[:, None] <= np.array(canvases)).all(2)
    return np.where(fits, np.prod(canvases, 1), np.iinfo(np.int64).max).argmin(1)


def shortest_edge(short: int = 800, longest: int = 1333, mirror: float = 0.5, multiple: int = 32) -> Recipe:
    """Mask R-CNN's: the short side `short`, the long one at most `longest`, on the smallest of four canvases.

    With the defaults 800x1088, 800x1344 and their transposes: sides are multiples of `multiple`, and the smaller one
    holds pictures of up to 4 : 3.
    """

    def up(side: float) -> int:
        return int(-(-side // multiple) * multiple)

    wide = ((up(short), up(4 / 3 * short)), (up(short), up(longest)))
    canvases = (*wide, *(canvas[::-1] for canvas in wide))
    how = {"short": short, "longest": longest}
    return Recipe(
        canvases, partial(_shortest_edge, mirror=mirror, **how), partial(_fitted, **how),
        canvas_of=partial(_smallest, canvases=canvases, **how), clip=True, places=True,
    )  # fmt: skip
