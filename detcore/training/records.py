"""What the originals' users find after a run: dllogger's JSON lines."""

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcore import UserError


class JsonSummary:
    """A file in the format of dllogger's JSONStreamBackend: "DLLL " and one object a line, with type, step and data.

    step is "PARAMETER", [epoch, iteration] or [epoch] (both from 0), and [] for what holds for the whole run.
    With path None nothing is written. The file is opened here, and elapsedtime counts from here; without `append` what
    was in it goes with the first line, so that a run which is refused loses nothing. Raises UserError,
    naming `option`, if it can't be written.
    """

    def __init__(self, path: Path | None, *, append: bool = False, option: str = "--json-summary"):
        self._begin, self._option = time.time(), option
        self._path, self._file, self._append = path, None, append
        if path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise unwritable(self._option, path, error) from error

    def log(self, step: str | Sequence[int], data: dict[str, Any]) -> None:
        """One line, flushed. Raises UserError if it can't be written."""
        if not self._file:
            return
        now = time.time()
        line = {
            "timestamp": str(now),
            "datetime": str(datetime.datetime.fromtimestamp(now)),
            "elapsedtime": str(now - self._begin),
            "type": "LOG",
            "step": step if isinstance(step, str) else list(step),
            "data": data,
        }
        try:
            if not self._append and self._path.is_file():  # a pipe or a device has nothing to remove
                self._file.truncate(0)
            self._append = True
            self._file.write(f"DLLL {json.dumps(line)}\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._option, self._path, error) from error


def unwritable(option: str, path: Path, error: OSError) -> UserError:
    """The error of an option whose file or folder the system refuses."""
    return UserError(f"{option} {path} can't be written: {error.strerror or error}. Give another path or free space.")
