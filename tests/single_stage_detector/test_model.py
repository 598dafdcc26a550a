"""RetinaNet against torchvision's, golden counts, and the naming of the reference."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detcore import UserError
from detcore.device import native
from detcore.nn.resnet import NORMS
from single_stage_detector.anchors import grids
from single_stage_detector.loss import losses
from single_stage_detector.model import MEAN, STD, FeaturePyramid, RetinaNet, load_reference_state
from tests.single_stage_detector.test_variants import Conversions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "retinanet.json").read_text())
SIZE = (104, 152)
CLASSES = 6
VARIANTS = ("merged_groups", "conv_epilogues", "frozen_stage", "stem")


def torchvision_model(norm: str = "frozen") -> TorchvisionRetinaNet:
    """torchvision's RetinaNet, with weights far enough from their initial values that every one counts."""
    torch.manual_seed(0)
    body = get_model("resnet18", weights=None, norm_layer=NORMS[norm])
    fpn = _resnet_fpn_extractor(body, 5, [2, 3, 4], LastLevelP6P7(256, 256))
    model = TorchvisionRetinaNet(fpn, CLASSES, anchor_generator=_default_anchorgen(), _skip_resize=True)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    for module in [*model.head.modules(), *model.backbone.fpn.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.train()


def small(**changes) -> RetinaNet:
    return RetinaNet(**{"backbone": "resnet18", "num_classes": CLASSES, "image_size": SIZE} | changes).train()


def some_images(count: int = 2, size=SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def reference_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of today's torchvision under the names the MLCommons reference used."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[2] in ("inner_blocks", "layer_blocks"):
            del parts[4]
        if parts[1].endswith("_head") and parts[2] == "conv":
            parts[3] = str(int(parts[3]) * 2)
            del parts[4]
        renamed[".".join(parts)] = value
    return renamed


@pytest.fixture(scope="module")
def full() -> RetinaNet:
    return RetinaNet()


def test_parameter_counts(full):
    expected = GOLDEN["parameter_counts"]

    def count(module: nn.Module, all_of_them: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or all_of_them)

    body = full.backbone["body"]
    assert count(full) == expected["trainable"]
    assert count(full, True) == expected["total_including_frozen_convs"]
    for name in ("layer2", "layer3", "layer4"):
        assert count(getattr(body, name)) == expected["parts"][name]
    assert count(full.backbone["fpn"]) == expected["parts"]["fpn"]
    assert count(full.head) == expected["parts"]["heads"]
    assert count(body.conv1, True) == expected["parts"]["frozen_conv1"]
    assert count(body.layer1, True) == expected["parts"]["frozen_layer1"]
    assert count(body.conv1) == count(body.layer1) == 0


def test_anchors_belong_to_the_model_but_not_to_its_state(full):
    assert full.anchors.shape == (GOLDEN["anchors"]["count"], 4)
    assert not [key for key in full.state_dict() if key.startswith(("anchors", "pixel"))]


def test_initialisation(full):
    classes, regression = full.head["classification_head"], full.head["regression_head"]
    assert torch.allclose(classes.cls_logits.bias, torch.tensor(GOLDEN["class_prior_bias"]))
    convs = [m for head in (classes, regression) for m in head.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert conv.weight.mean().item() == pytest.approx(0, abs=3e-4)
        assert conv is classes.cls_logits or not conv.bias.any()
    for conv in full.backbone["fpn"].modules():
        if isinstance(conv, nn.Conv2d):
            bound = (3 / conv.weight[0].numel()) ** 0.5  # kaiming-uniform with slope 1
            assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert conv.weight.abs().max().item() <= bound
            assert not conv.bias.any()


def test_reference_parameter_names():
    keys = set(small().state_dict())
    assert keys == set(reference_names(torchvision_model().state_dict()))
    assert {
        "backbone.body.conv1.weight",
        "backbone.fpn.inner_blocks.0.weight",
        "backbone.fpn.layer_blocks.2.bias",
        "backbone.fpn.extra_blocks.p6.weight",
        "head.classification_head.conv.6.weight",
        "head.classification_head.cls_logits.weight",
        "head.regression_head.conv.0.weight",
        "head.regression_head.bbox_reg.bias",
    } <= keys


@pytest.mark.parametrize("norm", list(NORMS))
def test_outputs_and_gradients_equal_torchvisions(norm):
    theirs = torchvision_model(norm)
    ours = small(norm=norm, trainable_layers=5)
    load_reference_state(ours, theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    images = some_images()
    targets = [
        {"boxes": torch.tensor([[10.0, 12, 60, 80], [70, 20, 120, 60]]).double(), "labels": torch.tensor([1, 5])},
        {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    boxes, labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    boxes[0, :2], labels[0, :2] = targets[0]["boxes"], targets[0]["labels"]

    # torchvision's image list would pad to multiples of 32, so its parts are called one by one.
    features = list(theirs.backbone(normalised(images).double()).values())
    expected = theirs.head(features)
    logits, deltas = ours(images)
    torch.testing.assert_close(torch.cat(logits, 1), expected["cls_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(deltas, 1), expected["bbox_regression"], rtol=1e-5, atol=1e-5)

    result = losses((logits, deltas), ours.anchors, boxes, labels)
    reference = theirs.compute_loss(targets, expected, [ours.anchors] * 2)
    sum(result.values()).backward()
    sum(reference.values()).backward()
    torch.testing.assert_close(result["cls"], reference["classification"], rtol=1e-6, atol=0)
    torch.testing.assert_close(result["box"], reference["bbox_regression"], rtol=1e-6, atol=0)
    gradients = reference_names({k: p.grad for k, p in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        scale = gradients[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4 * scale, msg=key)


def test_a_whole_step_equals_torchvisions_program():
    size = (128, 160)  # multiples of 32, which torchvision's own forward keeps
    theirs = torchvision_model()
    ours = small(image_size=size)
    load_reference_state(ours, theirs.state_dict())
    images = some_images(size=size)
    targets = [{"boxes": torch.tensor([[5.0, 6, 70, 90]]), "labels": torch.tensor([2])} for _ in range(2)]
    expected = theirs([image.float() / 255 for image in images], targets)
    boxes, labels = (torch.stack([t[key] for t in targets]) for key in ("boxes", "labels"))
    result = losses(ours(images), ours.anchors, boxes, labels)
    torch.testing.assert_close(result["cls"], expected["classification"], rtol=1e-4, atol=0)
    torch.testing.assert_close(result["box"], expected["bbox_regression"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("names", [dict, reference_names])
def test_checkpoints_in_every_naming_load_alike(prefix, wrapped, names):
    theirs = torchvision_model().state_dict()
    state = {prefix + key: value for key, value in names(theirs).items()}
    model = small()
    load_reference_state(model, {"model": state, "epoch": 3} if wrapped else state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference_names(theirs)[key]), key


def test_frozen_weights_load_into_trainable_norms():
    model = small(norm="batch")
    load_reference_state(model, torchvision_model("frozen").state_dict())
    load_reference_state(small(), torchvision_model("batch").state_dict())


def test_unfitting_checkpoints_are_refused_and_change_nothing():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(model.state_dict())
    state["head.classification_head.cls_logits.bias"] = torch.zeros(7 * 9)
    state["backbone.fpn.extra_blocks.p8.weight"] = torch.zeros(1)
    state["backbone.body.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    del state["head.regression_head.bbox_reg.bias"]
    with pytest.raises(UserError) as error:
        load_reference_state(model, state, "model_3.pth")
    for part in (
        "model_3.pth",
        "cls_logits.bias is [63], needs [54]",
        "unexpected backbone.fpn.extra_blocks.p8.weight",
    ):
        assert part in str(error.value)
    assert "missing head.regression_head.bbox_reg.bias" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="list"):
        load_reference_state(model, {"model": [1, 2]})


def learned(model: RetinaNet, variants: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All outputs in one row, and the gradients, of a step with some variants on."""
    model.zero_grad(set_to_none=True)
    with native.using("auto", *variants):
        outputs = torch.cat([x.flatten() for levels in model(some_images()) for x in levels])
        outputs.square().mean().backward()
    return outputs.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "variants", [("merged_groups",), ("conv_epilogues",), ("frozen_stage",), ("stem",), VARIANTS], ids=",".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variants_compute_the_same(variants, dtype):
    model = small(fpn_channels=32, head_convs=2)
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model = model.to(dtype, memory_format=torch.channels_last)
    expected, gradients = learned(model, ())
    found, others = learned(model, variants)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    assert (found - expected).norm() < tolerance * expected.norm() and others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (others[key] - gradient).norm() < tolerance * gradient.norm(), key


@pytest.mark.parametrize("variant", ["conv_epilogues", "frozen_stage"])
@pytest.mark.parametrize("learning", [False, True])
def test_the_heads_weights_become_narrow_once_for_all_levels(variant, learning):
    model = small(fpn_channels=32, head_convs=2)
    weights = [p for p in model.head.parameters() if p.dim() == 4]
    mixed, gradients = torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learning)
    with native.using("auto", variant), mixed, gradients, Conversions(weights) as seen:
        model(some_images())
    assert len(seen.single) <= len(weights) and seen.passes + len(seen.single) > 0


def test_memory_layout_changes_nothing():
    model = small()
    load_reference_state(model, torchvision_model().state_dict())
    images = some_images()
    expected = model(images)
    for levels, others in zip(model.to(memory_format=torch.channels_last)(images), expected):
        assert len(levels) == len(others) == 5
        for own, other in zip(levels, others):
            assert own.is_contiguous() and other.is_contiguous()
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_outputs_in_channels_last_are_no_copies():
    model = small().to(memory_format=torch.channels_last)
    written = []
    for head, name in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg")):
        model.head[head].get_submodule(name).register_forward_hook(lambda m, args, y: written.append(y))
    logits, deltas = model(some_images())
    assert [x.data_ptr() for x in (*logits, *deltas)] == [y.data_ptr() for y in written]


def test_autocast_keeps_outputs_near_float32():
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas = model(some_images())
    assert {x.dtype for x in (*logits, *deltas)} == {torch.bfloat16}
    for low, exact in zip(logits, model(some_images())[0]):
        torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("size", [(33, 47), (64, 200), (1, 1)])
def test_any_image_size_class_count_and_anchors(size):
    changes = {"num_classes": 1, "fpn_channels": 16, "head_convs": 1, "anchor_sizes": (8, 16, 24, 48, 96)}
    model = small(image_size=size, **changes)
    logits, deltas = model(some_images(1, size))
    assert [x.shape for x in logits] == [(1, 9 * r * c, 1) for r, c in grids(size)]
    assert [x.shape for x in deltas] == [(1, 9 * r * c, 4) for r, c in grids(size)]
    assert sum(x.shape[1] for x in logits) == len(model.anchors)
    assert model.anchors[3].tolist() == [-4, -4, 4, 4]


def test_gradients_reach_what_learns_and_nothing_else():
    model = small(fpn_channels=16)
    sum(x.mean() for levels in model(some_images()) for x in levels).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.body.conv1", "backbone.body.layer1"))
        assert (parameter.grad is None) == frozen, name


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 0}, {"anchor_sizes": (32, 64)}, {"anchor_sizes": (0, 1, 2, 3, 4)}, {"image_size": (0, 10)}],
    ids=str,
)
def test_impossible_models(changes):
    with pytest.raises(UserError):
        small(**changes)


def test_images_of_another_size():
    with pytest.raises(UserError, match="built for"):
        small()(some_images(size=(64, 64)))


def test_gradients_of_maps_of_one_column_in_bf16_are_set_everywhere():
    """torch leaves some of them unset on the CPU: what lay in the memory before shows."""
    torch.manual_seed(0)
    pyramid = FeaturePyramid((8, 8, 8), 16)
    exact = copy.deepcopy(pyramid).double()
    features = [torch.randn(2, 8, size, size) for size in (4, 2, 1)]
    for _ in range(5):
        pyramid.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = pyramid(features)
        rubbish = [torch.full((16, 16, 3, 3), 1e30, dtype=dtype) for dtype in (torch.bfloat16, torch.float32) * 4]
        del rubbish
        sum(out.float().sum() for out in outputs).backward()
        for name in ("p6", "p7"):
            assert pyramid.extra_blocks[name].weight.grad.abs().max() < 1e3
    sum(out.sum() for out in exact([feature.double() for feature in features])).backward()
    for (name, ours), theirs in zip(pyramid.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0.05, atol=0.2, msg=name)
    assert [out.shape[-1] for out in outputs] == [4, 2, 1, 1, 1]
