"""Fixtures of the tests of detcore.data that these share."""

from tests.detcore.data.conftest import coco, thirteen

__all__ = ["coco", "thirteen"]
