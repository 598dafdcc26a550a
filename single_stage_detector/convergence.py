"""What public runs of this benchmark reached after each epoch, and whether a run is far from them. Without torch.

The numbers (convergence.json) are those of 1,025 published MLPerf Training logs of rounds 2.0 to 5.1, settings of batch
size, learning rate and warm-up with at least five runs. A run of the same recipe is far off when its mAP is more than
FAR standard deviations from the mean of its setting; runs with other settings, a smaller model or other data have
nothing to be compared with.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FAR = 4.0  # standard deviations
_FILE = Path(__file__).with_name("convergence.json")


class Public(NamedTuple):
    """mAP (0 to 1) of public runs after so many epochs. same: they have the run's learning rate and warm-up too."""

    runs: int
    lowest: float
    highest: float
    mean: float
    sd: float
    same: bool


@cache
def settings() -> list[dict[str, Any]]:
    """Rows of global_batch_size, learning_rate, warmup_epochs, runs, map: [epoch, n, mean, sd, lowest, highest]."""
    return json.loads(_FILE.read_text(encoding="utf-8"))["settings"]


def public(batch: int, rate: float | None, warmup: float | None, epoch: int) -> Public | None:
    """The public runs to compare with after `epoch` completed epochs, or None.

    batch: images of one update over all processes. Where none has this rate and warm-up (epochs), or they are None, all
    runs of this batch size; None where there are none of it, or none was evaluated so late.
    """
    found = [
        (row, after) for row in settings() if row["global_batch_size"] == batch for after in row["map"]
        if after[0] == epoch
    ]  # fmt: skip
    alike = [
        (row, after) for row, after in found if None not in (rate, warmup)
        and math.isclose(row["learning_rate"], rate, rel_tol=1e-6) and row["warmup_epochs"] == warmup
    ]  # fmt: skip
    rows = [after for _, after in alike or found]
    if not rows:
        return None
    runs = sum(after[1] for after in rows)
    mean = sum(after[1] * after[2] for after in rows) / runs
    square = sum(after[1] * (after[3] ** 2 + (after[2] - mean) ** 2) for after in rows) / runs
    return Public(runs, min(a[4] for a in rows), max(a[5] for a in rows), mean, math.sqrt(square), bool(alike))


def far_off(batch: int, rate: float | None, warmup: float | None, epoch: int, value: float) -> str:
    """One sentence where the mAP `value` after so many epochs is far from the public runs', else ""."""
    runs = public(batch, rate, warmup, epoch)
    if runs is None or (math.isfinite(value) and abs(value - runs.mean) <= FAR * runs.sd):
        return ""
    return f"{compare_words(value, epoch, runs)}: {'far below' if not value > runs.mean else 'far above'} what is usual"


def compare_words(value: float, epoch: int, runs: Public) -> str:
    """ "mAP 0.198 after epoch 1, 0.231 to 0.249 in 41 public runs of this batch size"."""
    of = "this batch size, learning rate and warm-up" if runs.same else "this batch size"
    usual = f"{runs.lowest:.3f} to {runs.highest:.3f} in {runs.runs} public runs of {of}"
    return f"mAP {value:.3f} after epoch {epoch}, {usual}"
