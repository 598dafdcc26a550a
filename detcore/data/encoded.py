"""The encoded image files of one batch after the other, read by threads while earlier batches are decoded."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from detcore.data.plan import Choice, EvalPlan, TrainPlan

AHEAD = 2


class EncodedFiles:
    """Iterates over what a plan chooses for each key, with the n files, uint8 [bytes] each.

    AHEAD batches more than was asked for are being read; an error of reading is raised with its own batch. The pool's
    threads start with the first batch; `close` ends them. turn: as `Options` has it.
    """

    def __init__(
        self, plan: TrainPlan | EvalPlan, keys: Iterator[tuple[int, int]], threads: int, turn: str = "auto"
    ) -> None:
        self.plan, self.keys, self.threads, self.turn = plan, keys, threads, turn
        self.pool = ThreadPoolExecutor(threads)
        self.coming: deque[tuple[Choice, list[Future]]] = deque()
        self.seconds, self.bytes, self.waited = 0.0, 0, 0.0

    def __iter__(self) -> "EncodedFiles":
        return self

    def __next__(self) -> tuple[Choice, list[np.ndarray]]:
        while len(self.coming) <= AHEAD and (key := next(self.keys, None)) is not None:
            choice = self.plan.choose(*key)
            self.coming.append((choice, [self.pool.submit(self._read, i) for i in choice.images.tolist()]))
        if not self.coming:
            raise StopIteration
        choice, reads = self.coming.popleft()
        begin = time.perf_counter()
        done = [read.result() for read in reads]
        self.waited += time.perf_counter() - begin
        self.seconds += sum(seconds for _, seconds in done) / self.threads
        files = [data for data, _ in done]
        self.bytes += sum(map(len, files))
        return choice, files

    def spent(self) -> tuple[int, float, float]:
        """Bytes; seconds that the threads needed, all reading at once; seconds waited for them; since the last call."""
        spent = self.bytes, self.seconds, self.waited
        self.seconds, self.bytes, self.waited = 0.0, 0, 0.0
        return spent

    def facts(self, i: int) -> dict[str, Any]:
        """Path, id, (height, width) and `turn` of the image at a position, as `transforms.decode` takes them."""
        index = self.plan.index
        size = (int(index.heights[i]), int(index.widths[i]))
        return {"path": index.path(i), "image_id": int(index.image_ids[i]), "size": size, "turn": self.turn}

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, i: int) -> tuple[np.ndarray, float]:
        begin = time.perf_counter()
        data = self.plan.index.read(i)
        return data, time.perf_counter() - begin
