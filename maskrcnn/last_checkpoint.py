"""The file of a run's folder that names its newest checkpoint, as the original's programs write and read it."""

from pathlib import Path

from detcore import UserError

LAST = "last_checkpoint"


def last_checkpoint(folder: Path) -> Path | None:
    """What the file last_checkpoint of a folder names; None where there is none. The name may be one of the folder's.

    Raises UserError if the checkpoint does not exist.
    """
    pointer = folder / LAST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    for path in (Path(name), folder / Path(name).name):
        if name and path.is_file():
            return path
    raise UserError(
        f"{pointer} names {name or 'nothing'}, which does not exist; remove the file, or bring that one back"
    )
