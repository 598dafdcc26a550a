"""The table's section of Mask R-CNN."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check import columns

PUBLISHED = {"training": ("H100", 187.0), "inference": ("A100", 31.0)}
"""Card and images/s of one GPU: NVIDIA's figures of MLPerf 3.1 with 12 images, and of inference in FP16 with 8."""
TARGETS = {"training": 200.0, "inference": 150.0}
"""images/s on one H100 that we aim at; not measured values."""


def maskrcnn(state: dict[str, Any]) -> Iterator[str]:
    yield from columns.steps(state, "maskrcnn", "Mask R-CNN R50-FPN", PUBLISHED, TARGETS)
