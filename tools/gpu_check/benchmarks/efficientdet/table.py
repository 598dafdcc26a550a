"""The table's section of EfficientDet."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check import columns

PUBLISHED = {"training": ("A100", 255.0), "inference": ("A100", 50.23)}
"""Card and images/s of one GPU: NVIDIA's figures for D0 with AMP, batch 150 and 8; both with the data's loading."""
TARGETS = {"training": 1000.0, "inference": 2000.0}
"""images/s on one H100 that we aim at; not measured values."""


def efficientdet(state: dict[str, Any]) -> Iterator[str]:
    yield from columns.steps(state, "efficientdet", "EfficientDet-D0", PUBLISHED, TARGETS)
