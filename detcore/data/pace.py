"""How fast the parts of a loader are, measured where they run, and what to do when training waits for them."""

import math
import os
from dataclasses import dataclass

STAGES = ("reading", "decoding", "resizing and flipping")


@dataclass
class Pace:
    """Sums over batches since the last `words`: seconds of one worker in each of STAGES, images, bytes, CPU seconds.

    parallel: workers at the same time; 0: training itself loads, in turns. processes: of the job, all taken to be like
    this one; local_processes: on this machine, which share its processors. more: what else can be tried where the
    processors are the limit, such as another loader. sharded: whether images come from shards already. loader: torch,
    dali or nvjpeg; DALI's decoding and resizing are one number, the time waited for them, and of what nvjpeg launches
    on a device only the launching is seen.
    """

    parallel: int
    processes: int = 1
    local_processes: int = 1
    sharded: bool = False
    loader: str = "torch"
    more: str = ""
    images: int = 0
    bytes: int = 0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.seconds = [0.0] * len(STAGES)

    def add(self, images: int, size: int, seconds: list[float], cpu: float) -> None:
        self.images += images
        self.bytes += size
        self.cpu += cpu
        self.seconds = [a + b for a, b in zip(self.seconds, seconds, strict=True)]

    def words(self, rate: float, wait: float) -> str:
        """A line for the person at the console, and a new beginning; "" where too little was measured.

        rate: images per second of the job in the time measured; wait: the part of it that this process waited for
        data. The seconds of a stage are wall-clock seconds in the workers, so that a stage that waits (for the disk, or
        for a processor that others use) is as slow as it is.
        """
        images, size, seconds, cpu = self.images, self.bytes, self.seconds, self.cpu
        self.images, self.bytes, self.cpu, self.seconds = 0, 0, 0.0, [0.0] * len(STAGES)
        if images < 8 or not sum(seconds):
            return ""
        workers = max(self.parallel, 1) * self.processes
        able = [workers * images / s if s else float("inf") for s in seconds]
        beside = self.loader != "torch"  # threads that read while others decode
        together = workers * images / (max(seconds[0], sum(seconds[1:])) if beside else sum(seconds))
        needed = rate / max(1 - wait, 0.01)
        worst = seconds.index(max(seconds))
        megabytes = size / images * able[0] / 1e6
        parts = [f"{name} {n:,.0f}" for name, n in zip(STAGES, able) if n != float("inf")]
        if able[0] != float("inf"):
            parts[0] += f" ({megabytes:,.0f} MB/s)"
        who = f"{self.parallel} worker{'s' * (self.parallel > 1)}" if self.parallel else "the training process"
        who = {"dali": "DALI", "nvjpeg": "torchvision's decoder in the training process"}.get(self.loader, who)
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        head = (
            f"training waits {wait:.0%} of the time for data. Images/s that {who}{each} could give, each stage alone: "
            f"{', '.join(parts)}; all together {together:,.0f}; training could take about {needed:,.0f}."
        )
        return f"{head} {self._advice(worst, together, needed, cpu / sum(seconds), size / images)}"

    def _advice(self, worst: int, together: float, needed: float, busy: float, each: float) -> str:
        cores = max(len(os.sched_getaffinity(0)) // self.local_processes, 1)
        if not self.parallel:
            return f"Loading and training take turns (--workers 0): try --workers {min(4, cores)}."
        if self.loader != "torch":
            return self._advice_without_workers(worst, cores)
        if together > 1.2 * needed:
            return (
                "The workers are fast enough: what is slow lies between them and training (the first batches after a "
                "start, the copy to the device, shared memory, or another process of the job)."
            )
        wanted = max(self.parallel + 1, math.ceil(self.parallel * needed / together))
        if worst == 0:
            more = f"--workers {min(wanted, 4 * cores)} to wait for several at once; " if wanted > self.parallel else ""
            return f"The bottleneck is reading: {more}{self._reading()}."
        if self.parallel < cores:
            return (
                f"The bottleneck is {STAGES[worst]}: try --workers {min(wanted, cores)} "
                f"({cores} processors for each process)."
            )
        crowded = " (they even wait for processors)" if busy < 0.7 else ""
        more = f"; {self.more}" if self.more else ""
        return (
            f"The bottleneck is {STAGES[worst]}, and the {cores} processors of this process are all in use{crowded}: "
            f"more processors{more}."
        )

    def _advice_without_workers(self, worst: int, cores: int) -> str:
        if worst == 0:
            return f"The bottleneck is reading: more --workers, which are threads that read here; {self._reading()}."
        if self.loader == "dali":
            return "The bottleneck is DALI's decoding and resizing: more --workers give DALI more threads."
        return (
            f"The bottleneck is {STAGES[worst]}, which --loader nvjpeg does a batch at a time between the training "
            f"steps: --loader dali does it on the GPU beside them, --loader torch --workers {cores} on the processors."
        )

    def _reading(self) -> str:
        if self.sharded:
            return "--read-ahead where memory holds the shards, or a copy of the shards on a local disk"
        return "pack the images (public-scripts/pack_dataset.py, then --shards), or copy them to a local disk"
