"""What steps and parts set for their process is put back."""

import gc

import pytest

from detcore.device import native


@pytest.fixture(autouse=True)
def as_it_was():
    with native.using("auto"):
        yield
    gc.unfreeze()
