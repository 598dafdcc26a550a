"""Whether losses and detection can be recorded: with tensors that only claim to lie on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskrcnn.loss import losses
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import postprocess
from tests.maskrcnn.settings import settings
from tests.maskrcnn.test_loss import KINDS, batch
from tests.single_stage_detector.test_recording import OnDeviceOnly


def on_device(edges, edge_of, regions, box_of, size):
    return torch.zeros(*box_of.shape, size, size, dtype=torch.bool, device=box_of.device)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4", "proposals, FPN", "by image", "half-open"])
def test_nothing_waits_for_the_device(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = batch().map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        with torch.device("cuda"):
            model = MaskRCNN(settings(*KINDS[kind]))
        with OnDeviceOnly():
            terms = losses(model, given, on_device)
            found = postprocess(model, given.images, given.extent)
    assert {t.device.type for t in (*terms.values(), found.boxes)} == {"cuda"}
    assert (found.masks is not None) == model.makes_masks
