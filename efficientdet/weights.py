"""Weights of whole EfficientDets: those of NVIDIA's program and of rwightman's effdet."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from detcore import UserError
from detcore.nn.efficientnet_weights import own_state
from detcore.nn.resnet import load_exactly
from efficientdet.anchors import PER_CELL
from efficientdet.model import EfficientDet

_CLASS_LAYER = "class_net.predict.conv_pw."


def load_original_state(
    model: EfficientDet,
    state: Mapping,
    source: str = "the checkpoint",
    *,
    ema: bool = False,
    remove: Sequence[str] = (),
) -> None:
    """Load the weights of an EfficientDet of NVIDIA's program or of rwightman's effdet, in place.

    state: a state dictionary, or a checkpoint that holds one under "state_dict" or "model"; names may begin with
    "module." or "model.". ema: take "state_dict_ema" instead. remove: entries whose name contains one of these strings
    are left out, and the model keeps its own. `source` names the file in errors. Class channels that NVIDIA's fused
    loss padded to a multiple of 8 for each anchor (96 for 90), and zero channels at the end, are cut off. Outputs are
    those of the original program, except that a box's delta is dx, dy, dw, dh.
    Raises UserError that lists missing, unexpected and misshapen entries, and where there are no such weights.
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
    for key in (_CLASS_LAYER + "weight", _CLASS_LAYER + "bias"):
        if isinstance(own.get(key), Tensor) and own[key].dim():
            own[key] = _without_padding(own[key], model.num_classes)
    kept = {k: v for k, v in model.state_dict().items() if any(part in k for part in remove)}
    load_exactly(model, own | kept, source)


def _without_padding(rows: Tensor, classes: int) -> Tensor:
    """The rows of a class predictor [PER_CELL * C, ...] whose classes were padded to more than `classes`."""
    padded, wanted = -(-classes // 8) * 8, PER_CELL * classes
    if len(rows) == PER_CELL * padded:
        return rows.unflatten(0, (PER_CELL, padded))[:, :classes].flatten(0, 1)
    if len(rows) == -(-wanted // 4) * 4 and not rows[wanted:].any():
        return rows[:wanted]
    return rows
