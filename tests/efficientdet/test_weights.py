"""Weights of others: torchvision's network, NVIDIA's written down again, effdet's names, and files that do not fit."""

import hashlib
import re
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn

from detcore import UserError
from detcore.nn.efficientnet import torchvision_weights
from efficientdet.model import EfficientDet
from efficientdet.weights import load_backbone, load_original_state

SIZE = (64, 64)


def unsettled(module: nn.Module) -> nn.Module:
    """With statistics and scales as after some training, small variances among them, so that eps counts."""
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.002, 1.5, generator=generator)
            m.running_mean.normal_(0, 0.1, generator=generator)
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(m.bias, 0, 0.1, generator=generator)
    return module.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def same(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def saved(tmp_path, name: str, state: dict) -> str:
    path = tmp_path / name
    torch.save(state, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])
def test_torchvisions_backbone(tmp_path, number):
    """Its own outputs, from its own file."""
    theirs = unsettled(getattr(zoo, f"efficientnet_b{number}")())
    model = EfficientDet(f"efficientdet_d{number}", 1, SIZE).eval()
    path = saved(tmp_path, "weights.pth", theirs.state_dict())
    assert str(load_backbone(model, path)) == path
    x, maps = pixels(), []
    for i, stage in enumerate(theirs.features[:8]):
        x = stage(x)
        maps += [x] if i in (3, 5, 7) else []
    same(model.backbone(pixels()), maps)


@torch.no_grad()
def test_torchvisions_backbone_in_a_model_with_another_eps(tmp_path):
    """tf_d0's normalisation adds 1e-3 where torchvision's weights want 1e-5; padding apart, the outputs agree."""
    theirs = unsettled(zoo.efficientnet_b0())
    path = saved(tmp_path, "weights.pth", theirs.state_dict())
    models = [EfficientDet(name, 1, SIZE).eval() for name in ("efficientdet_d0", "tf_efficientdet_d0")]
    for model in models:
        load_backbone(model, path)
        for module in model.modules():
            if getattr(module, "by_size", False):
                module.by_size, module.padding = False, (module.kernel_size[0] // 2,) * 2
    assert {m.bn1.eps for m in (models[0].backbone, models[1].backbone)} == {1e-5, 1e-3}
    same(models[1].backbone(pixels()), list(models[0].backbone(pixels())))


class Block(nn.Module):
    """MBConv as NVIDIA's program has it, with its names and linear layers."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        norm, middle = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01), inputs * expansion

        def conv(i, o, k=1, s=1, g=1):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), norm(o))

        self.expand_conv = conv(inputs, middle) if expansion > 1 else None
        names = OrderedDict(squeeze=nn.Linear(middle, inputs // 4), expand=nn.Linear(inputs // 4, middle))
        self.squeeze_and_excitation = nn.Sequential(names)
        self.depthwise_conv = conv(middle, middle, kernel, stride, middle)
        self.project_conv = conv(middle, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        y = x if self.expand_conv is None else silu(self.expand_conv(x))
        y = silu(self.depthwise_conv(y))
        squeeze = self.squeeze_and_excitation
        y = y * squeeze.expand(silu(squeeze.squeeze(y.mean((2, 3))))).sigmoid()[:, :, None, None]
        y = self.project_conv(y)
        return y + x if self.shortcut else y


class NvidiaB0(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(32, eps=1e-3, momentum=0.01)
        self.input_conv = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), norm)
        table = [
            (32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 24, 3, 1, 6), (24, 40, 5, 2, 6), (40, 40, 5, 1, 6),
            (40, 80, 3, 2, 6), (80, 80, 3, 1, 6), (80, 80, 3, 1, 6), (80, 112, 5, 1, 6), (112, 112, 5, 1, 6),
            (112, 112, 5, 1, 6), (112, 192, 5, 2, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6),
            (192, 320, 3, 1, 6),
        ]  # fmt: skip
        self.mbconv_blocks = nn.Sequential(*(Block(*row) for row in table))
        self.features_conv = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = nn.functional.silu(self.input_conv(x)), []
        for i, block in enumerate(self.mbconv_blocks):
            x = block(x)
            maps += [x] if i in (4, 10, 15) else []
        return maps


@torch.no_grad()
def test_nvidias_backbone(tmp_path):
    """jocbackbone: with eps 1e-3, and layers after the last block that detection does not use."""
    theirs, model = unsettled(NvidiaB0()), EfficientDet("efficientdet_d0", 1, SIZE).eval()
    load_backbone(model, saved(tmp_path, "jocbackbone_statedict_B0.pth", theirs.state_dict()))
    same(model.backbone(pixels()), theirs(pixels()))


@torch.no_grad()
@pytest.mark.parametrize("classes, padded", [(90, 96), (3, 8), (90, 90)])
def test_nvidias_checkpoint(classes, padded):
    """A whole model trained with the fused loss, whose classes are padded; averaged weights beside the plain ones."""
    theirs, source = unsettled(NvidiaB0()), unsettled(EfficientDet("efficientdet_d0", padded, SIZE))
    rest = {k: v for k, v in source.state_dict().items() if not k.startswith("backbone.")}
    used = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("features_conv.", "fc."))}
    averaged = {"module." + k: v for k, v in rest.items()} | {"module.backbone." + k: v for k, v in used.items()}
    plain = {k: v + 1 if v.is_floating_point() else v for k, v in averaged.items()}
    saved_state = {"epoch": 3, "arch": "efficientdet_d0", "state_dict": plain, "state_dict_ema": averaged}
    model = EfficientDet("efficientdet_d0", classes, SIZE).eval()
    load_original_state(model, saved_state, ema=True)
    pyramid = source.fpn(theirs(pixels()))
    logits, _ = model.predict(pixels())
    for ours, wide in zip(logits, source.class_net(pyramid), strict=True):
        torch.testing.assert_close(ours, wide[..., :classes], rtol=1e-4, atol=1e-4)
    load_original_state(model, saved_state)
    assert torch.equal(model.fpn.cell[0].fnode[0].combine.edge_weights, torch.full((2,), 2.0))


@torch.no_grad()
def test_class_channels_padded_at_the_end():
    """812 channels for 810: two of zeros at the end."""
    model, source = (EfficientDet("efficientdet_d0", 90, SIZE).eval() for _ in range(2))
    state = source.state_dict()
    for key in ("weight", "bias"):
        name = f"class_net.predict.conv_pw.{key}"
        state[name] = torch.cat((state[name], torch.zeros_like(state[name][:2])))
    load_original_state(model, {"model." + k: v for k, v in state.items()})
    assert torch.equal(model.class_net.predict.conv_pw.bias, source.class_net.predict.conv_pw.bias)
    state[name][-1] = 1
    with pytest.raises(UserError, match=r"conv_pw.bias is \[812\], needs \[810\]"):
        load_original_state(model, state)


def test_entries_that_are_not_wanted():
    """--remove-weights: another number of classes keeps the heads it was made with."""
    model, source = EfficientDet("efficientdet_d0", 3, SIZE), EfficientDet("efficientdet_d0", 90, SIZE)
    before = model.class_net.predict.conv_pw.weight.clone()
    state = source.state_dict() | {"anchors.boxes": torch.zeros(5, 4)}
    load_original_state(model, state, remove=("class_net", "box_net", "anchor"))
    assert torch.equal(model.class_net.predict.conv_pw.weight, before)
    assert torch.equal(model.backbone.conv_stem.weight, source.backbone.conv_stem.weight)
    with pytest.raises(UserError, match=r"somewhere.pth does not fit.*conv_pw.weight is \[810, 64, 1, 1\], needs \[27"):
        load_original_state(model, source.state_dict(), "somewhere.pth")


def test_weights_of_the_lite_package(tmp_path):
    """Its names, written from ours by its rule; see also the comparison with its real weights in test_effdet.py."""
    model, source = EfficientDet("tf_efficientdet_lite0", 1, SIZE), EfficientDet("tf_efficientdet_lite0", 1, SIZE)
    depths = source.backbone.depths
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {
        "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
        "conv_pwl": "_project_conv", "bn3": "_bn2",
    }  # fmt: skip

    def theirs(key: str) -> str:
        if found := re.fullmatch(r"blocks\.(\d)\.(\d+)\.(\w+)\.(\w+)", key):
            stage, repeat = int(found[1]), int(found[2])
            return f"_blocks.{sum(depths[:stage]) + repeat}.{(others if stage else first)[found[3]]}.{found[4]}"
        return key.replace("conv_stem", "_conv_stem").replace("bn1", "_bn0")

    state = {theirs(k): v for k, v in unsettled(source).backbone.state_dict().items()}
    head = {"_conv_head.weight": torch.zeros(1), "_bn1.bias": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    path = saved(tmp_path, "lite.pth", state | head)
    digest = hashlib.sha256((tmp_path / "lite.pth").read_bytes()).hexdigest()[:8]
    named = (tmp_path / "lite.pth").rename(tmp_path / f"efficientnet-lite0-{digest}.pth")
    load_backbone(model, named)
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)
    assert path.endswith("lite.pth")


def test_torchvisions_files_are_looked_for_where_torch_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"no weights for efficientnet_b0: looked at .*b0_rwightman-7f5810bc.pth; fetch"
    ):
        load_backbone(EfficientDet("efficientdet_d0", 1, SIZE))
    with pytest.raises(UserError, match="torchvision has no weights for efficientnet_lite0: name a file"):
        load_backbone(EfficientDet("tf_efficientdet_lite0", 1, SIZE))
    assert torchvision_weights("efficientnet_b5") == ("efficientnet_b5_lukemelas-1a07897c.pth", 1e-3)


def test_files_that_do_not_fit(tmp_path):
    model = EfficientDet("efficientdet_d0", 1, SIZE)
    other = saved(tmp_path, "b1.pth", zoo.efficientnet_b1().state_dict())
    with pytest.raises(UserError, match=r"b1.pth does not fit this model: unexpected blocks.0.1.conv_dw.weight"):
        load_backbone(model, other)
    wrong = saved(tmp_path, "b0-00000000.pth", {})
    with pytest.raises(UserError, match="is damaged: its sha256 begins with"):
        load_backbone(model, wrong)
    with pytest.raises(UserError, match=r"x\.pth has no averaged weights"):
        load_original_state(model, {"state_dict": {}}, "x.pth", ema=True)
    with pytest.raises(UserError, match="holds list where a dictionary of weights should be"):
        load_original_state(model, {"state_dict": []})
    with pytest.raises(UserError, match=r"does not fit this model: missing backbone\.conv_stem\.weight"):
        load_original_state(model, {"fpn.x": torch.zeros(1)})
