"""Weights of whole EfficientDets: those of NVIDIA's program and of rwightman's effdet."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from detcore import UserError
from detcore.nn.efficientnet_weights import own_state
from detcore.nn.weights import load_with_classes
from efficientdet.anchors import PER_CELL
from efficientdet.architectures import ARCHITECTURES
from efficientdet.model import EfficientDet

CLASS_LAYER = "class_net.predict.conv_pw."


def load_original_state(
    model: EfficientDet,
    state: Mapping,
    source: str = "the checkpoint",
    *,
    ema: bool = False,
    remove: Sequence[str] = (),
    other_classes: bool = False,
) -> bool:
    """Load the weights of an EfficientDet of NVIDIA's program or of rwightman's effdet, in place.

    state: a state dictionary, or a checkpoint that holds one under "state_dict" or "model"; names may begin with
    "module." or "model.". ema: take "state_dict_ema" instead. remove: entries whose name contains one of these strings
    are left out, and the model keeps its own. other_classes: where the state is of another number of classes, the layer
    that predicts them stays as it is. Returns whether it did. `source` names the file in errors. Class channels that
    NVIDIA's fused loss padded to a multiple of 8 for each anchor (96 for 90), and zero channels at the end, are cut
    off. Outputs are those of the original program, except that a box's delta is dx, dy, dw, dh.
    Raises UserError that names another number of classes, or missing, unexpected and misshapen entries, and where there
    are no such weights.
    """
    keys = ("state_dict_ema",) if ema else ("state_dict", "model")
    if ema and "state_dict_ema" not in state:
        raise UserError(f"{source} has no averaged weights ('state_dict_ema'); load it without --use-ema")
    state = next((state[key] for key in keys if key in state), state)
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds {type(state).__name__} where a dictionary of weights should be")
    state = {re.sub(r"^((module|model)\.)+", "", str(key)): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("anchors.")}
    state = {key: value for key, value in state.items() if not any(part in key for part in remove)}
    inside = "backbone."
    backbone = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
    own = {key: value for key, value in state.items() if not key.startswith(inside)}
    own |= {inside + key: value for key, value in own_state(model.backbone, backbone).items()}
    rows = set()
    for key in (CLASS_LAYER + "weight", CLASS_LAYER + "bias"):
        if isinstance(own.get(key), Tensor) and own[key].dim():
            own[key] = _without_padding(own[key], model.num_classes)
            rows.add(len(own[key]))
    known = rows.pop() // PER_CELL or None if len(rows) == 1 else None
    kept = {k: v for k, v in model.state_dict().items() if any(part in k for part in remove)}
    remedy = ", or without the whole head of classes with --remove-weights class_net"
    how = {"other_classes": other_classes, "remedy": remedy}
    return load_with_classes(model, own | kept, source, known, CLASS_LAYER, **how)


def refuse_other_model(saved: Mapping, source: str, name: str) -> str:
    """Raises UserError where a checkpoint says in "arch" that its weights are of another model than `name`.

    Returns how to call the file in errors: with an arch that this program does not have, which may fit all the same
    (effdet's tf_efficientdet_d0_ap).
    """
    arch = saved.get("arch")
    if not isinstance(arch, str) or arch in (name, name.removesuffix("_legacy")):
        return source
    if arch not in ARCHITECTURES:
        return f"{source} (arch {arch})"
    raise UserError(f"{source} says arch {arch}, but --model is {name}: give --model {arch}")


def _without_padding(rows: Tensor, classes: int) -> Tensor:
    """The rows of a class predictor [PER_CELL * C, ...] whose classes were padded to more than `classes`."""
    padded, wanted = -(-classes // 8) * 8, PER_CELL * classes
    if len(rows) == PER_CELL * padded:
        return rows.unflatten(0, (PER_CELL, padded))[:, :classes].flatten(0, 1)
    if len(rows) == -(-wanted // 4) * 4 and not rows[wanted:].any():
        return rows[:wanted]
    return rows
