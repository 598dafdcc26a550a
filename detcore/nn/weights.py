"""Weights from files into networks: read and checked, loaded exactly or but for the layers that predict classes."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from detcore import UserError, torch_file
from detcore.foreign import not_weights


def read_weights(path: Path) -> Mapping:
    """The dictionary in a file of PyTorch weights.

    Where the file name ends in a hash, as torchvision's do, the file must begin with it (sha256). Raises UserError when
    the file is damaged or something else, as `torch_file.read` does.
    """
    expected = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    if expected:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(expected[1]):
            damaged = f"is damaged: its sha256 begins with {found[:8]}, its name promises {expected[1]}"
            raise UserError(f"{path} {not_weights(path) or damaged}")
    try:
        state = torch_file.read(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds {type(state).__name__}, not a dictionary of weights")
    return state


def load_exactly(model: nn.Module, state: Mapping, source: str, keep: str | tuple[str, ...] = ()) -> None:
    """Load a state dictionary whose names and shapes must be the model's own.

    The counters num_batches_tracked are optional on both sides: frozen norms have none. keep: beginnings of names whose
    entries stay as the model has them, whatever the state holds. `source` names the file in the message. Raises
    UserError that counts what differs and names the first of each kind.
    """
    own = model.state_dict()
    if keep:
        state = {key: value for key, value in state.items() if not str(key).startswith(keep)}
        state |= {key: value for key, value in own.items() if key.startswith(keep)}
    ours, theirs = (
        [key for key in names if not str(key).endswith("num_batches_tracked")] for names in (own, state)
    )  # fmt: skip
    problems = _first("missing ", [key for key in ours if key not in state], f"the model's {len(ours)}")
    problems += _first("unexpected ", [key for key in theirs if key not in own], f"the file's {len(theirs)}")
    strange = {key: type(value).__name__ for key, value in state.items() if not isinstance(value, Tensor)}
    shapes = {key: list(value.shape) for key, value in state.items() if key in own and key not in strange}
    problems += _first("", [f"{key} is {kind}, not a tensor" for key, kind in strange.items()])
    problems += _first(
        "", [f"{k} is {was}, needs {list(own[k].shape)}" for k, was in shapes.items() if was != list(own[k].shape)]
    )
    if problems:
        raise UserError(f"{source} does not fit this model: {'; '.join(problems)}")
    model.load_state_dict({**own, **{key: value for key, value in state.items() if key in own}})


def _first(what: str, found: Sequence, of: str = "", shown: int = 3) -> list[str]:
    """A sentence's part about the first few of what was found, and how many it is; none where nothing was."""
    if len(found) <= shown:
        return [what + ", ".join(map(str, found))] if found else []
    count = f"{len(found)} of {of}" if of else f"{len(found)} such"
    return [f"{what}{', '.join(map(str, found[:shown]))}, ... ({count})"]


def load_with_classes(
    model: nn.Module,
    state: Mapping,
    source: str,
    known: int | None,
    predictors: str | tuple[str, ...],
    *,
    other_classes: bool,
    remedy: str = "",
) -> bool:
    """`load_exactly` of a detector's state that knows `known` classes, the model having `num_classes`; None: unknown.

    predictors: beginnings of the names of the layers that predict classes. other_classes: where the numbers differ,
    they stay as they are. Returns whether they did. remedy: see `other_number_of_classes`. Raises UserError for another
    number of classes, and for a state that does not fit.
    """
    differs = known not in (None, model.num_classes)
    if differs and not other_classes:
        raise UserError(other_number_of_classes(source, known, model.num_classes, remedy))
    load_exactly(model, state, source, predictors if differs else ())
    return differs


def other_number_of_classes(source: str, known: int, wanted: int, remedy: str = "") -> str:
    """What to do about weights of a network that knows another number of classes, in words.

    source: names the file. remedy: what goes on after --weights-only, in place of how to number classes as MLPerf does.
    """
    if not remedy and known > wanted:
        remedy = (
            f"; --num-classes {known} makes class k the category with id k, which is how torchvision and the MLPerf "
            "reference number COCO's"
        )
    return (
        f"{source} knows {known} classes, the data set has {wanted}: training starts from the rest of its weights with "
        f"--weights-only{remedy}"
    )
