"""Files of weights: where MODEL.WEIGHT's names are on the disk, and what is in them. Nothing is downloaded here."""

import hashlib
import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detcore import UserError
from detcore.foreign import not_weights
from detcore.nn.detectron import CATALOG
from detcore.nn.weights import read_weights
from detcore.torch_file import cached

_PREFIX = "catalog://"
_NUMPY = {
    (f"numpy.{core}.{name}", function)
    for core in ("core", "_core")
    for name, function in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")}
"""What a pickle of arrays needs, by the names of old and new numpy."""

_SCALAR = np.float64(0).__reduce__()[0]  # whose place in numpy has changed
_SCALARS = [
    np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
]  # fmt: skip
"""What checkpoints of old programs hold besides tensors: numbers of numpy, in the state of a schedule."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, text and numpy arrays; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which weights never need")
        return super().find_class(module, name)


def find(weights: str, said_by: str = "MODEL.WEIGHT") -> Path:
    """The file that an option names: catalog://..., an address, of which the cache has the file, or a path.

    A file that lies in the cache itself, as torch.hub puts it there, stands for any address of its name, which is said.
    Raises UserError, which says how to fetch it, where the file does not exist.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if weights.startswith(_PREFIX):
        name = weights.removeprefix(_PREFIX)
        if name not in CATALOG:
            raise UserError(f"{said_by} {weights} is unknown; after catalog:// stands one of {', '.join(CATALOG)}")
        path, fetch = cache / CATALOG[name].file, f"public-scripts/download_backbone.sh -d DIR {name}"
    elif weights.startswith(("http://", "https://")):
        path = cached(weights)
        fetch = f"public-scripts/download.py file -d DIR/{path.parent.relative_to(cache.parent.parent)} {weights}"
        shared = cache / path.name
        if not path.is_file() and shared.is_file():
            print(f"{weights}: {shared} is taken for it, which has the same name; its own place is {path}",
                  file=sys.stderr)  # fmt: skip
            path = shared
    else:
        path, fetch = Path(weights), ""
    if path.is_file():
        return path
    advice = f"fetch it with `{fetch}` and set TORCH_HOME=DIR" if fetch else "correct the path"
    begin = (
        f", or begin with random weights by {said_by} '' and a configs/gn_baselines/scratch_*.yaml"
        if said_by == "MODEL.WEIGHT"
        else ""
    )
    raise UserError(f"{said_by} {weights}: there is no {path}; {advice}{begin}")


def read(path: Path) -> Mapping[str, Any]:
    """What is in a .pkl of Caffe2 or detectron2 (numpy arrays become tensors), or in a PyTorch file.

    Nothing of the file is run. Raises UserError where it is damaged, not the published one, or holds something else.
    """
    if path.suffix != ".pkl":
        with torch.serialization.safe_globals(_SCALARS):
            return read_weights(path)
    data = path.read_bytes()
    published = next((one for one in CATALOG.values() if one.file == path.name), None)
    if published and published.md5 and hashlib.md5(data).hexdigest() != published.md5:
        other = f"is not the published file: its md5 is not {published.md5}; fetch it again"
        raise UserError(f"{path} {not_weights(path) or other}")
    return _unpickled(data, path)


def _unpickled(data: bytes, path: Path) -> Mapping[str, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises any type
        told = not_weights(path) or f"can't be read as weights ({error}); fetch it again"
        raise UserError(f"{path} {told}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds {type(content).__name__}, not a dictionary of weights")
    return tensors(content)


def tensors(content: Mapping) -> dict[str, Any]:
    """The same with tensors in place of arrays, at any depth of dictionaries."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            return value
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))

    return {str(key): one(value) for key, value in content.items()}


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by name: of its part "model", "state_dict" or "blobs" where it has one, without "module."
    before the names."""
    inner = next((content[key] for key in ("model", "state_dict", "blobs") if isinstance(content.get(key), Mapping)),
                 content)  # fmt: skip
    found = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    while found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return found
