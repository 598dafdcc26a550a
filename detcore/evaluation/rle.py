"""Masks in COCO's run-length encoding, many at a time: as arrays, which travel and are kept like other columns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Rles(NamedTuple):
    """The masks of n objects.

    text: uint8 [T], the letters of COCO's compressed counts, one mask after the other. counts: int64 [n], how many each
    mask has. sizes: int64 [n, 2], height and width of each one's image. areas: int64 [n], pixels of each mask, known
    where it is made; who reads its letters has to sum them.
    """

    text: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, masks: Sequence[dict[str, Any]]) -> "Rles":
        """From COCO's dictionaries: size, and counts as bytes or text."""
        texts = [m["counts"].encode() if isinstance(m["counts"], str) else m["counts"] for m in masks]
        sizes = np.array([m["size"] for m in masks], np.int64).reshape(-1, 2)
        return cls.read(np.frombuffer(b"".join(texts), np.uint8), np.array([len(t) for t in texts], np.int64), sizes)

    @classmethod
    def read(cls, text: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> "Rles":
        """From columns without the areas, which pycocotools sums."""
        from pycocotools import mask

        found = cls(text, counts, sizes, np.zeros(len(counts), np.int64))
        return found._replace(areas=np.array([mask.area(one) for one in found.dictionaries()], np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Rles"]) -> "Rles":
        """Those of all parts, one after the other."""
        return cls(*map(np.concatenate, zip(cls.of([]), *parts, strict=True)))

    def take(self, rows: np.ndarray) -> "Rles":
        """Some of the masks: those at positions int [m], or where a bool [n] is True."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        counts, ends = self.counts[rows], np.cumsum(self.counts)[rows]
        letters = np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)
        return Rles(self.text[letters], counts, self.sizes[rows], self.areas[rows])

    def dictionaries(self) -> list[dict[str, Any]]:
        """COCO's {"size": [height, width], "counts": bytes} of each mask; masks of one size share its list."""
        text, ends = self.text.tobytes(), np.cumsum(self.counts).tolist()
        _, first, number = np.unique(self.sizes @ (1 << 32, 1), return_index=True, return_inverse=True)
        of_mask = map(self.sizes[first].tolist().__getitem__, number.tolist())
        return [
            {"size": size, "counts": text[start:end]}
            for size, start, end in zip(of_mask, [0, *ends[:-1]], ends, strict=False)
        ]
