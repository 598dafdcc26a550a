"""The table's section of SSD300."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check import columns

PUBLISHED = {"training": ("A100", 724.0), "inference": ("A100", 970.0)}
"""Card and images/s of one GPU: NVIDIA's later figures for batch 128 and 32, fp16; training leaves data out."""
TARGETS = {"training": 2500.0, "inference": 6000.0}
"""images/s on one H100 that we aim at; not measured values."""


def ssd300(state: dict[str, Any]) -> Iterator[str]:
    yield from columns.steps(state, "ssd300", "SSD300", PUBLISHED, TARGETS)
