"""Whether losses and detection can be recorded: with tensors that only claim to lie on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detcore.ops.mask_targets import mask_targets
from maskrcnn.loss import losses
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import postprocess
from tests.maskrcnn.settings import settings
from tests.maskrcnn.test_loss import KINDS, batch
from tests.single_stage_detector.test_recording import OnDeviceOnly


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4", "proposals, FPN", "by image", "half-open"])
def test_nothing_waits_for_the_device(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        edges, edge_of = torch.zeros(3, 50, 4), torch.zeros(3, 50, 2, dtype=torch.int64)
        given = (
            batch()
            ._replace(edges=edges, edge_of=edge_of)
            .map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        )
        with torch.device("cuda"):
            model = MaskRCNN(settings(*KINDS[kind]))
        with OnDeviceOnly():
            terms = losses(model, given, mask_targets)
            found = postprocess(model, given.images, given.extent)
    assert {t.device.type for t in (*terms.values(), found.boxes)} == {"cuda"}
    assert (found.masks is not None) == model.makes_masks
