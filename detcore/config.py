"""A program's settings: a frozen dataclass whose defaults a file, the environment and the command line override.

A field made by `option` is everything there is to a setting: its default, its meaning, its flag (the field's name with
dashes), the one variable that sets it, its aliases and its limits. The field's annotation decides how text is read:

| annotation                   | on the command line                    | in the environment                  |
|------------------------------|----------------------------------------|-------------------------------------|
| int, float, str, Path        | `--lr 0.1`, `--lr=0.1`                 | `LR=0.1`                            |
| bool                         | `--amp`, `--no-amp`                    | 1, 0, true or false                 |
| tuple[int, int] (or float)   | `--image-size 800 800`, `800,800`      | `800,800` or `800 800`              |
| tuple[int, ...] (or float)   | `--sizes 32 64 128`, `32,64,128`       | the same                            |
| tuple[str, ...]              | `--names a,b`                          | the same, or `a b`                  |
| any of these `| None`        | the word `none` clears the value       | the same                            |

An empty variable counts as not set. A flag given twice: the last one holds. Relations between fields are checked by the
dataclass' own `__post_init__`, which raises `UserError`.
"""

import dataclasses
import difflib
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detcore import UserError

DEFAULT = "default"
_META = "detcore.option"
_WORDS = {int: "a whole number", float: "a finite number", bool: "0, 1, true or false", str: "text", Path: "a path"}
_BOOLS = {"1": True, "true": True, "0": False, "false": False}


class Loaded(NamedTuple):
    """What `load` returns: the settings, where each came from, and what was said about flags without effect."""

    config: Any
    sources: dict[str, str]
    notices: list[str]


class Words(NamedTuple):
    """A command line, and what the file `name` says in such words, which the environment overrides."""

    argv: Sequence[str]
    file: Sequence[str] = ()
    name: str = ""


class _Option(NamedTuple):
    """One field as `option` describes it, with its annotation resolved."""

    name: str
    kind: type
    count: int | None
    optional: bool
    help: str
    env: str | None
    flags: tuple[str, ...]
    choices: tuple | None
    check: Callable[[Any], str | None] | None
    group: str
    default: Any

    @property
    def expected(self) -> str:
        if self.choices:
            words = ("one of " if self.count is None else "any of ") + ", ".join(map(str, self.choices))
        elif self.count is None:
            words = _WORDS[self.kind]
        else:
            plural = _WORDS[self.kind].removeprefix("a ") + "s"
            words = f"{self.count} {plural}" if self.count else plural
        return words + (" or none" if self.optional else "")


def option(default, help, *, env=None, flags=(), choices=None, check=None, group="Options"):
    """A dataclass field that `load` can set.

    `env`: the variable's name. `flags`: further spellings (`-b`, `--data-path`). `choices`: the allowed values.
    `check`: called with a value given by the user, returns None or what it should have been ("a number above 0").
    `group`: its heading in `describe`.
    """
    meta = {"help": help, "env": env, "flags": tuple(flags), "choices": choices, "check": check, "group": group}
    return dataclasses.field(default=default, metadata={_META: meta})


def redefine(cls, name: str, default, **changes):
    """The option `name` of a base class with another default, for a derived class; changes: what else differs there.

    `changes` are arguments of `option`: help, env, flags, choices, check, group.
    """
    return option(default, **{**cls.__dataclass_fields__[name].metadata[_META], **changes})


def at_least(low) -> Callable[[Any], str | None]:
    """A `check`: the value (each value of a tuple) is `low` or more."""
    return lambda value: None if all(v >= low for v in _each(value)) else f"{low} or more"


def above(low) -> Callable[[Any], str | None]:
    """A `check`: the value (each value of a tuple) is more than `low`."""
    return lambda value: None if all(v > low for v in _each(value)) else f"more than {low}"


def between(low, high) -> Callable[[Any], str | None]:
    """A `check`: the value (each value of a tuple) lies in the closed interval."""
    return lambda value: None if all(low <= v <= high for v in _each(value)) else f"between {low} and {high}"


def load(cls, argv: Sequence[str] | Words, environ: Mapping[str, str], ignored: Mapping | None = None) -> Loaded:
    """Settings from the defaults of `cls`, then a file's, then `environ`, then the words of `argv` (without the
    program's name).

    `ignored` maps a flag that means nothing here to (number of its values, reason): it is accepted with a notice, so
    that option strings written for the original programs still run. Raises `UserError` for an unknown flag, a variable
    that looks like a misspelt one of ours, and a value of the wrong kind.
    """
    ignored = ignored or {}
    words = argv if isinstance(argv, Words) else Words(argv)
    options = _options(cls)
    values, sources = {}, dict.fromkeys((o.name for o in options), DEFAULT)
    notices = {}
    try:
        notices |= _read_words(options, list(words.file), ignored, values, sources, "file")
    except UserError as error:
        raise UserError(f"{words.name}: {error}") from error
    refuse_near_misses([o.env for o in options if o.env], environ)
    for opt in options:
        text = environ.get(opt.env, "").strip() if opt.env else ""
        if text:
            values[opt.name] = _from_text(opt, [text], f"environment variable {opt.env}")
            sources[opt.name] = f"environment {opt.env}"
    notices |= _read_words(options, list(words.argv), ignored, values, sources, "command line")
    return Loaded(cls(**values), sources, list(notices.values()))


def spellings(cls) -> dict[str, int | None]:
    """Every flag that `load` knows of `cls`, with the number of values that follow it (None: a list of any length), for
    programs that translate the flags of others."""
    return {
        flag: 0 if opt.kind is bool else None if opt.count == 0 else opt.count or 1
        for opt in _options(cls)
        for flag in _spellings(opt)
    }


def key_names(cls) -> dict[str, str]:
    """What users call each field of `cls`: the key of the original's configuration where an alias is one, else its own
    name."""
    return {opt.name: next((flag for flag in opt.flags if flag[0] != "-"), opt.name) for opt in _options(cls)}


def describe(cls, prog: str, intro: str, epilog: str = "") -> str:
    """The text of `--help`: for each field its flags, kind, meaning, default and variable, by group."""
    lines = [f"usage: {prog} [options]", "", textwrap.fill(intro, 100), ""]
    groups: dict[str, list[_Option]] = {}
    for opt in _options(cls):
        groups.setdefault(opt.group, []).append(opt)
    groups.setdefault("Options", [])
    for group, members in groups.items():
        lines.append(f"{group}:")
        for opt in members:
            tail = f"default {_to_text(opt.default)}" + (f"; variable {opt.env}" if opt.env else "")
            if opt.kind is bool:
                value = ""
                head = ", ".join(f"{flag}/--no-{flag[2:]}" if flag.startswith("--") else flag for flag in opt.flags)
            else:
                value, head = f"{opt.expected}; ", ", ".join(opt.flags)
            lines += [f"  {head}", *_indented(opt.help), *_indented(f"({value}{tail})")]
        if group == "Options":
            lines += ["  -h, --help", *_indented("show this text")]
        lines.append("")
    return "\n".join([*lines, *([textwrap.fill(epilog, 100), ""] if epilog else [])])


def format_config(config, sources: Mapping[str, str]) -> str:
    """One aligned line a field: `name = value  (where it came from)`."""
    rows = [(f.name, _to_text(getattr(config, f.name)), sources[f.name]) for f in dataclasses.fields(config)]
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:<{wide[0]}} = {value:<{wide[1]}}  ({source})" for name, value, source in rows)


def to_dict(config) -> dict[str, Any]:
    """The settings as plain values that JSON and a checkpoint can hold: paths as text, tuples as lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls, values: Mapping[str, Any]):
    """The settings that `to_dict` wrote; fields not in `values` keep their default.

    Raises `UserError` for an unknown key or a value of the wrong kind.
    """
    options = {opt.name: opt for opt in _options(cls)}
    found = {}
    for key, value in values.items():
        if key not in options:
            raise UserError(f"stored configuration: unknown key {key!r}{_suggest(key, options)}")
        found[key] = _from_plain(options[key], value, f"stored configuration: {key}")
    return cls(**found)


def _options(cls) -> list[_Option]:
    hints = typing.get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        if _META not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name} was not made by option()")
        meta = field.metadata[_META]
        kind, count, optional = _resolve(hints[field.name], f"{cls.__name__}.{field.name}")
        flags = (*meta["flags"], "--" + field.name.replace("_", "-"))
        options.append(_Option(field.name, kind, count, optional, **{**meta, "flags": flags}, default=field.default))
    flags, variables = [flag for opt in options for flag in _spellings(opt)], [opt.env for opt in options if opt.env]
    for names in (flags, variables):
        if len(set(names)) != len(names):
            raise TypeError(f"{cls.__name__}: named twice: {sorted({n for n in names if names.count(n) > 1})}")
    return options


def _resolve(hint, where: str) -> tuple[type, int | None, bool]:
    """An annotation as (kind of one value, how many: None for a plain value and 0 for any number, may be none)."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        optional, hint = True, inner[0]
        if len(inner) != 1:
            raise TypeError(f"{where}: only `X | None` is understood")
    if hint in _WORDS:
        return hint, None, optional
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and args[0] in (int, float, str) and set(args[1:]) <= {args[0], ...}:
        return args[0], 0 if args[-1] is ... else len(args), optional
    raise TypeError(f"{where}: no rule for the annotation {hint}")


def _spellings(opt: _Option) -> dict[str, bool | None]:
    """Each flag of a field; for a bool with the value it stands for."""
    if opt.kind is not bool:
        return dict.fromkeys(opt.flags)
    negated = {f"--no-{flag[2:]}": False for flag in opt.flags if flag.startswith("--")}
    return dict.fromkeys(opt.flags, True) | negated


def _read_words(options, argv: list[str], ignored: Mapping, values: dict, sources: dict, source: str) -> dict[str, str]:
    """Put what `argv` says into `values` and `sources`; return the notices about ignored flags."""
    known = {flag: (opt, value) for opt in options for flag, value in _spellings(opt).items()}
    notices: dict[str, str] = {}

    def is_value(word: str) -> bool:
        return not word.startswith("--") and word.partition("=")[0] not in known and word not in ignored

    def take(limit: int | None, is_wanted: Callable[[str], bool]) -> list[str]:
        taken = []
        while argv and (limit is None or len(taken) < limit) and is_wanted(argv[0]):
            taken.append(argv.pop(0))
        return taken

    while argv:
        word = argv.pop(0)
        flag, equals, attached = word.partition("=")
        if re.match(r"-[^-].", flag) and flag not in known and flag[:2] in known:  # -b8, as argparse reads it
            flag, equals, attached = word[:2], "=", word[2:]
        if flag in ignored:
            count, reason = ignored[flag]
            if not equals:
                take(count, is_value)
            notices[flag] = f"{flag} has no effect here: {reason}"
            continue
        if flag not in known:
            refuse_word(word, flag, [*known, *ignored])
        opt, fixed = known[flag]
        if opt.kind is bool:
            if equals:
                raise UserError(f"{flag} takes no value (given: {attached!r}); use {opt.flags[-1]} or --no-...")
            values[opt.name] = fixed
        else:
            words = [attached] if equals else take(1, is_value)
            if not words:
                raise UserError(f"{flag} needs a value: {opt.expected}")
            if opt.count is not None and not equals and "," not in words[0] and _is_number(words[0]):
                words += take(opt.count - 1 if opt.count else None, _is_number)
            values[opt.name] = _from_text(opt, words, flag)
        sources[opt.name] = f"{source} {flag}"
    return notices


def refuse_word(word: str, flag: str, known: Iterable[str]) -> typing.NoReturn:
    """Raises UserError for a word of the command line, `flag` without "=VALUE", that is none of the flags `known`."""
    if not flag.startswith("-"):
        raise UserError(f"unexpected word {word!r} on the command line: every value follows a flag such as --name")
    name = re.sub(r"^--(eval(uate)?|test|val(idate)?)(-only)?$", "--mode evaluate", flag.replace("_", "-"))
    raise UserError(f"unknown flag {flag}{_suggest(name, [*known, '--help', '--mode evaluate'])}; --help lists all")


def _suggest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def refuse_near_misses(known: Iterable[str], environ: Mapping[str, str]) -> None:
    """Raises UserError for a variable one slip away from a known one: it would otherwise be ignored in silence."""
    declared = {name: name.upper().replace("_", "") for name in known}
    for name in environ:
        bare = name.upper().replace("_", "")
        for ours, ours_bare in declared.items():
            if name not in declared and _is_slip(bare, ours_bare):
                raise UserError(
                    f"environment variable {name}={environ[name]!r} is not known: did you mean {ours}? "
                    f"Rename it, or take it out of the environment (unset {name})."
                )


def _is_slip(a: str, b: str) -> bool:
    if a == b or min(len(a), len(b)) < 6:  # SEED and SPEED differ by one letter and are different words
        return a == b
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return matcher.quick_ratio() >= 0.85 and matcher.ratio() >= 0.85


def _from_text(opt: _Option, words: list[str], where: str):
    """The value that the user's words stand for; several words only for a tuple."""
    given = " ".join(words)
    if opt.optional and given.lower() == "none":
        return None
    if opt.count is None:
        value = _scalar(opt.kind, words[0])
    else:
        inner = re.fullmatch(r"\((.*)\)|\[(.*)\]|([^()\[\]]*)", given.strip(), re.DOTALL)
        listed = re.split(r"[,\s]+", "".join(filter(None, inner.groups()))) if inner else []
        parts = [_scalar(opt.kind, part) for part in listed if part] if inner else [None]
        value = None if None in parts or (opt.count and len(parts) != opt.count) else tuple(parts)
    return _checked(opt, value, where, given)


def _scalar(kind: type, text: str):
    """The value of one word, or None where the word is no such value."""
    try:
        text.encode()  # bytes that are not UTF-8 arrive as lone surrogates, which nothing later can print or store
        value = _BOOLS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        return None
    usable = math.isfinite(value) if kind is float else abs(value) < 2**63 if kind is int else text or kind is str
    return value if usable else None


def _checked(opt: _Option, value, where: str, given):
    expected = opt.expected
    if value is not None:
        strange = [part for part in _each(value) if opt.choices and part not in opt.choices]
        wrong = f"expected {expected}" if strange else None
        if wrong and opt.kind is str:
            wrong += _suggest(strange[0], opt.choices)
        needed = opt.check(value) if opt.check and not wrong else None
        if not wrong and not needed:
            return value
        expected = needed or wrong.removeprefix("expected ")
    raise UserError(f"{where}: {given!r} is not valid, expected {expected}")


def _from_plain(opt: _Option, value, where: str):
    """The reverse of `_plain`, for one field."""
    if value is None and opt.optional:
        return None
    wanted = {float: (int, float), Path: (str,)}.get(opt.kind, (opt.kind,))
    parts = value if opt.count is not None and isinstance(value, (list, tuple)) else [value]
    good = all(isinstance(part, wanted) and (opt.kind is bool or not isinstance(part, bool)) for part in parts)
    good = good and (opt.count is not None) == isinstance(value, (list, tuple))
    good = good and (not opt.count or len(parts) == opt.count)
    parts = tuple(opt.kind(part) for part in parts) if good else ()
    good = good and (opt.kind is not float or all(map(math.isfinite, parts)))
    return _checked(opt, (parts[0] if opt.count is None else parts) if good else None, where, value)


def _plain(value):
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _to_text(value) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _each(value):
    return value if isinstance(value, tuple) else (value,)


def _is_number(word: str) -> bool:
    return _scalar(float, word) is not None


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
