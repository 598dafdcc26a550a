"""Weights of other programs in this network: their names, their normalisation, their number of classes.

This is the one place that knows the names of others. The network's own are maskrcnn-benchmark's, without its `stem.`.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detcore import UserError
from detcore.config import DEFAULT, load
from detcore.nn.weights import load_exactly
from detcore.training.checkpoint import refuse_other_program
from maskrcnn.config import Config
from maskrcnn.flags import translate_flags
from maskrcnn.weight_files import find, read, state_of

_BODY, _HEAD, _MASK = "backbone.body.", "roi_heads.box.feature_extractor.", "roi_heads.mask.feature_extractor."
_STAGE_OF_C4 = _HEAD + "head.layer4."
_PARTS = (
    _BODY, "backbone.fpn.", "rpn.", _STAGE_OF_C4, _HEAD, "roi_heads.box.predictor.", _MASK, "roi_heads.mask.predictor.",
)  # fmt: skip
"""What a file has as a whole, or not at all."""

_OF_CLASSES = ("roi_heads.box.predictor.", "roi_heads.mask.predictor.mask_fcn_logits.")
_CLASSES = "roi_heads.box.predictor.cls_score.weight"
_Rename = Callable[[str], str | None]


class _Source(NamedTuple):
    """A program that writes weights.

    eps: of its frozen normalisation, None for the network's own. rename: its name of an entry into the network's own,
    None for what the network has not. advice: what its networks want of the configuration.
    """

    program: str
    eps: float | None
    rename: _Rename
    advice: str = ""


def _by(rules: Mapping[str, str], drop: str = "") -> _Rename:
    """The first of `rules`, patterns of a whole name, that fits; else the name itself. drop: pattern of a beginning."""

    def rename(name: str) -> str | None:
        if drop and re.match(drop, name):
            return None
        found = next((pattern for pattern in rules if re.fullmatch(pattern, name)), None)
        return re.sub(found, rules[found], name) if found else name

    return rename


def _caffe2(name: str) -> str | None:
    """conv1_w, res2_0_branch2a_bn_s, fpn_inner_res5_2_sum_w, _[mask]_fcn1_b, ... of Detectron.

    Other blobs, which its own programs leave alone as well, are left out: classifiers, momenta, counters.
    """
    found = re.fullmatch(r"(.+?)(_[bg]n)?_([wbs])", name)
    if not found or name == "conv1_b":
        return None
    layer, norm, kind = found[1], bool(found[2]), {"w": "weight", "s": "weight", "b": "bias"}[found[3]]
    if layer in ("conv1", "res_conv1"):
        return f"{_BODY}{'bn1' if norm else 'conv1'}.{kind}"
    if block := re.fullmatch(r"res(\d)_(\d+)_branch(1|2[abc])", layer):
        place = f"{_BODY}layer{int(block[1]) - 1}.{block[2]}."
        if block[3] == "1":
            return f"{place}downsample.{int(norm)}.{kind}"
        return f"{place}{'bn' if norm else 'conv'}{'abc'.index(block[3][1]) + 1}.{kind}"
    if level := re.fullmatch(r"fpn_(inner_)?res(\d)_\d+_sum(_lateral)?", layer):
        return f"backbone.fpn.fpn_{'inner' if level[1] else 'layer'}{int(level[2]) - 1}.{kind}"
    layers = {
        "conv_rpn": "rpn.head.conv", "rpn_cls_logits": "rpn.head.cls_logits", "rpn_bbox_pred": "rpn.head.bbox_pred",
        "fc6": _HEAD + "fc6", "fc7": _HEAD + "fc7", "cls_score": "roi_heads.box.predictor.cls_score",
        "bbox_pred": "roi_heads.box.predictor.bbox_pred", "conv5_mask": "roi_heads.mask.predictor.conv5_mask",
        "mask_fcn_logits": "roi_heads.mask.predictor.mask_fcn_logits",
    }  # fmt: skip
    layer = layer.removesuffix("_fpn2")  # the levels share one head, which the finest of them names
    if mask := re.fullmatch(r"_\[mask\]_fcn(\d+)", layer):
        return f"{_MASK}mask_fcn{mask[1]}.{kind}"
    return f"{layers[layer]}.{kind}" if layer in layers else None


_HEADS = {
    r"roi_heads\.box_predictor\.(.+)": r"roi_heads.box.predictor.\1",
    r"roi_heads\.mask_predictor\.(.+)": r"roi_heads.mask.predictor.\1",
    r"roi_heads\.box_head\.(fc\d\..+)": rf"{_HEAD}\1",
    r"roi_heads\.mask_head\.(mask_fcn\d\..+)": rf"{_MASK}\1",
}


def _torchvision(name: str) -> str | None:
    if found := re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)(?:\.0)?\.(.+)", name):
        return f"backbone.fpn.fpn_{found[1]}{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"roi_heads\.mask_head\.(\d)\.0\.(.+)", name):
        return f"{_MASK}mask_fcn{int(found[1]) + 1}.{found[2]}"
    return _by({r"rpn\.head\.conv\.0\.0\.(.+)": r"rpn.head.conv.\1", **_HEADS})(name)


def _detectron2(name: str) -> str | None:
    name = re.sub(r"^(backbone\.bottom_up|backbone|roi_heads)\.(stem|res\d)\.", r"\2.", name)
    name = re.sub(r"^stem\.", _BODY, name)
    if found := re.match(r"res(\d)\.", name):
        name = f"{_BODY}layer{int(found[1]) - 1}." + name[found.end() :]
    if name.startswith(_BODY):
        name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
        return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    if found := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)\.(.+)", name):
        return f"backbone.fpn.fpn_{'inner' if found[1] == 'lateral' else 'layer'}{int(found[2]) - 1}.{found[3]}"
    rules = {
        r"proposal_generator\.rpn_head\.conv\.(.+)": r"rpn.head.conv.\1",
        r"proposal_generator\.rpn_head\.objectness_logits\.(.+)": r"rpn.head.cls_logits.\1",
        r"proposal_generator\.rpn_head\.anchor_deltas\.(.+)": r"rpn.head.bbox_pred.\1",
        r"roi_heads\.box_head\.fc1\.(.+)": rf"{_HEAD}fc6.\1", r"roi_heads\.box_head\.fc2\.(.+)": rf"{_HEAD}fc7.\1",
        r"roi_heads\.mask_head\.deconv\.(.+)": r"roi_heads.mask.predictor.conv5_mask.\1",
        r"roi_heads\.mask_head\.predictor\.(.+)": r"roi_heads.mask.predictor.mask_fcn_logits.\1",
        **_HEADS,
    }  # fmt: skip
    return _by(rules, r"pixel_(mean|std)$|proposal_generator\.anchor_generator|fc1000\.")(name)


_PIXELS_OF_TORCHVISION = (
    "INPUT.TO_BGR255 False INPUT.PIXEL_MEAN 0.485,0.456,0.406 INPUT.PIXEL_STD 0.229,0.224,0.225 "
    "MODEL.RESNETS.STRIDE_IN_1X1 False"
)


def source_of(state: Mapping[str, Tensor], path: object = "the file") -> _Source:
    """The program that wrote a state dictionary, by its names. Raises UserError for networks that are not these.

    `path` names the file in errors.
    """
    names = tuple(state)

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    if has(r"conv1_w$|fc6_w$"):
        return _Source("Detectron", 0.0, _caffe2)
    if has(r"backbone\.bottom_up\.|proposal_generator\.|stem\.conv1\."):
        return _Source("detectron2", 1e-5, _detectron2, "--no-legacy-boxes INPUT.PIXEL_MEAN 103.53,116.28,123.675")
    if has(r"roi_heads\.box_head\.0\.0\.|backbone\.fpn\.\w+_blocks\.\d\.1\."):
        raise UserError(
            f"{path}: these are torchvision's ..._fpn_v2, whose heads are others; take maskrcnn_resnet50_fpn"
        )
    if has(r"backbone\.fpn\.inner_blocks\.|roi_heads\.box_head\."):
        return _Source("torchvision", 1e-5, _torchvision, f"{_PIXELS_OF_TORCHVISION} --no-legacy-boxes")
    if has(r"layer1\.0\.conv1\."):
        return _Source("torchvision", 1e-5, lambda name: None if name.startswith("fc.") else _BODY + name,
                       _PIXELS_OF_TORCHVISION)  # fmt: skip
    drop = r"rpn\.anchor_generator\."
    if has(r"backbone\.body\.stem\."):
        return _Source("maskrcnn-benchmark", 0.0, _by({r"backbone\.body\.stem\.(.+)": rf"{_BODY}\1"}, drop))
    return _Source("this program", None, _by({}, drop))


def load_weights(model: nn.Module, config: Config, training: bool) -> list[str]:
    """Fills the network with the weights that MODEL.WEIGHT names, in place; returns what to know, in sentences.

    Whole parts that the file has not (an ImageNet file: all but the body) stay as they are, and parts that the network
    has not are left out. In training, weights of another number of classes come without the layers that predict them.
    Frozen normalisation gives with the network's eps what it gave with the file's. Raises UserError that lists entries
    that are missing, unexpected or of another shape, and for evaluation where a part or the classes would be missing.
    """
    path = find(config.weights)
    content = read(path)
    refuse_other_program(content, path, config.program)
    state = state_of(content)
    source = source_of(state, path)
    origin, advice = provenance(content, source)
    own, notes = converted(model, state, source, str(path)), []
    target = model.state_dict()
    for part in _PARTS:
        ours, theirs = ({name for name in x if _part(name) == part} for x in (target, own))
        if theirs and not ours:
            own = {name: value for name, value in own.items() if name not in theirs}
        elif ours and not theirs:
            own |= {name: target[name] for name in ours}
            notes.append(f"{path} has no {part.rstrip('.')}: it begins with random weights")
    if notes and not training:
        raise UserError(f"{'; '.join(notes)}. Train it, or take weights of a whole network")
    known, wanted = known_classes(state, source), len(target.get(_CLASSES, ()))
    if wanted and known and known != wanted:
        said = f"{path} knows {known - 1} classes, the network has {wanted - 1}"
        if not training:
            raise UserError(f"{said}: give MODEL.ROI_BOX_HEAD.NUM_CLASSES {known} to look at what it finds")
        own |= {name: value for name, value in target.items() if name.startswith(_OF_CLASSES)}
        notes.append(f"{said}: the layers that predict them (cls_score, bbox_pred, mask_fcn_logits) begin anew")
    load_exactly(model, own, str(path))
    if _differs(config, advice):
        notes.append(f"{path} is of {origin}, whose networks want {advice}")
    return notes


def provenance(content: Mapping, source: _Source) -> tuple[str, str]:
    """The program that trained a file's network, and what its networks want: the converter's word, or the source's."""
    said = content.get("origin"), content.get("advice")
    return said if all(isinstance(one, str) for one in said) else (source.program, source.advice)


def _differs(config: Config, advice: str) -> bool:
    """Whether a setting is not as `advice`, words of a command line, says."""
    wanted = load(Config, translate_flags(advice.split()), {})
    said = [name for name, where in wanted.sources.items() if where != DEFAULT]
    return any(getattr(config, name) != getattr(wanted.config, name) for name in said)


def _part(name: str) -> str:
    return next((part for part in _PARTS if name.startswith(part)), "")


def known_classes(state: Mapping[str, Tensor], source: _Source) -> int | None:
    """Classes and the background of a file's predictors; None for a file that has none."""
    return next((len(value) for name, value in state.items() if source.rename(name) == _CLASSES), None)


def converted(model: nn.Module, state: Mapping[str, Tensor], source: _Source, path: str) -> dict[str, Tensor]:
    """A file's state in the network's names, float32, with statistics and eps of the network's normalisation.

    Raises UserError where the one has group normalisation and the other batch normalisation.
    """
    target = model.state_dict()
    named = {source.rename(name): value for name, value in state.items()}
    own = {name: value.float() if value.is_floating_point() else value for name, value in named.items() if name}
    if source.program == "detectron2":
        own = _background_first(own)
    has_stage = any(name.startswith(_STAGE_OF_C4) for name in target)
    for name in [name for name in own if name.startswith(_BODY + "layer4.") and name not in target]:
        value = own.pop(name)
        if has_stage:
            own[_STAGE_OF_C4 + name.removeprefix(_BODY + "layer4.")] = value
    own = {name: value for name, value in own.items()
           if not name.startswith(_MASK + "head.") and not name.endswith("num_batches_tracked")}  # fmt: skip
    batch = any(name.endswith("running_var") or "_bn_" in name for name in state)
    if _BODY + "bn1.weight" in own and batch != (_BODY + "bn1.running_var" in target):
        there, here = ("batch", "group") if batch else ("group", "batch")
        raise UserError(
            f"{path} has {there} normalisation, the network {here} normalisation: MODEL.RESNETS.TRANS_FUNC and "
            "STEM_FUNC must be of the weights' kind, as MSRA/R-50-GN with BottleneckWithGN and StemWithGN"
        )
    for name in target:
        layer, _, kind = name.rpartition(".")
        if kind in ("running_mean", "running_var") and name not in own and f"{layer}.weight" in own:
            own[name] = torch.full_like(own[f"{layer}.weight"], float(kind == "running_var"))
    return own if source.eps is None else _with_eps(model, own, source.eps)


def _with_eps(model: nn.Module, state: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The state with normalisation weights that give with the network's eps what they gave with `eps`.

    A variance of 0 with an eps of 0 gave infinity: there the network's eps counts alone.
    """
    own = dict(state)
    for name, module in model.named_modules():
        var, weight = state.get(f"{name}.running_var"), f"{name}.weight"
        if var is not None and weight in own:
            factor = ((var + module.eps) / (var + eps)).sqrt()
            own[weight] = own[weight] * torch.where(factor.isfinite(), factor, torch.ones_like(factor))
    return own


def _background_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """detectron2's predictors, whose background is the last class and has neither boxes nor masks, in our order."""
    own = dict(state)
    for name, value in state.items():
        if name.startswith("roi_heads.box.predictor.cls_score."):
            own[name] = value.roll(1, 0)
        elif name.startswith(_OF_CLASSES):
            rows = 4 if "bbox_pred" in name else 1
            own[name] = torch.cat([torch.zeros_like(value[:rows]), value])
    return own
