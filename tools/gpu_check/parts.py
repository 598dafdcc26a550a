"""What a check consists of: its parts, the stages in which they run, and what a benchmark adds to both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A function (Context) -> jobs of a module. cpu: whether it runs by default without a GPU. patience: seconds after
    which a job counts as hung; None where the part ends its programs itself."""

    name: str
    module: str
    function: str
    patience: float | None = 60.0
    cpu: bool = False


@dataclass(frozen=True)
class Stage:
    """A part, or the cases of it that match a pattern, or its first so many; seconds: its time on a GPU."""

    part: str
    seconds: float
    cases: tuple[str, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark brings to a check; the whole of it may be left out.

    first: stages of the core list; core_only: those that the core list has beside, being the beginning of one in main;
    main: stages right after the core; rest: those that may be cut. ops: a module with GROUPS, functions (Context) ->
    (name, function -> Case) of its native ops. published: images/s of others, targets: ours, both for the JSON alone.
    sections: of the table, functions (JSON) -> lines.
    """

    parts: tuple[Part, ...] = ()
    first: tuple[Stage, ...] = ()
    core_only: tuple[Stage, ...] = ()
    main: tuple[Stage, ...] = ()
    rest: tuple[Stage, ...] = ()
    ops: str = ""
    published: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    sections: tuple[Callable[[dict[str, Any]], Iterator[str]], ...] = ()
