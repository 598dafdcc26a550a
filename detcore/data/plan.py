"""Which images each batch takes, on which rank, what is done to each and what their targets become.

What a batch holds follows from (seed, epoch, step, rank, world size) and nothing else. The order of an epoch is the
permutation drawn from (seed, epoch). Micro-batch s of rank r takes the r-th batch_size images of the s-th world x
batch_size images of the permutation: the ranks share an epoch without overlap. `drop_last` leaves out the images that
do not fill a micro-batch on every rank, others each epoch; without it the last micro-batches are filled from the
beginning of the same permutation. Where a recipe has several canvases, each has its own images in the order of the
permutation, and a step comes when its last image does: the same canvas on all ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from detcore import UserError
from detcore.data.augment import has_centre
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.collect import within
from detcore.data.recipes import Draws, Recipe
from detcore.data.view import View

_NONE = -1  # no image: padding of an evaluation's last batches


class Choice(NamedTuple):
    """Which images a batch takes, int64 [n] positions in the file, and what is done to each."""

    images: np.ndarray
    view: View


def steps_per_epoch(n_images: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Micro-batches that each rank yields an epoch, of one canvas. UserError where drop_last leaves none."""
    steps = _steps(n_images, batch_size * world_size, drop_last)
    if not steps:
        raise UserError(
            f"{n_images} images do not fill one batch of {batch_size} on each of {world_size} processes; lower "
            "--batch-size or the number of processes, or take some images twice with --no-drop-last."
        )
    return steps


def _steps(n_images: int, together: int, drop_last: bool) -> int:
    return n_images // together if drop_last else -(-n_images // together)


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n_images]: the permutation of one epoch."""
    return np.random.default_rng([seed % 2**64, epoch]).permutation(n_images)


class _Plan:
    """What both plans share: images by canvas, a table of an epoch's steps, and which steps their pixels take.

    cuts, recolours, places: as `Recipe` has them.
    """

    def __init__(self, index: CocoIndex, recipe: Recipe, batch_size: int, rank: int, world_size: int) -> None:
        self.index, self.recipe, self.batch_size = index, recipe, batch_size
        self.rank, self.world_size = rank, world_size
        index.check_images()
        self._canvas = recipe.canvas_of(self._sizes(np.arange(len(index)))) if recipe.canvas_of else None
        self.cuts, self.recolours, self.places = False, False, recipe.places

    @property
    def together(self) -> int:
        """Images of a step on all ranks."""
        return self.batch_size * self.world_size

    def _sizes(self, images: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: height and width."""
        return np.stack([self.index.heights[images], self.index.widths[images]], 1).astype(np.int64)

    def _by_canvas(self, images: np.ndarray) -> list[np.ndarray]:
        """The images of each canvas, in their order."""
        if self._canvas is None:
            return [images]
        of = self._canvas[images]
        return [images[of == canvas] for canvas in range(len(self.recipe.canvases))]

    def _mine(self, row: np.ndarray) -> np.ndarray:
        """This rank's images of a step's."""
        mine = row[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return mine[mine != _NONE]


class TrainPlan(_Plan):
    """Which images a training micro-batch takes, what is done to each, and what their boxes become.

    crowd: "keep" crowd boxes as ordinary ones or "drop" them. max_edges: to how many edges the masks of an image are
    padded, where the index has them; 0: as many as the fullest image of the annotations has. All loaders read the plan,
    so that they agree on everything but the pixels. Raises UserError for missing images, more boxes than max_boxes,
    more edges than max_edges, masks that are all missing, and too few images for a batch.
    """

    def __init__(
        self, index: CocoIndex, recipe: Recipe, batch_size: int, max_boxes: int, seed: int, rank: int = 0,
        world_size: int = 1, drop_last: bool = True, crowd: str = "keep", max_edges: int = 0,
    ) -> None:  # fmt: skip
        if crowd not in ("keep", "drop"):
            raise ValueError(f"crowd is {crowd!r}, neither keep nor drop")
        super().__init__(index, recipe, batch_size, rank, world_size)
        self.cuts, self.recolours = recipe.cuts, recipe.recolours
        self.max_boxes, self.seed, self.drop_last, self.crowd = max_boxes, seed, drop_last, crowd
        self._trained = np.flatnonzero(recipe.trains(index)) if recipe.trains else None
        groups = self._by_canvas(np.arange(len(index)) if self._trained is None else self._trained)
        self.steps = sum(_steps(len(group), self.together, drop_last) for group in groups)
        self.steps = self.steps or steps_per_epoch(
            max(map(len, groups)), batch_size, world_size, drop_last
        )  # it raises
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, *([np.empty(0, np.int64)] * 2))
        suspects = np.flatnonzero(index.box_count() > max_boxes).tolist()
        counts = [(self._whole_count(i), i) for i in suspects]
        self._refuse(*max(counts, default=(0, 0), key=lambda found: found[0]))  # the fullest: one error tells enough
        self.max_edges = self._edges_wanted(max_edges) if index.has_edges else 0

    def choose(self, epoch: int, step: int) -> Choice:
        """What batch_size images are taken, and what is done to each."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, *self._table(epoch))
        _, table, canvases = self._epoch
        images, canvas = self._mine(table[step]), self.recipe.canvases[canvases[step]]
        boxes = []
        if self.recipe.centred:
            of, found, _, _ = self._boxes(images)
            boxes = np.split(found, np.searchsorted(of, np.arange(1, len(images))))
        return Choice(images, self.recipe.view(Draws(self.seed, epoch, images), self._sizes(images), boxes, canvas))

    def _table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [steps, together], an epoch's images, and int64 [steps], their canvases."""
        trained = self._trained
        order = epoch_order(len(self.index) if trained is None else len(trained), self.seed, epoch)
        order = order if trained is None else trained[order]
        rows, canvases, last = [], [], []
        place = np.empty(len(self.index), np.int64)
        place[order] = np.arange(len(order))
        for canvas, images in enumerate(self._by_canvas(order)):
            if steps := _steps(len(images), self.together, self.drop_last):
                rows.append(np.resize(images, (steps, self.together)))  # what is missing is taken from the beginning
                ends = np.minimum(np.arange(1, steps + 1) * self.together, len(images)) - 1
                last.append(place[images[ends]])
                canvases.append(np.full(steps, canvas))
        by_place = np.argsort(np.concatenate(last), kind="stable")
        return np.concatenate(rows)[by_place], np.concatenate(canvases)[by_place]

    def targets(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The fields of `Batch` other than the images."""
        images = choice.images
        boxes = np.zeros((len(images), self.max_boxes, 4), np.float32)
        labels = np.full((len(images), self.max_boxes), -1, np.int64)
        edges = np.zeros((len(images), self.max_edges, 4), np.float32)
        edge_of = np.full((len(images), self.max_edges, 2), -1, np.int64)
        of, kept, classes, places = self._kept_boxes(images, choice.view)
        counts = np.bincount(of, minlength=len(images))
        for row in np.flatnonzero(counts > self.max_boxes).tolist():
            self._refuse(int(counts[row]), int(images[row]))
        at = of, within(counts)
        boxes[at], labels[at] = kept, classes
        for row, i in enumerate(images.tolist() if self.max_edges else []):
            found, parts = self._kept_edges(i, places[of == row])
            edges[row, : len(found)], edge_of[row, : len(parts)] = choice.view.edges(row, found), parts
        facts = self.index.image_ids[images], self._sizes(images), choice.view.extents
        return _targets(boxes, labels, *facts, edges, edge_of)

    def _boxes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The boxes of images that may be trained with, as `CocoIndex.boxes_of` has them: which of the images, the
        box, its label, and its place among the image's."""
        of, boxes, labels, crowd = self.index.boxes_of(images)
        places = within(np.bincount(of, minlength=len(images)))
        if self.crowd == "keep":
            return of, boxes, labels, places
        return of[~crowd], boxes[~crowd], labels[~crowd], places[~crowd]

    def _kept_boxes(self, images: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The boxes of images that the view leaves, on the canvas, as `_boxes` has them."""
        of, boxes, labels, places = self._boxes(images)
        if self.recipe.centred:
            seen = has_centre(boxes, view.windows[of])
            of, boxes, labels, places = of[seen], boxes[seen], labels[seen], places[seen]
        if self.recipe.clip:
            windows = view.windows[of].astype(np.float32)
            boxes = np.clip(boxes, windows[:, [0, 1, 0, 1]], windows[:, [2, 3, 2, 3]])
        boxes = view.boxes(of, boxes)
        if self.recipe.clip:
            ends = np.where(view.covers(of)[:, None], np.inf, view.extents[of])
            boxes = np.clip(boxes, 0, ends[:, [1, 0, 1, 0]].astype(np.float32))
        keep = (boxes[:, 2:] - boxes[:, :2] > self.recipe.min_box).all(1)
        return of[keep], boxes[keep], labels[keep], places[keep]

    def _kept_edges(self, i: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The edges of the boxes of an image at some places, rising, in pixels of the original, and int64 [e, 2], the
        box among those and the part that each belongs to."""
        edges, of = self.index.edges(i)
        box = np.searchsorted(places, of[:, 0])
        kept = np.isin(of[:, 0], places)
        return edges[kept], np.stack([box[kept], of[kept, 1]], 1)

    def _edges_wanted(self, most: int) -> int:
        """To how many edges an image's are padded; `most`: as `TrainPlan` has max_edges."""
        counts = self.index.edge_count(self.crowd)
        fullest = int(np.argmax(counts))
        if not counts[fullest]:
            raise UserError(
                f"{self.index.path(0).parent}: no annotation of its images has a mask that trains (segmentation: "
                "polygons or RLE); train a detector of boxes with it, or add the masks."
            )
        if most and counts[fullest] > most:
            raise UserError(
                f"{self.index.path(fullest)}: the masks of image {self.index.image_ids[fullest]} have "
                f"{counts[fullest]:,} edges, more than {most:,}; raise --max-edges to at least that, or leave it out."
            )
        return most or int(counts[fullest])

    def _whole_count(self, i: int) -> int:
        """How many boxes of an image are kept where all of it is seen."""
        images = np.array([i])
        canvas = self.recipe.canvases[self._canvas[i] if self._canvas is not None else 0]
        return len(self._kept_boxes(images, self.recipe.eval_view(self._sizes(images), canvas))[0])

    def _refuse(self, count: int, i: int) -> None:
        """UserError if so many boxes are too many of an image."""
        if count > self.max_boxes:
            raise UserError(
                f"{self.index.path(i)}: image {self.index.image_ids[i]} has {count} boxes, more than "
                f"{self.max_boxes}; raise --max-boxes to at least that."
            )

    def keys(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) from there on without end; steps beyond an epoch's count go on into the next."""
        epoch, step = epoch + step // self.steps, step % self.steps
        while True:
            yield from ((epoch, s) for s in range(step, self.steps))
            epoch, step = epoch + 1, 0


class EvalPlan(_Plan):
    """Which images an evaluation batch takes: each once over all ranks, in the file's order within a canvas.

    Each rank has the same number of batches; the rest of the last ones is padding (image_id -1, size 1x1, fill). Boxes
    are one empty row an image, labels -1: the truth stays in `CocoIndex.ground_truth`.
    """

    def __init__(self, index: CocoIndex, recipe: Recipe, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(index, recipe, batch_size, rank, world_size)
        rows, canvases = [], []
        for canvas, images in enumerate(self._by_canvas(np.arange(len(index)))):
            steps = -(-len(images) // self.together)
            rows.append(np.pad(images, (0, steps * self.together - len(images)), constant_values=_NONE))
            canvases += [canvas] * steps
        self._rows, self._canvases = np.concatenate(rows).reshape(-1, self.together), canvases
        self.steps = len(canvases)

    def choose(self, epoch: int, step: int) -> Choice:
        """As `TrainPlan.choose`, but fewer images, or none, where the file ends. ValueError: see `View.scorable`."""
        images, canvas = self._mine(self._rows[step]), self.recipe.canvases[self._canvases[step]]
        sizes = self._sizes(images)
        return Choice(images, self.recipe.eval_view(sizes, canvas).scorable(sizes))

    def targets(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The fields of `Batch` other than the images, padded to the batch size."""
        images, n = choice.images, self.batch_size
        image_id, size, extent = np.full(n, -1, np.int64), np.ones((n, 2), np.int64), np.ones((n, 2), np.int64)
        image_id[: len(images)], size[: len(images)] = self.index.image_ids[images], self._sizes(images)
        extent[: len(images)] = choice.view.extents
        masks = np.zeros((n, 0, 4), np.float32), np.zeros((n, 0, 2), np.int64)
        return _targets(np.zeros((n, 1, 4), np.float32), np.full((n, 1), -1), image_id, size, extent, *masks)

    def keys(self) -> Iterator[tuple[int, int]]:
        return ((0, step) for step in range(self.steps))


def _targets(*fields: np.ndarray) -> dict[str, torch.Tensor]:
    """Values of the fields of `Batch` after the images, in their order."""
    found = zip(Batch._fields[1:], fields, strict=True)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found}
