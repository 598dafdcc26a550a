"""Files of torch.save, of this program and others, read without running anything that they hold."""

import hashlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from detcore import UserError
from detcore.foreign import check_archive, not_weights


def cached(url: str) -> Path:
    """Where torch's cache has the file of a web address, whether it is there or not.

    Under its last name if that holds the beginning of its sha256, as torchvision's do (resnet50-0676ba61.pth); else in
    a folder of this address, for many end in model_final.pth.
    """
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", Path(unquote(urlsplit(url).path)).name
    if re.search(r"-[0-9a-f]{8,}\.", name):
        return folder / name
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def read(path: Path, map_location: Any = "cpu", *, checked: bool = False) -> Any:
    """What `torch.load` makes of a file with weights_only: tensors, plain values, and types that the caller allows
    with `torch.serialization.safe_globals`.

    checked: the caller knows that the archive is whole; else its checksums are looked at. Raises UserError that says
    what the file is instead (empty, text, HTML, a Git LFS pointer, cut off, damaged), or which of its types would run
    code; OSError where it can't be read.
    """
    if not checked:
        check_archive(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and its unpickler answer to strange bytes with nearly every type
        reason = str(error).strip().split("\n")[0][:200]
        told = not_weights(path)
        if not told and reason.startswith("Weights only load failed"):  # it goes on with advice that would run the code
            told = _refusal(path)
        told = told or (
            f"cannot be read as PyTorch weights ({type(error).__name__}: {reason}); it is damaged or something else. "
            "Fetch it again, or use another file"
        )
        raise UserError(f"{path} {told}") from error


def _refusal(path: Path) -> str:
    """Which types torch would have to run code for, in words."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of the format before torch 1.6, or one that is damaged in a further way
        names = []
    if not names:
        return "cannot be read as PyTorch weights: it is damaged or something else. Fetch it again, or use another file"
    shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"holds more than weights and plain values: {shown}. Loading such objects could run any code, so it is "
        "refused; where the file comes from, save its weights alone: torch.save({'model': model.state_dict()}, FILE)"
    )
