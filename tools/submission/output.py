"""How the commands of this package print: tables, and JSON that is JSON."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from detcore import UserError


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of words; the exit code is the same")


def print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=1))


def plain(value: Any) -> Any:
    """What JSON can hold: paths as text, and null for NaN and infinity, which other programs refuse to read."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def table(head: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of columns, each as wide as it must be."""
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *cells]]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, a byte order mark or not. Raises UserError, naming `what` it should be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it should hold {what}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error}); it should hold {what}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: no JSON object; it should hold {what}")
    return value
