"""Options and variables that nobody should have typed: each is refused by name, or has the value that was typed."""

import dataclasses
import random
import re
import string
import typing
from pathlib import Path

import pytest

from detcore import UserError
from detcore.config import from_dict, load, to_dict
from single_stage_detector.config import IGNORED_FLAGS, Config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config)
DEFAULT = load(Config, [], {}).config
ENV = {field.metadata["detcore.option"]["env"]: name for name, field in FIELDS.items()}
ENV.pop(None, None)
FLAGS = {"--" + name.replace("_", "-"): name for name in FIELDS}
WORDS = [
    "0", "1", "7", "-1", "+5", "007", "1.5", "-0.0", "1e3", "1e-3", "1e400", "-1e400", "nan", "inf", "1e-400", "0x10",
    "1,2", "64,64", "64 64", "1,2,3,4,5", "(64, 96)", "64,", ",", "64,x", "10**9", "9" * 18, "9" * 25, "none", "NONE",
    "true", "True", "yes", "", " ", "x", "--", "-", "=", "a=b", "resnet18", "ResNet18", "resnet180", "custom", "/tmp/x",
    "../y", "\udcff", "é", "\n", "1\n", "cpu", "train", "closed", "9" * 40 + ".0", "1_000", "٣",
]  # fmt: skip


def plain_value(hint, text: str):
    """What a text means for a field of this kind, read with Python's own types; ValueError where it means nothing."""
    options = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if type(None) in typing.get_args(hint):
        return None if text.strip().lower() == "none" else plain_value(options[0], text)
    if typing.get_origin(hint) is tuple:
        parts = tuple(options[0](part) for part in re.split(r"[,\s]+", text.strip().strip("()[]")) if part)
        if ... not in options and len(parts) != len(options):
            raise ValueError(text)
        return parts
    if hint is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
    return hint(text)


def equal(value, typed) -> bool:
    return value == typed or (value is not None and type(value) is not bool and str(value) == str(typed).strip())


def judge(words: list[str], environ: dict[str, str], name: str, text: str, label: str) -> bool:
    """Whether the value is accepted; it must then be what was typed, and every other field must stay as it was."""
    try:
        config = load(Config, words, environ, IGNORED_FLAGS).config
    except UserError as error:
        message = str(error)
        flags = re.findall(r"--[a-z-]+", message)
        assert label in message or any(FLAGS.get(flag) == name for flag in flags) or "--" in message, message
        assert "Traceback" not in message
        return False
    assert equal(getattr(config, name), plain_value(HINTS[name], text)), (name, text, getattr(config, name))
    assert {**vars(config), name: None} == {**vars(DEFAULT), name: None}
    assert from_dict(Config, to_dict(config)) == config
    return True


@pytest.mark.parametrize("seed", range(3))
def test_any_word_for_any_flag(seed):
    rng, accepted = random.Random(seed), 0
    for _ in range(600):
        flag = rng.choice([flag for flag, name in FLAGS.items() if HINTS[name] is not bool])
        text = rng.choice(WORDS)
        words = [f"{flag}={text}"] if rng.random() < 0.7 else [flag, text]
        accepted += judge(words, {}, FLAGS[flag], text, flag)
    assert 60 < accepted < 500


def test_any_word_for_any_variable():
    accepted = 0
    for variable, name in ENV.items():
        for text in WORDS:
            if text.strip():
                accepted += judge([], {variable: text}, name, text, variable)
            else:  # documented: an empty variable counts as not set
                assert load(Config, [], {variable: text}).config == DEFAULT
    assert accepted > 50


def slip(word: str, rng: random.Random, letters: str) -> str:
    """One typing mistake: a letter left out, doubled, exchanged with its neighbour, or another one."""
    at, kind = rng.randrange(len(word)), rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    if kind == 2:
        return word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return word[:at] + rng.choice(letters) + word[at + 1 :]


@pytest.mark.parametrize("seed", range(2))
def test_misspelt_flags_are_refused(seed):
    rng = random.Random(seed)
    known = {*FLAGS, *("--no-" + flag[2:] for flag in FLAGS), *IGNORED_FLAGS, "--"}
    known |= {spelling for field in FIELDS.values() for spelling in field.metadata["detcore.option"]["flags"]}
    for _ in range(500):
        flag = rng.choice(list(FLAGS))
        wrong = "--" + slip(flag[2:], rng, string.ascii_lowercase + "-")
        if wrong in known:
            continue
        words = [wrong] if HINTS[FLAGS[flag]] is bool else [wrong, "1"]
        with pytest.raises(UserError, match=re.escape(f"unknown flag {wrong}")):
            load(Config, words, {}, IGNORED_FLAGS)


def test_misspelt_variables_are_refused():
    """Names of seven letters and more; shorter ones are often other words (SEED and SPEED), as config.py says."""
    rng, seen = random.Random(0), 0
    for variable in (name for name in ENV if len(name.replace("_", "")) >= 7):
        for _ in range(40):
            wrong = slip(variable, rng, string.ascii_uppercase + "_")
            if wrong != variable and wrong not in ENV:
                seen += 1
                with pytest.raises(UserError, match=f"environment variable {wrong}='1'"):
                    load(Config, [], {wrong: "1"}, IGNORED_FLAGS)
    assert seen > 300


@pytest.mark.parametrize("seed", range(2))
def test_stored_settings_of_any_kind(seed):
    """The settings inside a checkpoint: a value is refused by name or taken exactly as it stands."""
    rng, accepted = random.Random(seed), 0
    good = to_dict(DEFAULT)
    values = [None, True, False, 0, 1, -1, 2**63, 10**30, 0.5, 1e400, float("nan"), "", "x", "1", "cpu", [], {}, [1, 2],
              [64, 64], [64.0, 64], [64, "64"], [1] * 5, [[1]], b"x", "resnet18", "none"]  # fmt: skip
    for _ in range(400):
        name, value = rng.choice(list(FIELDS)), rng.choice(values)
        try:
            config = from_dict(Config, good | {name: value})
        except UserError as error:
            assert name in str(error) or name.replace("_", "-") in str(error) or "--" in str(error)
            continue
        accepted += 1
        assert (HINTS[name] is bool) == (type(value) is bool)
        stored = getattr(config, name)
        plain = str(stored) if isinstance(stored, Path) else list(stored) if isinstance(stored, tuple) else stored
        if isinstance(stored, Path | float):
            value = str(Path(value)) if isinstance(stored, Path) else float(value)
        assert plain == value
    assert accepted > 30
