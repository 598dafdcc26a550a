"""Whether two lists of classes are the same: those of two files, or of a checkpoint and a file. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

Entry = tuple[int, str]
"""The category id of a class and its name."""


def class_names(ids: Sequence[int], names: Sequence[str]) -> dict[int, str]:
    """Name by category id; classes that share a name are told apart by their ids."""
    return {i: name if names.count(name) == 1 else f"{name} ({i})" for i, name in zip(ids, names, strict=True)}


def differing_files(one: Sequence[Entry], two: Sequence[Entry], first: str, second: str) -> list[str]:
    """In words, where the categories of two files differ: each id must be in both, with one name."""
    here, there = dict(one), dict(two)
    words = []
    for i in sorted(here.keys() | there.keys()):
        if i not in there or i not in here:
            words.append(f"id {i} ({(here | there)[i]!r}) is only in {first if i in here else second}")
        elif here[i] != there[i]:
            words.append(f"id {i} is {here[i]!r} in {first} and {there[i]!r} in {second}")
    return words


def differing_classes(then: Sequence[Entry], now: Sequence[Entry]) -> list[str]:
    """In words, where the classes of a checkpoint differ from those of a file.

    A class is its place in the order of the ids. Its name must be the same; its id may differ, as those of one data set
    do that counts from 0 or from 1. A checkpoint that knows no classes is no different.
    """
    if not then:
        return []
    words = []
    for (old_id, old), (new_id, new) in zip(then, now, strict=False):
        if old.removesuffix(f" ({old_id})") != new.removesuffix(f" ({new_id})"):
            words.append(f"{old!r} (id {old_id}) is {new!r} (id {new_id}) there")
    words += [f"{name!r} (id {i}) is not there" for i, name in then[len(now) :]]
    return words + [f"{name!r} (id {i}) is new there" for i, name in now[len(then) :]]


def told_apart(one: Path, two: Path) -> tuple[str, str]:
    """Short names of two files."""
    return (str(one), str(two)) if one.name == two.name else (one.name, two.name)


def some(words: Sequence[str], most: int = 4) -> str:
    """The first of many, and how many more there are."""
    more = f"; and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more
