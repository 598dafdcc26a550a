"""Whether forward pass, loss and detection can be recorded: checked with tensors that only claim to lie on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detcore.data.synthetic import synthetic_batches
from detcore.detection.detector import detect
from detcore.device import native
from detcore.device.cuda import CudaBackend
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from tests.detcore.device.streams import logged_streams
from tests.detcore.device.tape import TapeRecorder

SIZE, CLASSES = (128, 128), 5
VARIANTS = ("merged_groups", "conv_epilogues", "frozen_stage", "stem")


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


@contextmanager
def fakes(backbone: str, norm: str, trainable_layers: int) -> Iterator[tuple]:
    """(model, batch, backend), fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cpu = next(synthetic_batches(CLASSES, SIZE, 2, 10, 0))
        with torch.device("cuda"):
            model = RetinaNet(backbone, CLASSES, SIZE, norm, trainable_layers, 32, 1, (16, 32, 64, 128, 256))
        batch = on_cpu.map(lambda t: torch.empty_like(t, device="cuda"))
        yield model, batch, CudaBackend(torch.device("cuda"), "fp32")


@pytest.fixture(params=["", "class_bias", "residual_gradient", "multi_cast", "small_levels"])
def setting(request, monkeypatch):
    """(model, batch, backend), fake: with batch statistics as it is, with frozen ones in each variant."""
    variants = [request.param] if request.param else []
    norm, layers = ("frozen", 3) if variants else ("batch", 5)
    with fakes("resnet18", norm, layers) as made, logged_streams(monkeypatch), native.using("auto", *variants):
        yield made


@torch.no_grad()
def test_forward_pass_and_loss_stay_on_the_device(setting):
    model, batch, _ = setting
    with OnDeviceOnly():
        terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
    assert {t.device.type for t in terms.values()} == {"cuda"}


def plainly(x, weight, bias, *geometry):
    """What stands in for cuDNN's fused convolution, which fake tensors don't know."""
    return F.relu(F.conv2d(x, weight, bias, *geometry))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_stay_on_the_device(monkeypatch, variant):
    used = []
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: used.append(a) or plainly(*a))
    monkeypatch.setattr(
        torch, "cudnn_convolution_add_relu", lambda x, w, z, alpha, *a: used.append(a) or plainly(x, w, *a)
    )
    monkeypatch.setattr(native, "has", lambda op, device: device == "cuda")
    with fakes("resnext50_32x4d", "frozen", 0) as (model, batch, _), native.using("auto", variant):
        with OnDeviceOnly():
            terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
        assert {t.device.type for t in terms.values()} == {"cuda"}
    assert len(used) == {"conv_epilogues": 48 + 2 * 5, "frozen_stage": 48}.get(variant, 0)


@pytest.mark.parametrize(
    "variants", [*((v,) for v in VARIANTS), (*VARIANTS, "residual_gradient", "multi_cast")], ids=",".join
)
def test_a_step_with_variants_can_be_replayed(variants):
    """Forward and backward on the CPU, written down and done again for other images: what the step itself gives."""
    torch.manual_seed(0)
    model = RetinaNet("resnext50_32x4d", CLASSES, (64, 64), fpn_channels=32, head_convs=1, trainable_layers=1)
    model = model.to(memory_format=torch.channels_last)
    learning = [p for p in model.parameters() if p.requires_grad]
    first, second = (next(synthetic_batches(CLASSES, (64, 64), 1, 10, seed)) for seed in (0, 1))
    given = first.map(torch.clone)

    def step() -> dict[str, torch.Tensor]:
        terms = losses(model(given.images), model.anchors, given.boxes, given.labels)
        gradients = torch.autograd.grad(sum(terms.values()), learning)
        return {"loss": sum(terms.values()).detach(), "gradients": torch.cat([g.flatten() for g in gradients])}

    with native.using("auto", *variants):
        replay = TapeRecorder().record(step)
        for buffer, tensor in zip(given, second):
            buffer.copy_(tensor)
        again = {name: value.clone() for name, value in replay().items()}
        expected = step()
    for name, value in expected.items():
        assert value.isfinite().all() and value.norm() > 0
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_detection_stays_on_the_device(setting):
    model, batch, device = setting
    model.eval()
    ids = torch.empty(CLASSES, dtype=torch.int64, device="cuda")
    with OnDeviceOnly():
        found = detect(DETECTOR, model, batch, device, ids)
    assert found.shape == (2 * 300, 7)
