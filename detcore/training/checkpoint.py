"""Checkpoints: one file, written atomically, that carries its own hash.

The file is what `torch.save` writes, a zip archive, followed by a zip comment of 71 bytes: "sha256:" and the hex digest
of the archive as torch wrote it (that is, with comment length 0). The comment keeps it one file, so that a rename
replaces state and hash together, and a plain `torch.load(path, weights_only=True)` reads it as well.
"""

import argparse
import contextlib
import datetime
import errno
import hashlib
import os
import pathlib
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detcore import UserError, torch_file
from detcore.foreign import check_archive

FORMAT = 1  # raise it when an older program could no longer read what this one writes
_FORMAT_KEY = "checkpoint_format"
_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_NO_COMMENT = b"\0\0"
_COMMENT_LENGTH = struct.pack("<H", _COMMENT_BYTES)


def _as_dict(factory: Any = None) -> OrderedDict:
    """In the place of a defaultdict, which torch does not fill."""
    return OrderedDict()


_HARMLESS: list[Any] = [
    # What programs store beside weights, of types that do nothing but hold values: options, numbers, paths.
    argparse.Namespace, (_as_dict, "collections.defaultdict"), datetime.datetime, datetime.date, datetime.timedelta,
    np.ndarray, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    list, int, float, str, bool, tuple, dict,  # of a defaultdict
    *((getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
      for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((pathlib.PurePosixPath, f"{module}.{name}")  # a path of either system, as one that touches no disk
      for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
]  # fmt: skip
_WEIGHTS = ("state_dict", "model_state_dict", "model_state", "weights")  # other programs' names of "model"
_WRAPPERS = re.compile(r"(module|_orig_mod|model)\.")  # DistributedDataParallel, torch.compile, Lightning
_PLAIN = {type(None), bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype}


def save(path: str | os.PathLike, state: dict[str, Any], links: Sequence[Path] = ()) -> None:
    """Write `state` to `path`, all or nothing: after any failure, also a kill, `path` holds what it held before.

    `state` is a dict of tensors (any device), numbers, strings, None and dicts, lists and tuples of them: what `load`
    can read without running code. Raises `UserError` when the file cannot be written (disk full, no permission), with
    the bytes needed and free, and TypeError for a value that `load` would refuse. links: made the same file then.
    """
    path = Path(path)
    if _FORMAT_KEY in state:
        raise ValueError(f"the key {_FORMAT_KEY!r} is taken")
    _refuse_other_types(state, "state")
    part, sink = _part_of(path), None
    try:
        with open(part, "wb") as file:
            sink = _Sink(file)
            torch.save({_FORMAT_KEY: FORMAT, **state}, sink)
            if sink.error:
                raise sink.error
            file.seek(-len(_COMMENT_LENGTH), os.SEEK_END)
            file.write(_COMMENT_LENGTH + _MARK + sink.digest.hexdigest().encode())
            _to_disk(file)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        needed = sink.size + _COMMENT_BYTES if sink else None
        raise _unwritable(path, error, needed) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    for link in links:
        link_or_copy(path, link)


def load(path: str | os.PathLike, map_location="cpu", *, require_hash: bool = True) -> dict[str, Any]:
    """The state that `save` wrote to `path`, with the tensors on `map_location`.

    With `require_hash=False` a file of another program, which carries no hash, is read too, as far as it holds a dict
    and needs no code run to load: beside what torch allows it may hold options (argparse.Namespace), numbers and arrays
    of numpy, paths and dates. A hash that is there is always checked, and so are the checksums of a zip archive
    without one, which torch does not look at. Files older than torch 1.6 have neither. Raises `UserError` that says
    what is wrong with the file: missing, unreadable, cut off, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            has_hash = _check_hash(file, path, require_hash)
        if not has_hash:
            check_archive(path)
        with torch.serialization.safe_globals([] if require_hash else _HARMLESS):
            state = torch_file.read(path, map_location, checked=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dict: it is no checkpoint")
    version = state.pop(_FORMAT_KEY, FORMAT if not has_hash else None)
    if type(version) is not int or version > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version}, this program reads up to {FORMAT}: "
            "it was written by a newer version; update this one"
        )
    return state


def link_or_copy(src: str | os.PathLike, dst: str | os.PathLike) -> None:
    """Make `dst` the same file as `src`, atomically and where possible without writing it twice (a hard link).

    Because `save` never changes a file in place, a later save to `src` leaves `dst` as it is.
    """
    src, dst = Path(src), Path(dst)
    part = _part_of(dst)
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(src, part)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            with open(src, "rb") as source, open(part, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                _to_disk(file)
        os.replace(part, dst)
        _sync_folder(dst.parent)
    except OSError as error:
        raise _unwritable(dst, error, src.stat().st_size if src.exists() else None) from error
    finally:
        # Also after success: renaming a link onto another link of the same file does nothing and leaves it.
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


class _Sink:
    """What torch.save writes to: counts and hashes, and after an error only counts.

    torch's archive writer does not survive an exception in mid-file, and so the bytes needed become known.
    """

    def __init__(self, file):
        self.file, self.digest, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data) -> int:
        self.size += len(data)
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """torch calls it at the end; `save` flushes the file itself."""


def _check_hash(file, path: Path, required: bool) -> bool:
    """Compare the file with the hash in its comment; whether there is one."""
    size = file.seek(0, os.SEEK_END)
    body = size - _COMMENT_BYTES - len(_COMMENT_LENGTH)
    file.seek(max(body, 0))
    tail = file.read()
    length, comment = tail[:2], tail[2:]
    if body < 0 or (length != _COMMENT_LENGTH and not comment.startswith(_MARK)):
        if required:
            raise UserError(
                f"checkpoint {path} ({size} bytes) carries no hash: it is cut off, or not written by this program. "
                "Use best.pt or the checkpoint of an older epoch"
            )
        return False
    file.seek(0)
    digest = hashlib.sha256()
    while body > 0:
        block = file.read(min(body, 1 << 20))
        digest.update(block)
        body -= len(block) or body
    digest.update(_NO_COMMENT)
    if length + comment != _COMMENT_LENGTH + _MARK + digest.hexdigest().encode():
        raise UserError(
            f"checkpoint {path} is damaged: its content does not match the hash stored in it. "
            "Use best.pt or the checkpoint of an older epoch"
        )
    return True


def _refuse_other_types(value, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _refuse_other_types(key, f"a key of {where}")
            _refuse_other_types(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _refuse_other_types(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}, which cannot be loaded without running code")


def _part_of(path: Path) -> Path:
    """The unfinished file; always the same name, so that killed processes do not leave more and more of them."""
    return path.with_name(f".{path.name}.part")


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError, needed: int | None) -> UserError:
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        free = "free space unknown"
    need = f"{needed:,} bytes needed, " if needed else ""
    return UserError(
        f"checkpoint {path} cannot be written: {error.strerror or error} ({need}{free}). "
        "What was there before is untouched; free space or choose another folder"
    )


def load_checkpoint(path: Path, program: str = "") -> dict[str, Any]:
    """A checkpoint of this program, or of another one that saved a state dictionary.

    program: whose it must be, if it is one of this repository's (`refuse_other_program`); without it, anyone's.
    Raises UserError for a file that is none, and for weights that are not finite numbers: a model with a NaN in it
    finds nothing, which looks like a result. Weights that another program calls otherwise (Lightning's "state_dict")
    stand under "model" afterwards, their names without what wrappers put before all of them.
    """
    saved = load(path, require_hash=False)
    for name in _WEIGHTS:
        if "model" not in saved and isinstance(saved.get(name), dict):
            saved["model"] = saved.pop(name)
    if isinstance(saved.get("model"), dict):
        saved["model"] = _without_wrappers(saved["model"])
    elif "model" not in saved and saved and all(isinstance(value, torch.Tensor) for value in saved.values()):
        saved = _without_wrappers(saved)
    for name, kind in (("config", dict), ("ema", dict), ("classes", list)):
        if not isinstance(saved.get(name), kind | None):
            raise UserError(f"{path} holds {type(saved[name]).__name__} under {name!r}, not a {kind.__name__}")
    if program:
        refuse_other_program(saved, path, program)
    for entry in saved.get("classes") or []:
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str]):
            raise UserError(f"{path} holds {entry!r} among its classes, not the id and the name of a category")
    for source in (saved.get("model", saved), saved.get("ema")):
        for name, value in source.items() if isinstance(source, dict) else ():
            if not isinstance(value, torch.Tensor) or str(name).endswith("num_batches_tracked"):
                continue
            if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
                raise UserError(f"{path}: {name} is of {value.dtype}, {value.layout}: no plain floating point weights")
            if not value.isfinite().all():
                raise UserError(f"{path}: {name} holds NaN or infinite numbers; use the checkpoint of an older epoch")
    return saved


def refuse_other_program(saved: Mapping[str, Any], path: Path, program: str) -> None:
    """Raises UserError where a checkpoint says that another program of this repository wrote it."""
    other = saved.get("program")
    if isinstance(saved.get("config"), dict) and isinstance(other, str) and other != program:
        raise UserError(
            f"{path} is a checkpoint of {other}, this is {program}: give one of {program}, or use it with "
            f"`python -m {other}.train`"
        )


def _without_wrappers(weights: dict[str, Any]) -> dict[str, Any]:
    """A state dictionary without the prefixes that all its names share."""
    while (prefix := _shared_wrapper(weights)) is not None:
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _shared_wrapper(names: Iterable[Any]) -> str | None:
    found = {found[0] if isinstance(name, str) and (found := _WRAPPERS.match(name)) else None for name in names}
    return found.pop() if len(found) == 1 else None
