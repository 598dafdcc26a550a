"""ImageNet weights: torchvision's network, NVIDIA's written down again, the Lite package's names, unfit files."""

import hashlib
import re

import pytest
import torch
import torchvision.models as zoo

from detcore import UserError
from detcore.nn.efficientnet import EfficientNet, torchvision_weights
from detcore.nn.efficientnet_weights import load_weights
from tests.detcore.nn.nvidia import NvidiaB0, pixels, same, unsettled


def saved(tmp_path, name: str, state: dict) -> str:
    path = tmp_path / name
    torch.save(state, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])
def test_torchvisions_backbone(tmp_path, number):
    """Its own outputs, from its own file."""
    theirs = unsettled(getattr(zoo, f"efficientnet_b{number}")())
    model = EfficientNet(f"efficientnet_b{number}", eps=1e-5).eval()
    path = saved(tmp_path, "weights.pth", theirs.state_dict())
    assert str(load_weights(model, path)) == path
    x, maps = pixels(), []
    for i, stage in enumerate(theirs.features[:8]):
        x = stage(x)
        maps += [x] if i in (3, 5, 7) else []
    same(model(pixels()), maps)


@torch.no_grad()
def test_a_network_with_another_eps(tmp_path):
    """1e-3 where torchvision's weights want 1e-5: the outputs agree, which those of the weights as they are don't."""
    path = saved(tmp_path, "weights.pth", unsettled(zoo.efficientnet_b0()).state_dict())
    right, other = (EfficientNet("efficientnet_b0", eps=eps).eval() for eps in (1e-5, 1e-3))
    for model in (right, other):
        load_weights(model, path)
    expected = list(right(pixels()))
    same(other(pixels()), expected)
    other.load_state_dict(right.state_dict())
    with pytest.raises(AssertionError):
        same(other(pixels()), expected)


@torch.no_grad()
def test_nvidias_backbone(tmp_path):
    """jocbackbone: with eps 1e-3, and layers after the last block that detection does not use."""
    theirs, model = unsettled(NvidiaB0()), EfficientNet("efficientnet_b0", eps=1e-5).eval()
    load_weights(model, saved(tmp_path, "jocbackbone_statedict_B0.pth", theirs.state_dict()))
    same(model(pixels()), theirs(pixels()))


def test_weights_of_the_lite_package(tmp_path):
    """Its names, written from ours by its rule; efficientdet/test_effdet.py has its real weights."""
    model, source = (EfficientNet("efficientnet_lite0", same=True) for _ in range(2))
    depths = source.depths
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

    state = {theirs(k): v for k, v in unsettled(source).state_dict().items()}
    head = {"_conv_head.weight": torch.zeros(1), "_bn1.bias": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    saved(tmp_path, "lite.pth", state | head)
    digest = hashlib.sha256((tmp_path / "lite.pth").read_bytes()).hexdigest()[:8]
    named = (tmp_path / "lite.pth").rename(tmp_path / f"efficientnet-lite0-{digest}.pth")
    load_weights(model, named)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_torchvisions_files_are_looked_for_where_torch_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"no weights for efficientnet_b0: looked at .*b0_rwightman-7f5810bc.pth; fetch"
    ):
        load_weights(EfficientNet("efficientnet_b0"))
    with pytest.raises(UserError, match="torchvision has no weights for efficientnet_lite0: name a file"):
        load_weights(EfficientNet("efficientnet_lite0"))
    assert torchvision_weights("efficientnet_b5") == ("efficientnet_b5_lukemelas-1a07897c.pth", 1e-3)


def test_files_that_do_not_fit(tmp_path):
    model = EfficientNet("efficientnet_b0")
    other = saved(tmp_path, "b1.pth", zoo.efficientnet_b1().state_dict())
    with pytest.raises(UserError, match=r"b1.pth does not fit this model: unexpected blocks.0.1.conv_dw.weight"):
        load_weights(model, other)
    wrong = saved(tmp_path, "b0-00000000.pth", {})
    with pytest.raises(UserError, match="is damaged: its sha256 begins with"):
        load_weights(model, wrong)
