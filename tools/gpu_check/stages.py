"""Which parts run in which order, and what of an earlier call's results stands."""

from collections.abc import Sequence

from tools.gpu_check.benchmarks import benchmarks
from tools.gpu_check.parts import Part, Stage
from tools.gpu_check.state import matches

_OURS = tuple(benchmarks().values())
PARTS = {
    part.name: part
    for part in (
        Part("build", "tools.gpu_check.programs", "build", None, cpu=True),
        Part("tests", "tools.gpu_check.tests", "tests", None),
        Part("floor", "tools.gpu_check.floor", "floor", 30, cpu=True),
        Part("ops", "tools.gpu_check.ops", "ops", 30, cpu=True),
        *(part for ours in _OURS for part in ours.parts),
        Part("sanitizer", "tools.gpu_check.programs", "sanitizer", None),
    )
}
FIRST = (
    Stage("build", 20), Stage("tests", 35, cases=("ops",)), Stage("floor", 15),
    *(stage for ours in _OURS for stage in ours.first),
)  # fmt: skip
CORE = (*FIRST, *(stage for ours in _OURS for stage in ours.core_only))
"""--only core; three to four minutes where the libraries are carried and nothing is slow."""
STAGES = (
    *FIRST, *(stage for ours in _OURS for stage in ours.main), Stage("tests", 15), Stage("ops", 20),
    *(stage for ours in _OURS for stage in ours.rest), Stage("sanitizer", 5),
)  # fmt: skip
"""All of a check; a call's minutes are shared out by the stages' seconds. What a stage leaves is the next one's."""


def keep(state: dict, name: str, named: bool, cases: Sequence[str] = ()) -> bool:
    """Whether a part's earlier result stands; else "anew" in its entry has the keys that are to be measured again.

    A row that is to be measured again stays until its new one is there; one that hung is passed over unless a pattern
    of cases fits it. Rows of another commit, those with "commit", are measured again if the part is named.
    """
    entry = state["parts"].get(name)
    if not entry:
        return False
    rows = entry.get("rows", {})
    for word in ("running", "through"):  # of a check that was killed
        entry.pop(word, None)
    ended = done(entry)
    anew = set(entry.get("anew", ()))
    if cases:
        anew |= {key for key in rows if matches(key, cases)}
    else:
        for key, row in rows.items():
            failed = "error" in row and "unfinished" not in row
            other = "commit" in row and (named or name == "build" or "error" in row or "unfinished" in row)
            if "hung" not in row and ((named and ended) or failed or other):
                anew.add(key)
        if not anew and ended and entry.get("status") in ("passed", "skipped"):
            return True
    if anew:
        entry.update(anew=[key for key in rows if key in anew], done=[])
    if anew == set(rows):
        entry["seconds"] = 0
    return False


def mark_rows(state: dict, head: str) -> None:
    """Leaves in each row that is of another commit than `head`, this call's, that commit as "commit"."""
    for part in state["parts"].values():
        for row in part.get("rows", {}).values():
            row.setdefault("commit", state.get("commit", "unknown"))
            if row["commit"] == head:
                del row["commit"]


def done(entry: dict, cases: Sequence[str] = (), first: int = 0) -> bool:
    """Whether all jobs of a selection have been through, or all of the part's."""
    through = entry.get("done", [])
    return [list(cases), first] in through or [[], 0] in through


def stages_of(wanted: Sequence[str], gpu: bool, quick: bool) -> list[Stage]:
    """What a call is to do, in order, of the parts `wanted` or of all."""
    full = gpu and not quick
    if not wanted and full:
        return list(STAGES)
    order = list(dict.fromkeys(stage.part for stage in STAGES))
    own = {name: [stage for stage in STAGES if stage.part == name] for name in order}
    asked = wanted or [name for name in order if gpu or PARTS[name].cpu]
    named = []
    for name in order:
        if name in asked:
            split = full and own[name][0].cases
            named += own[name] if split else [Stage(name, sum(stage.seconds for stage in own[name]))]
    core = [stage for stage in CORE if gpu or PARTS[stage.part].cpu] if "core" in wanted else []
    return core + named


def with_build(stages: list[Stage], state: dict) -> list[Stage]:
    """The stages, behind the build where that of the folder is of another commit."""
    old = any("commit" in row for row in state["parts"].get("build", {}).get("rows", {}).values())
    wanted = old and stages and "build" not in [stage.part for stage in stages]
    return [*(stage for stage in STAGES if stage.part == "build" and wanted), *stages]
