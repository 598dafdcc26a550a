"""Command lines of the original train_net.py and test_net.py, and their YAML files, in this program's words.

`--config-file FILE`, flags, and `KEY VALUE` pairs of the configuration tree, whose values are Python's literals as yacs
reads them: `SOLVER.STEPS "(60000, 80000)"`, `DATASETS.TRAIN '("my_dataset_train")'`.
"""

import ast
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from detcore import UserError
from detcore.config import Words, refuse_word, spellings
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.refused import refuse

CONFIGS = Path(__file__).parent / "configs"
_SAME = {"MODEL.RESNETS.BACKBONE_OUT_CHANNELS": "MODEL.BACKBONE.OUT_CHANNELS"}  # Facebook's newest name
_DTYPES = {"float32": "tf32", "float16": "auto", "bfloat16": "bf16"}
_SPELLINGS = spellings(Config)
KEYS = tuple(word for word in (*_SPELLINGS, *IGNORED_FLAGS) if not word.startswith("-"))
"""Every key of the tree that means something here, or nothing that matters."""

TRANSLATED = {"--config-file": 1, "--max-steps": 1, "--opts": 0, "--fp16": 0, "--amp": 0, "--skip-checkpoint": 0}
"""The originals' flags that are no option's name, and how many words follow them."""

_FIELDS = {flag: name for name, field in Config.__dataclass_fields__.items()
           for meta in field.metadata.values() for flag in meta["flags"] if flag in KEYS}  # fmt: skip
_HINTS = typing.get_type_hints(Config)


def translate_flags(argv: Sequence[str]) -> Words:
    """A command line for the original programs as this one's, and apart from it what its --config-file says.

    Underscores in flags become dashes; flags of this program stay as they are. Raises UserError for a file that can't
    be read, a key that is unknown or means something that the program has not, and a value of the wrong kind.
    """
    words, files, steps = [], [], None
    for flag, values in _parts(argv):
        if not flag.startswith("-"):
            words += _pair(flag, _value(flag, values[0]))
        elif flag == "--config-file":
            files = values
        elif flag == "--max-steps":
            steps = values
        elif flag in ("--fp16", "--amp"):
            words += ["--precision", "auto"]
        elif flag == "--skip-checkpoint":
            words += ["--no-save-checkpoint"]
        elif flag != "--opts":
            words += [f"{flag}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [flag, *values]
    if steps and steps != ["0"]:
        words += ["--solver-max-iter", *steps]
    if not files or not files[0]:  # the original's default is an empty name
        return Words(words)
    path = _file(files[0])
    try:
        return Words(words, [word for key, value in _flat(_tree(path, ())) for word in _pair(key, value)], str(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def _parts(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values, each key with its one."""
    counts = _SPELLINGS | {flag: count for flag, (count, _) in IGNORED_FLAGS.items()}
    counts |= TRANSLATED
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, attached = word.partition("=")
        if not flag.startswith("-"):
            if not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", flag):
                raise UserError(f"unexpected word {word!r}: what follows no flag is KEY VALUE, as SOLVER.BASE_LR 0.01")
            if not equals and (not words or words[0].startswith("--")):
                raise UserError(f"{word}: a key of the configuration needs a value, as SOLVER.BASE_LR 0.01")
            yield flag, [attached if equals else words.pop(0)]
            continue
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag not in counts and not flag.startswith("--") and flag[:2] in counts:  # -b8
            flag, equals, attached = flag[:2], "=", word[2:]
        if flag not in counts:
            refuse_word(word, flag, counts)
        if equals:
            yield flag, [attached]
            continue
        count, values = counts.get(flag, 0), []
        while words and (count is None or len(values) < count):
            if words[0].startswith("--") or (values and not _is_value(words[0])):
                break
            values.append(words.pop(0))
        yield flag, values


def _is_value(word: str) -> bool:
    """Whether a further word belongs to a flag of several values, which are numbers."""
    return isinstance(_literal(word), int | float)


def _file(name: str) -> Path:
    """The file of --config-file: as it is said, or the program's own of that name below configs/."""
    path = Path(name)
    own = CONFIGS / name.rpartition("configs/")[2]
    return path if path.exists() or not own.is_file() else own


def _tree(path: Path, readers: tuple[Path, ...]) -> dict:
    """A YAML file's content, over that of the file it names with _BASE_, if it does."""
    if path.resolve() in readers:
        raise UserError(f"{path}: its _BASE_ leads back to itself")
    if not path.exists():
        published = [f"configs/{file.relative_to(CONFIGS)}" for file in CONFIGS.rglob("*.yaml")]
        near = difflib.get_close_matches(str(path), published, 1, 0.6)
        raise UserError(f"--config-file {path}: no such file{f' (did you mean {near[0]}?)' if near else ''}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config-file {path}: can't be read as YAML ({str(error).splitlines()[0]})") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"--config-file {path}: a YAML file of maskrcnn-benchmark is needed, with keys as MODEL:")
    base = content.pop("_BASE_", None)
    return _merged(_tree(path.parent / str(base), (*readers, path.resolve())), content) if base else content


def _merged(below: dict, above: dict) -> dict:
    both = {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return below | both


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(f"{prefix}{key}", value) if isinstance(value, str) else value


def _literal(text: str) -> Any:
    """The Python literal that the text is, or the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _value(key: str, text: str) -> Any:
    """The value of a key as `_literal` reads it. Raises UserError where a bracket or a quote has no partner.

    In names and paths, which may hold either, only one that begins or ends the text counts.
    """
    value = _literal(text)
    words = text.strip()
    named = _HINTS.get(_FIELDS.get(key, "")) in (str, Path, Path | None)
    if value is text and words and _is_open(words) and (not named or words[0] in _PAIRS or words[-1] in _CLOSING):
        raise UserError(f'{key} {text}: a bracket or a quote has no partner; write lists as "(1, 2)"')
    return value


_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}
_CLOSING = tuple(_PAIRS.values())


def _is_open(text: str) -> bool:
    """Whether a bracket or a quote of the text has no partner."""
    waiting: list[str] = []
    for letter in text:
        if waiting and letter == waiting[-1]:
            waiting.pop()
        elif waiting and waiting[-1] in "\"'":
            continue
        elif letter in _PAIRS:
            waiting.append(_PAIRS[letter])
        elif letter in _CLOSING:
            return True
    return bool(waiting)


def _pair(key: str, value: Any) -> list[str]:
    """One key and its value in this program's words."""
    key = _SAME.get(key, key)
    if refuse(key, value) or key in IGNORED_FLAGS:
        return [key, str(value)] if key in IGNORED_FLAGS else []
    if key not in KEYS:
        near = difflib.get_close_matches(key.upper(), KEYS, 1, 0.6)
        raise UserError(f"unknown key {key}{f' (did you mean {near[0]}?)' if near else ''}")
    hint, values = _HINTS[_FIELDS[key]], value if isinstance(value, list | tuple) else (value,)
    if value is None:
        if types.NoneType not in typing.get_args(hint):
            raise UserError(f"{key}: there is no value; leave the key out for its default")
        return [f"{key}=none"]
    if hint is bool:
        return [_switch(key, value)]
    if key == "DTYPE":
        values = (_DTYPES.get(value, value),)
    elif key == "MODEL.DEVICE":
        values = (_device(str(value)),)
    elif key == "TEST.EXPECTED_RESULTS":
        values = [row if isinstance(row, str) else ":".join(map(str, row)) for row in values]
    elif typing.get_origin(hint) is not tuple and len(values) != 1:
        raise UserError(f"{key} {value}: give one value" + _SEVERAL.get(key, ""))
    return [f"{key}={','.join(map(str, values))}"]


def _device(text: str) -> str:
    """A device without the number of its GPU, which must be the first."""
    kind, colon, number = text.partition(":")
    if colon and number != "0":
        raise UserError(
            f"MODEL.DEVICE {text}: each process takes a GPU by its place on its machine, one alone the first; choose "
            f"which that is with CUDA_VISIBLE_DEVICES={number} in the environment, and give MODEL.DEVICE {kind}"
        )
    return kind


_SEVERAL = dict.fromkeys(
    ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN"), "; training at several scales, drawn at random, is not offered"
)


def _switch(key: str, value: Any) -> str:
    """The flag of a field that is true or false."""
    said = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
    if said is None:
        raise UserError(f"{key}: {value!r} is not valid, expected True or False")
    name = _FIELDS[key].replace("_", "-")
    return f"--{name}" if said else f"--no-{name}"
