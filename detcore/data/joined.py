"""Several annotation files as one training set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detcore import UserError
from detcore.data.classes import differing_files, some, told_apart
from detcore.data.coco import CocoIndex


class JoinedIndex:
    """The images of several indexes, one after the other, with what training asks a `CocoIndex` for.

    parts: the indexes. image_ids, heights, widths: as `CocoIndex` has them, of all parts; two parts may use one id, for
    ids only name images in messages. category_ids, category_names: those of every part. Can be pickled. Raises
    UserError if the parts list other categories.
    """

    def __init__(self, parts: Sequence[CocoIndex]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        for other in self.parts[1:]:
            refuse_other_categories(first, other)
        self.category_ids, self.category_names = first.category_ids, first.category_names
        self.image_ids = np.concatenate([part.image_ids for part in self.parts])
        self.heights = np.concatenate([part.heights for part in self.parts])
        self.widths = np.concatenate([part.widths for part in self.parts])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __reduce__(self) -> tuple:
        return JoinedIndex, (self.parts,)

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def _at(self, i: int) -> tuple[CocoIndex, int]:
        """The part that holds image i, and the image's position there."""
        part = int(np.searchsorted(self._ends, i, "right"))
        return self.parts[part], int(i) - int(self._ends[part] - len(self.parts[part]))

    def path(self, i: int) -> Path:
        """The image's file, or its place in shards."""
        part, at = self._at(i)
        return part.path(at)

    def read(self, i: int) -> np.ndarray:
        """The bytes of the image's file, uint8 [n]. UserError, naming file and image."""
        part, at = self._at(i)
        return part.read(at)

    def boxes(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `CocoIndex.boxes`: float32 [n, 4], int64 [n] class index, bool [n] crowd."""
        part, at = self._at(i)
        return part.boxes(at)

    def boxes_of(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `CocoIndex.boxes_of`."""
        found, begin = [], 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            own = np.flatnonzero((images >= begin) & (images < end))
            of, *more = part.boxes_of(images[own] - begin)
            found.append((own[of], *more))
            begin = end
        of, boxes, labels, crowd = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(of, kind="stable")
        return of[order], boxes[order], labels[order], crowd[order]

    @property
    def has_edges(self) -> bool:
        """As `CocoIndex.has_edges`."""
        return self.parts[0].has_edges

    def edges(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """As `CocoIndex.edges`: float32 [e, 4] and int64 [e, 2], box and part."""
        part, at = self._at(i)
        return part.edges(at)

    def most_edges(self, crowd: str) -> int:
        """As `CocoIndex.most_edges`, of all parts."""
        return max(part.most_edges(crowd) for part in self.parts)

    def edge_count(self, crowd: str) -> np.ndarray:
        """As `CocoIndex.edge_count`, of all parts."""
        return np.concatenate([part.edge_count(crowd) for part in self.parts])

    def box_count(self) -> np.ndarray:
        """int64 [I]: the number of annotations of each image as the files list them."""
        return np.concatenate([part.box_count() for part in self.parts])

    def check_images(self) -> None:
        """Raise UserError if images are missing, naming the first three of a part."""
        for part in self.parts:
            part.check_images()

    def summary(self, crowd: str = "keep") -> str:
        """What each file holds and how it was treated. crowd: as `CocoIndex.summary` has it."""
        return "\n".join(part.summary(crowd) for part in self.parts)


def refuse_other_categories(
    first: CocoIndex, other: CocoIndex, together: str = "data sets that train together"
) -> None:
    """Raises UserError unless two files list the same ids with the same names. together: what needs that."""
    differ = differing_files(
        list(zip(first.category_ids.tolist(), first.category_names, strict=True)),
        list(zip(other.category_ids.tolist(), other.category_names, strict=True)),
        *told_apart(first.annotation_file, other.annotation_file),
    )
    if differ:
        raise UserError(
            f"{first.annotation_file} and {other.annotation_file} list different categories: {some(differ)}; "
            f"{together} need the same ids with the same names, so list all of them in both"
        )
