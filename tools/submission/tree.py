"""Submission trees: which results they hold, and copies of single results for checkers that write where they read."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from detcore import UserError

PARAMS = "package_checker_params"
FLAGS = ("rcp-bypass", "seed-checker-bypass")


class Result(NamedTuple):
    """One benchmark of one system: <org>/results/<system>/<benchmark>."""

    org: Path
    system: str
    benchmark: str

    @property
    def folder(self) -> Path:
        return self.org / "results" / self.system / self.benchmark

    @property
    def description(self) -> Path:
        return self.org / "systems" / f"{self.system}.json"

    @property
    def name(self) -> str:
        return f"{self.org.name}/{self.system}/{self.benchmark}"

    @property
    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("result_*.txt"))


def organisations(tree: Path) -> list[Path]:
    """The folders with results/ in or right below a tree. Raises UserError where there are none."""
    if not tree.is_dir():
        raise UserError(
            f"{tree}: no such folder; name a submission's tree: the organisation's folder, or the one around it"
        )
    tree = tree.resolve()
    found = [tree] if (tree / "results").is_dir() else []
    found = found or [path for path in sorted(tree.iterdir()) if (path / "results").is_dir()]
    if not found:
        raise UserError(f"{tree}: neither it nor a folder in it has results/; see docs/submitting.md for the layout")
    return found


def results(org: Path) -> list[Result]:
    """All results of an organisation, whatever the benchmark."""
    systems = [path for path in sorted((org / "results").iterdir()) if path.is_dir()]
    return [
        Result(org, system.name, path.name) for system in systems for path in sorted(system.iterdir()) if path.is_dir()
    ]


def flags(result: Result) -> set[str]:
    """The flags of all package_checker_params that concern a result.

    The official checker reads a file's last line alone, and only without a newline; its shell script reads the
    organisation's as well.
    """
    places = (result.folder, result.folder.parent, result.org)
    texts = [(place / PARAMS).read_text(errors="replace") for place in places if (place / PARAMS).is_file()]
    words = {line.strip().lstrip("-") for text in texts for line in text.splitlines()}
    return words & set(FLAGS)


@contextmanager
def alone(result: Result) -> Iterator[Result]:
    """A temporary organisation that has this result alone, for checkers that write or remove scaling.json.

    Logs are links; the flags of package_checker_params are left to the caller.
    """
    with TemporaryDirectory(prefix="submission-") as folder:
        copy = Result(Path(folder) / "org", result.system, result.benchmark)
        copy.folder.mkdir(parents=True)
        copy.description.parent.mkdir()
        if result.description.is_file():
            shutil.copyfile(result.description, copy.description)
        for path in sorted(result.folder.iterdir()):
            if path.name not in (PARAMS, "scaling.json"):
                os.symlink(path.resolve(), copy.folder / path.name)
        yield copy
