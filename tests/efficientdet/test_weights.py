"""Whole checkpoints: NVIDIA's with padded classes, averaged weights, parts left out, and files that do not fit."""

import pytest
import torch

from detcore import UserError
from efficientdet.model import EfficientDet
from efficientdet.weights import load_original_state
from tests.detcore.nn.nvidia import SIZE, NvidiaB0, pixels, unsettled


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


@pytest.mark.parametrize("known", [90, 96, 2])
def test_another_number_of_classes(known):
    """Without the layer that predicts them, where that is allowed; the rest is the file's."""
    model, source = EfficientDet("efficientdet_d0", 3, SIZE), EfficientDet("efficientdet_d0", known, SIZE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {"arch": "efficientdet_d0", "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    wanted = rf"somewhere.pth knows {known} classes, the data set has 3: .*--weights-only.*--remove-weights class_net$"
    with pytest.raises(UserError, match=wanted):
        load_original_state(model, state, "somewhere.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert load_original_state(model, state, other_classes=True)
    for name, value in model.state_dict().items():
        own = name.startswith("class_net.predict.conv_pw.")
        assert torch.equal(value, before[name] if own else source.state_dict()[name]), name
    assert not load_original_state(model, before, other_classes=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_files_that_do_not_fit():
    model = EfficientDet("efficientdet_d0", 1, SIZE)
    with pytest.raises(UserError, match=r"x\.pth has no averaged weights"):
        load_original_state(model, {"state_dict": {}}, "x.pth", ema=True)
    with pytest.raises(UserError, match="holds list where a dictionary of weights should be"):
        load_original_state(model, {"state_dict": []})
    count = r"\((\d+) of the model's \1\)"
    wanted = rf"model: missing backbone\.conv_stem\.weight, [\w.]+, [\w.]+, \.\.\. {count}; unexpected fpn\.x$"
    with pytest.raises(UserError, match=wanted):
        load_original_state(model, {"fpn.x": torch.zeros(1)})
