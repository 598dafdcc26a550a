"""RetinaNet's heads in 8-bit floating point (variant fp8_heads): which layers, how near, that a step is recorded."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detcore.device import native
from single_stage_detector.loss import losses
from single_stage_detector.model import Head, RetinaNet
from tests.single_stage_detector.test_recording import CLASSES, OnDeviceOnly, setting  # noqa: F401, a fixture

SIZE = (104, 152)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_near(dtype):
    """Names, types and layout stay; values differ by some percent, and do differ."""
    torch.manual_seed(0)
    model = RetinaNet("resnet18", 6, SIZE).train()
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            nn.init.zeros_(module.bias)  # else bfloat16 rounds class logits near -4.6
    names = list(model.state_dict())

    def gradients(outputs: tuple[list, list]) -> tuple[torch.Tensor, ...]:
        loss = sum(level.float().square().mean() for levels in outputs for level in levels)
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = model(images)
        with native.using("auto", "fp8_heads"):
            found = model(images)
    assert list(model.state_dict()) == names
    for a, b in zip(gradients(found), gradients(expected), strict=True):
        assert a.dtype == b.dtype and (a - b).norm() < 0.3 * b.norm()
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert (a.dtype, a.shape, a.is_contiguous()) == (b.dtype, b.shape, True)
        off, size = (a - b).float().square().mean().sqrt(), b.float().std()
        assert 0.005 * size < off < 0.25 * size


@pytest.mark.parametrize(("output", "in_8_bits"), [("cls_logits", 3), ("bbox_reg", 2)])
def test_layers_are_towers_and_class_logits(output, in_8_bits):
    head, x = Head(32, 2, 9, 4, output), torch.zeros(1, 32, 4, 4)
    assert head._in_8_bits(x) == {}
    with native.using("auto", "fp8_heads"):
        found = head._in_8_bits(x)
        with torch.no_grad():
            assert head._in_8_bits(x) == {}
    assert len(found) == in_8_bits and (head.get_submodule(output).weight in found) == (output == "cls_logits")


def test_the_compiler_traces_a_head():
    torch.manual_seed(0)
    head, levels = Head(32, 1, 9, 4, "cls_logits"), [torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)]

    def loss() -> torch.Tensor:
        return torch.cat(head(levels), 1).square().sum()

    with native.using("auto", "fp8_heads"):
        eager = torch.autograd.grad(loss(), list(head.parameters()))
        compiled = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(), list(head.parameters())
        )
    for a, b in zip(eager, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_forward_stays_on_the_device(setting, monkeypatch):  # noqa: F811
    model, batch, _ = setting
    monkeypatch.setattr(native, "_no_fp8", lambda device: "")
    with native.using("auto", "fp8_heads"), OnDeviceOnly():
        terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
    assert {t.device.type for t in terms.values()} == {"cuda"} and terms["cls"].requires_grad


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gradients_read_no_value():
    """On the CPU, since tensors that only claim to lie on a GPU have no backward pass."""
    torch.manual_seed(0)
    head = Head(32, 2, 9, CLASSES, "cls_logits")
    with native.using("auto", "fp8_heads"), Seen() as seen:
        torch.cat(head([torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)]), 1).sum().backward()
    # Layers times levels, twice but for the first layer's input, which gets no gradient.
    assert sum("detcore_conv3x3.convolve" in name for name in seen.names) == 10
    assert not [name for name in seen.names if "_local_scalar_dense" in name or "nonzero" in name]
