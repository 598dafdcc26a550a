"""The network: parameter counts and outputs of the originals, shapes, initialisation, autocast, errors."""

import json
import math
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from detcore import UserError
from detcore.device import native
from detcore.nn import norm_folding
from detcore.ops.norm_act import norm_act
from efficientdet import bifpn
from efficientdet.architectures import ARCHITECTURES
from efficientdet.bifpn import FUSIONS, Fusion, nodes
from efficientdet.model import EfficientDet
from efficientdet.ops.fuse import fuse

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "efficientdet.json").read_text())
COUNTS = {**GOLDEN["parameter_counts"], **GOLDEN["parameter_counts_effdet"]}


def on_meta(name: str, **options) -> EfficientDet:
    with torch.device("meta"):
        return EfficientDet(name, **options)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the golden values: drawn by name, so that the order does not matter."""
    random = np.random.RandomState(crc32(name.encode()))
    if name.endswith(("running_var", "edge_weights")):
        return random.uniform(0.5, 1.5, shape)
    if name.endswith(("running_mean", ".bias")):
        return 0.1 * random.standard_normal(shape)
    if len(shape) == 1:
        return random.uniform(0.5, 1.5, shape)
    return random.standard_normal(shape) * math.sqrt(2 / np.prod(shape[1:]))


def fill(model: EfficientDet) -> EfficientDet:
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(drawn(key, tuple(value.shape))))
    return model


def images(count: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts(name):
    known = {"efficientdet_d4": "efficientdet_d4_without_redundant_bias", "efficientdet_d4_legacy": "efficientdet_d4"}
    model = on_meta(name)
    assert parameters(model) == COUNTS[known.get(name, name)]
    backbone = GOLDEN["backbone_parameter_counts"].get(ARCHITECTURES[name].backbone)
    if backbone:
        assert parameters(model.backbone) == backbone
        assert list(model.backbone.channels) == GOLDEN["backbone_feature_channels"][ARCHITECTURES[name].backbone]


def test_parameter_counts_of_options():
    assert parameters(on_meta("efficientdet_d0", redundant_bias=True)) == COUNTS["efficientdet_d0_with_redundant_bias"]
    assert parameters(on_meta("efficientdet_d0", num_classes=3)) == COUNTS["efficientdet_d0_3_classes"]
    assert on_meta("efficientdet_d0").class_net.predict.conv_pw.out_channels == 810


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in GOLDEN["forward"] if name != "about"])
def test_outputs_are_those_of_the_original(name):
    """In float64: single outputs of lite0 in float32 depend on the processor and its threads by as much as the golden
    values, which are float32's, are allowed to be wrong."""
    golden = GOLDEN["forward"][name]
    model = fill(EfficientDet(name, image_size=(128, 128)).eval()).double()
    first = model.state_dict()["backbone.conv_stem.weight"].flatten()[:3].tolist()
    assert first == pytest.approx([-0.02894133, -0.08156652, -0.08428181])
    pixels = torch.from_numpy(np.random.RandomState(0).randn(1, 3, 128, 128))
    logits, deltas = model.predict(pixels)
    for found, expected in (
        (model.backbone(pixels), golden["backbone"]), (logits, golden["logits"]), (deltas, golden["deltas"])
    ):  # fmt: skip
        assert [float(x.abs().mean()) for x in found] == pytest.approx(expected, rel=1e-4)
    assert float(logits[0][0, 0, 0]) == pytest.approx(golden["first_logits"], rel=2e-3)
    assert float(deltas[0][0, 0, 1]) == pytest.approx(golden["first_dy"], rel=1e-3, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0", "tf_efficientdet_lite0"])
def test_evaluation_folds_the_norms_into_the_convolutions(name):
    """The same outputs as without, for convolutions with a bias, with TensorFlow's padding, and of several norms; and
    always of the present weights."""
    model = fill(EfficientDet(name, 3, (64, 64)).eval()).double()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: seen.append(1))
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for _ in range(2):
        folded = model.predict(pixels)
        assert not seen
        with torch.enable_grad():
            plain = model.predict(pixels)
        assert len(seen) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        for a, b in zip([*folded[0], *folded[1]], [*plain[0], *plain[1]], strict=True):
            assert torch.allclose(a, b.detach(), rtol=1e-9, atol=1e-9 * float(b.abs().max()))
        seen.clear()
        for parameter in model.parameters():
            parameter.mul_(1.1)


def test_nodes_are_those_of_the_specification():
    strides = [8 * 2**level for level, _ in nodes(5)]
    assert strides == [64, 32, 16, 8, 16, 32, 64, 128]
    assert [n for _, n in nodes(5)] == [[3, 4], [2, 5], [1, 6], [0, 7], [1, 7, 8], [2, 6, 9], [3, 5, 10], [4, 11]]


@torch.no_grad()
def test_fusion_by_hand():
    """A node of three maps, one of them finer and one coarser, for each method."""
    fine, own, coarse = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)
    maps = [own, torch.nn.functional.max_pool2d(fine, 3, 2, 1), coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)]
    edges = torch.tensor([0.5, -1.0, 2.0])
    factors = {
        "fastattn": torch.tensor([0.5, 0, 2.0]) / 2.5001, "attn": edges.exp() / edges.exp().sum(), "sum": torch.ones(3)
    }  # fmt: skip
    for method in FUSIONS:
        node = Fusion([(1, 4, 0), (0, 4, -1), (2, 4, 1)], 4, method, same=False, bias=False)
        if method != "sum":
            node.edge_weights.copy_(edges)
        expected = sum(f * m for f, m in zip(factors[method], maps))
        torch.testing.assert_close(node([fine, own, coarse]), expected)


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0", "tf_efficientdet_lite0"])
def test_nodes_of_one_op_are_a_variant(monkeypatch, name):
    """With it all nodes go to the op, and pyramid and gradients are the same; without, none does."""
    seen = []
    monkeypatch.setattr(bifpn, "fuse", lambda *given: seen.append(given[-1]) or fuse(*given))
    pyramid = fill(EfficientDet(name, 3, (128, 128))).fpn.eval()
    maps = [torch.randn(2, c, 128 // s, 128 // s) for c, s in zip((40, 112, 320), (8, 16, 32), strict=True)]
    found = []
    for variants in ((), ("pyramid_nodes",)):
        with native.using("auto", *variants):
            levels = pyramid(maps)
        found.append([*levels, *torch.autograd.grad(sum(x.square().mean() for x in levels), pyramid.parameters())])
        assert seen == ["relu6" if "lite" in name else "silu"] * len(nodes(5)) * 3 * len(variants)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))


@torch.no_grad()
def test_norms_with_activations_of_one_op_are_a_variant(monkeypatch):
    """62 of D0 in training: the stem, 15 blocks with two and one with one, 2 heads of 3 convolutions on 5 levels."""
    seen = []
    monkeypatch.setattr(norm_folding, "norm_act", lambda *given: seen.append(given[-1]) or norm_act(*given))
    model = fill(EfficientDet("tf_efficientdet_d0", 3, (128, 128), drop_path=0.0)).train()
    found, before = [], {key: value.clone() for key, value in model.state_dict().items()}
    for variants in ((), ("norm_activations",)):
        model.load_state_dict(before)
        with native.using("auto", *variants):
            logits, _ = model(images(4, (128, 128)))
        found.append([logits[0], *(value.clone() for value in model.state_dict().values())])
        assert seen == ["silu"] * 62 * len(variants)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_shapes_and_gradients(fusion):
    """A wide image and a few classes; every parameter gets a gradient."""
    model = EfficientDet("efficientdet_d0", 3, (128, 256), fusion=fusion)
    logits, deltas = model(images(2, (128, 256)))
    cells = [16 * 32, 8 * 16, 4 * 8, 2 * 4, 1 * 2]
    assert [tuple(x.shape) for x in logits] == [(2, 9 * n, 3) for n in cells]
    assert [tuple(x.shape) for x in deltas] == [(2, 9 * n, 4) for n in cells]
    assert all(x.is_contiguous() for x in (*logits, *deltas)) and len(model.anchors) == 9 * sum(cells)
    torch.cat([x.flatten() for x in (*logits, *deltas)]).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@torch.no_grad()
def test_a_size_that_no_stride_divides():
    model = EfficientDet("tf_efficientdet_lite0", 1, (160, 96)).eval()
    logits, _ = model(images(1, (160, 96)))
    assert sum(x.shape[1] for x in logits) == len(model.anchors)
    assert [x.shape[1] // 9 for x in logits] == [20 * 12, 10 * 6, 5 * 3, 3 * 2, 2 * 1]


@torch.no_grad()
def test_fresh_heads_expect_nothing():
    model = EfficientDet("efficientdet_d0", 5, (128, 128))
    assert torch.cat(model(images(2, (128, 128)))[0], 1).sigmoid().mean() == pytest.approx(0.01, rel=0.5)
    assert model.box_net.predict.conv_pw.bias.abs().max() == 0
    assert model.class_net.conv_rep[0].conv_pw.weight.std() == pytest.approx(64**-0.5, rel=0.05)
    assert model.box_net.conv_rep[0].conv_dw.weight.std() == pytest.approx(1 / 3, rel=0.1)
    largest = model.fpn.cell[0].fnode[0].after_combine.conv.conv_pw.weight.abs().max()
    assert largest == pytest.approx(math.sqrt(3 / 64), rel=0.01)


@torch.no_grad()
def test_pixels_are_normalised():
    """By ImageNet's values, and the Lite models' to -1..1."""
    shade = torch.full((1, 3, 128, 128), 200, dtype=torch.uint8)
    for name, value in (("efficientdet_d0", (200 / 255 - 0.456) / 0.224), ("tf_efficientdet_lite0", 400 / 255 - 1)):
        model, seen = EfficientDet(name, 1, (128, 128)).eval(), []
        model.backbone.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        model(shade)
        assert float(seen[0][0, 1, 5, 5]) == pytest.approx(value, rel=1e-5)


def test_autocast_to_bfloat16():
    """Gradients near those of float32, also where P7 has one cell; with statistics that do not amplify rounding."""
    torch.manual_seed(0)
    model = EfficientDet("efficientdet_d0", 3, (128, 128)).eval().to(memory_format=torch.channels_last)
    given, gradients = images(4, (128, 128)), []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits, deltas = model(given)
        assert logits[0].dtype == (torch.bfloat16 if mixed else torch.float32)
        loss = sum(x.float().square().mean() for x in (*logits, *deltas))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    exact, rounded = (torch.cat([g.flatten() for g in grads]) for grads in gradients)
    assert rounded.isfinite().all()
    assert torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.9999


@torch.no_grad()
def test_drop_path_skips_blocks_of_training_images():
    torch.manual_seed(0)
    model = EfficientDet("efficientdet_d0", 1, (128, 128), drop_path=0.8)
    block, x = model.backbone.blocks[5][-1], torch.randn(400, 192, 1, 1)
    skipped = (block(x) == x).all(3).all(2).all(1).float().mean()
    drops = [b.drop for stage in model.backbone.blocks for b in stage]
    assert drops == pytest.approx([0.8 * i / 16 for i in range(16)])
    assert float(skipped) == pytest.approx(block.drop, abs=0.1)
    assert not (block.eval()(x) == x).all(3).all(2).all(1).any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"name": "mixdet_m"}, "MixNet or MobileNet backbone"),
        ({"name": "mobiledetv3_large"}, "MixNet or MobileNet backbone"),
        ({"name": "efficentdet_d0"}, "did you mean efficientdet_d0"),
        ({"name": "retinanet"}, "choose one of efficientdet_d0"),
        ({"num_classes": 0}, "at least one class"),
        ({"image_size": (0, 128)}, "must be positive"),
        ({"fusion": "qufpn"}, "choose one of fastattn, attn, sum"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UserError, match=words):
        on_meta(options.pop("name", "efficientdet_d0"), **options)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"images are \(64, 128\)"):
        EfficientDet("efficientdet_d0", 1, (128, 128))(images(1, (64, 128)))
