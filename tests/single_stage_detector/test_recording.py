"""Whether forward pass, loss and detection can be recorded: checked with tensors that only claim to lie on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detcore import backend
from detcore.data import Batch
from detcore.data.synthetic import synthetic_batches
from single_stage_detector.data import detect
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet

SIZE, CLASSES = (128, 128), 5


class OnDeviceOnly(TorchDispatchMode):
    """Fails where a value comes from the host or goes there, which is where a recording would end."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), outputs))
        assert "_local_scalar_dense" not in str(func), "a value is read"
        # A number becomes a tensor without dimensions, which a kernel takes as an argument.
        host = [t for t in made if t.device.type == "cpu"] + [t for t in read if t.device.type == "cpu" and t.ndim]
        assert not host, f"{func} works on the host"
        return outputs


@pytest.fixture
def setting():
    """(model, batch, backend), fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cpu = next(synthetic_batches(CLASSES, SIZE, 2, 10, 0))
        with torch.device("cuda"):
            model = RetinaNet("resnet18", CLASSES, SIZE, "batch", 5, 32, 1, (16, 32, 64, 128, 256))
        batch = Batch(*(torch.empty_like(t, device="cuda") for t in on_cpu))
        yield model, batch, backend.Backend(torch.device("cuda"), "fp32")


@torch.no_grad()
def test_forward_pass_and_loss_stay_on_the_device(setting):
    model, batch, _ = setting
    with OnDeviceOnly():
        terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
    assert {t.device.type for t in terms.values()} == {"cuda"}


@torch.no_grad()
def test_detection_stays_on_the_device(setting):
    model, batch, device = setting
    model.eval()
    ids = torch.empty(CLASSES, dtype=torch.int64, device="cuda")
    with OnDeviceOnly():
        found = detect(model, batch, device, ids)
    assert found.shape == (2 * 300, 7)
