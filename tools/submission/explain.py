"""Why a trial failed, found in what its ranks left behind: `tools/trials.py explain`."""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from detcore import cli

TAIL_BYTES, TAIL_LINES, LINE_LENGTH, TABLE_LINES = 96 * 1024, 10, 240, 17
LOW_DISK_MIB = 50
ORDERLY = {129, 130, 131, 138, 143}  # HUP, INT, QUIT, USR1, TERM: somebody asked the process to end
AFTERMATH_S = 10  # what a signal ends so long after the first failure was killed because of it
SIGNALS = {
    132: "an instruction this processor does not have: was it compiled for another one?",
    134: "it gave up by itself; its last lines say why",
    135: "shared memory or a disk is full: fewer --workers, a larger --shm-size, df -h /dev/shm",
    137: "out of memory, most likely: see dmesg on {node}. Else somebody killed it",
    139: "a fault in compiled code; see dmesg on {node}",
}
# The error of a rank whose peers went away, or whose peer found the fault.
_COLLATERAL = re.compile(
    r"gloo|nccl|DistError|DistBackend|connection (closed|reset|refused)|broken pipe|timed out|socket timeout"
    r"|loss of another rank|do not find each other",
    re.IGNORECASE,
)
_VERDICT = re.compile(r"^watchdog on rank \d+: (?!a collective failed)(.*)")
_NAMED = re.compile(r"rank (\d+) \(host (\S*), pid \d+, step (\d+), phase ([^)]*)\)")
_TABLE_ROW = re.compile(r"^  (rank  host\s|\d+ +\S+ +\d+ +\d+ .* s  )")
_STACK = re.compile(
    r'(Current thread|Thread) 0x|  File "[^"]*", line \d+ in |  <no Python frame>|Fatal Python error: |Timeout \(\d'
    r"|Extension modules: |  \.\.\.$"
)
# Of Python and bash after a kill; the configuration that every run prints first.
_HOUSEKEEPING = re.compile(
    r"resource_tracker|run_and_time\.sh: line \d+: +\d+ |^\w+ += .*\)$"
    r"|^frame #\d+: |^<omitting python frames>|^Exception raised from .* \(most recent call first\):"  # torch's C++
)
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: ")  # the node's slurmd says so
_SLURM = re.compile(r"^(srun|slurmstepd|slurmd|pyxis|enroot)\b.*?: ")
_TORCHRUN_ROOT = re.compile(
    r"Root Cause.*?host\s*: (\S+).*?rank\s*: (\d+) .*?exitcode\s*: (-?\d+)",
    re.DOTALL,
)


@dataclass
class Rank:
    """One task: `code` None means that it left no line in exits.txt; `time` is seconds since the epoch."""

    number: int
    node: str
    code: int | None = None
    time: int = 0
    lines: list[str] = field(default_factory=list)  # the tail of its log
    log: Path | None = None

    @property
    def error(self) -> str:
        """Its last `error:` line or the exception of its last traceback; empty if there is neither."""
        for i in range(len(self.lines) - 1, -1, -1):
            if self.lines[i].startswith("error: "):
                return self.lines[i].removeprefix("error: ")
            if self.lines[i].startswith("Traceback (most recent"):
                return next((line for line in self.lines[i + 1 :] if line[:1].strip()), "")
            if self.lines[i].startswith("run_and_time.sh: ") and "killed by signal" not in self.lines[i]:
                return self.lines[i]
        return ""

    @property
    def last_lines(self) -> list[str]:
        """What a person wants to see of its log: no events, no stack dumps, no tables, nothing twice in a row."""
        shown: list[str] = []
        for line in self.lines:
            noise = ":::" in line or _STACK.match(line) or _TABLE_ROW.match(line) or not line.strip()
            noise = (
                noise or _HOUSEKEEPING.search(line) or line.startswith(("watchdog on rank", "  stacks of this rank:"))
            )
            if not noise and shown[-1:] != [line]:
                shown.append(line)
        return shown[-TAIL_LINES:]


@dataclass
class Trial:
    folder: Path
    ranks: dict[int, Rank]
    slurm: list[str]  # what srun, slurmstepd and Pyxis said
    answered: set[str] = field(default_factory=set)  # nodes on which a rank came to an end, of its own or killed

    def having(self, codes: Iterable[int | None]) -> list[Rank]:
        wanted = set(codes)
        return sorted((r for r in self.ranks.values() if r.code in wanted), key=lambda r: (r.time, r.number))

    def slurm_says(self, pattern: str) -> bool:
        return any(re.search(pattern, line, re.IGNORECASE) for line in self.slurm)

    def lost_nodes(self) -> list[str]:
        """Nodes of none of whose ranks anything is known, where another node's left an exit code."""
        alive = {r.node for r in self.ranks.values() if r.code is not None}
        alive |= self.answered if alive else set()
        return list(dict.fromkeys(r.node for r in self.ranks.values() if r.node not in alive)) if alive else []


def tail(path: Path) -> list[str]:
    """The last whole lines of a file of any size and content, as text without control characters."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = text.split("\n")[1 if size > TAIL_BYTES else 0 :]
    cleaned = []
    for line in lines:
        line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.rstrip("\r").rpartition("\r")[2])
        line = re.sub(r"[^\t\x20-\x7e\xa0-\uffef]|\ufffd", "?", line)
        cleaned.append(re.sub(r"\?{3,}", "[binary]", line))
    return cleaned[:-1] if cleaned and not cleaned[-1] else cleaned


def read(folder: Path, nodes: list[str], per_node: int) -> Trial:
    """All ranks of the trial, block-distributed over the nodes where exits.txt does not name theirs."""
    logs = {int(m[1]): p for p in folder.glob("rank_*.log") if (m := re.fullmatch(r"rank_(\d+)\.log", p.name))}
    exits: dict[int, tuple[str, int, int]] = {}
    if (folder / "exits.txt").is_file():
        for line in tail(folder / "exits.txt"):
            if m := re.fullmatch(r"(\d+) (\S+) (\d+) (\d+)", line.strip()):
                exits[int(m[1])] = (m[2], int(m[3]), int(m[4]))
    answered = {node for node, *_ in exits.values()}
    killed = folder / "killed.txt"
    if killed.is_file():  # run.sub killed what did not end by itself; that is nobody's exit code
        since = int(killed.read_text() or 0) - 1  # clocks of nodes differ
        exits = {n: exit for n, exit in exits.items() if exit[1] != 137 or exit[2] < since}
    known = set(logs) | set(exits)
    # One torchrun on each machine speaks for all its ranks.
    through_torchrun = bool(exits) and per_node > 1 and all(n % per_node == 0 for n in known)
    ranks = {}
    for n in sorted(known if through_torchrun else known | set(range(len(nodes) * per_node))):
        node = nodes[n // per_node] if n // per_node < len(nodes) else "an unknown node"
        ranks[n] = Rank(n, *(exits.get(n) or (node,)))
        if n in logs:
            ranks[n].log, ranks[n].lines = logs[n], tail(logs[n])
    slurm = tail(folder / "srun.log") if (folder / "srun.log").is_file() else []
    slurm += [line for r in ranks.values() for line in r.lines]
    slurm = list(dict.fromkeys(line for line in slurm if _SLURM.match(line)))
    if through_torchrun:
        for rank in list(ranks.values()):
            _read_torchrun(rank, ranks)
    answered |= {m[1] for line in slurm if (m := _TASK_ENDED.match(line))}
    return Trial(folder, ranks, slurm, answered)


def _read_torchrun(launcher: Rank, ranks: dict[int, Rank]) -> None:
    """Puts the rank that failed first, by torchrun's own account, in place of torchrun's exit code."""
    match = _TORCHRUN_ROOT.search("\n".join(launcher.lines))
    if not match:
        return
    code = int(match[3])
    begin = next((i for i, line in enumerate(launcher.lines) if "torch/distributed/elastic/" in line), None)
    culprit = Rank(int(match[2]), launcher.node, 128 - code if code < 0 else code, launcher.time - 1)
    culprit.log, culprit.lines = launcher.log, launcher.lines[:begin]
    if launcher.number != culprit.number:
        del ranks[launcher.number]
    ranks[culprit.number] = culprit


def watchdog_verdict(trial: Trial) -> tuple[list[Rank], str]:
    """The ranks that most watchdogs name, and their words; ([], "") if none spoke."""
    said = Counter()
    for rank in trial.ranks.values():
        if rank.code in (cli.WATCHDOG, None):
            said.update([m[1] for line in rank.lines if (m := _VERDICT.match(line))][-1:])
    if not said:
        return [], ""
    words = said.most_common(1)[0][0].rstrip(".")
    named = [trial.ranks[int(n)] for n, *_ in _NAMED.findall(words) if int(n) in trial.ranks]
    for rank, (_, host, *_) in zip(named, _NAMED.findall(words)):
        rank.node = host if rank.node == "an unknown node" else rank.node
    return named, words


def names(ranks: list[Rank], short: bool = False) -> str:
    """'rank 2 on node n2', 'ranks 0 to 3 on node n1'; short: the ranks alone."""
    numbers, parts = sorted(r.number for r in ranks), []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    text = ", ".join(f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in parts)
    text = f"rank{'s' * (len(numbers) > 1)} {text}"
    nodes = list(dict.fromkeys(r.node for r in sorted(ranks, key=lambda r: r.number)))
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return text if short else f"{text} on node{'s' * (len(nodes) > 1)} {', '.join(nodes[:8])}{more}"


def code_words(code: int | None) -> str:
    """What an exit code means, in two words."""
    known = {
        cli.OK: "success", cli.CRASH: "crash", cli.BAD_INPUT: "bad input", cli.TARGET_NOT_REACHED: "target not reached",
        cli.STOPPED: "stopped", cli.NOT_FINITE: "loss not finite", cli.WATCHDOG: "ended by the watchdog",
        126: "program not executable", 127: "program not found", None: "no exit code",
    }  # fmt: skip
    if code is not None and code > 128 and code - 128 in set(signal.Signals):
        return signal.Signals(code - 128).name
    return known.get(code, "unknown")


def verdict(trial: Trial, code: int) -> tuple[list[Rank], str]:
    """(the ranks that are to blame, the sentence about them)."""
    killed = trial.having(r.code for r in trial.ranks.values() if (r.code or 0) > 128 and r.code not in ORDERLY)
    failures = [r.time for r in trial.ranks.values() if r.code not in {None, 0, 3, 4, *ORDERLY}]
    # An abort or a closed pipe may follow from a peer's end.
    hard = [r for r in killed if r.code not in (134, 141) and r.time <= min(failures) + AFTERMATH_S]
    if hard:
        return _killed(trial, [r for r in hard if r.code == hard[0].code])
    named, words = watchdog_verdict(trial)
    own = [r for r in named if r.code not in (None, 0, cli.TARGET_NOT_REACHED, cli.STOPPED, cli.WATCHDOG)]
    if own and own[0].error:
        return _failed(trial, own)
    if named:
        return named, _blamed(trial, named, words)
    failed = [r for r in trial.ranks.values() if r.code in (1, 2, 5) or 6 < (r.code or 0) <= 128]
    if failed:
        return _failed(trial, failed)
    if killed:
        return _killed(trial, killed[:1])
    return _ended(trial, code)


def _killed(trial: Trial, ranks: list[Rank]) -> tuple[list[Rank], str]:
    code = ranks[0].code
    hint = SIGNALS.get(code, "see dmesg on {node}").format(node=ranks[0].node)
    if code == 137 and trial.slurm_says("oom.kill|out of memory"):
        hint = f"out of memory, as Slurm says below: fewer --workers, a smaller batch; see dmesg on {ranks[0].node}"
    return ranks, f"{names(ranks)} {_was(ranks)} killed by {code_words(code)} (exit code {code}): {hint}"


def _was(ranks: list[Rank]) -> str:
    return "were" if len(ranks) > 1 else "was"


def _failed(trial: Trial, ranks: list[Rank]) -> tuple[list[Rank], str]:
    """The first own error among these, with every rank that has the same one."""
    first = min(ranks, key=lambda r: (bool(_COLLATERAL.search(r.error)), r.time, r.number))
    same = [r for r in trial.ranks.values() if r.code == first.code and r.error == first.error]
    what = {cli.CRASH: "crashed", cli.NOT_FINITE: "met a loss that is not finite"}.get(first.code, "ended")
    about = f"exit code {first.code}, {code_words(first.code)}"
    return same, f"{names(same)} {what} ({about}): {first.error or 'without an error message; its last lines follow'}"


def _blamed(trial: Trial, named: list[Rank], words: str) -> str:
    """The watchdog's verdict, sharpened by who left an exit code."""
    place = "; ".join(f"step {step}, phase {phase}" for *_, step, phase in _NAMED.findall(words)[:1])
    about = f"{', '.join(dict.fromkeys(_about(r) for r in named))}; {place}"
    said = words[list(_NAMED.finditer(words))[-1].end() :].removeprefix(" and more").strip()
    lost = [r for r in trial.ranks.values() if r.node == named[0].node]
    silent = named[0].node in trial.lost_nodes()
    if silent and (len(lost) > 1 or trial.slurm_says("node.?fail|not responding")):
        return (
            f"node {named[0].node} is gone ({names(lost, short=True)}; no exit code of any): a watchdog elsewhere "
            f"says that rank {named[0].number} ({place}) {said}"
        )
    if "stood still" in said:
        return f"{names(named)} hung ({about}): {said}"
    more = ""
    if silent:
        more = f". It was alone on {named[0].node}, so that this can be the process or its node (scontrol show node)"
    elif named[0].code is None and any(r.code is not None for r in lost):
        more = f". Other ranks of {named[0].node} ended by themselves, so the node lives"
    elif named[0].code is None and named[0].node in trial.answered:
        more = f". {named[0].node} answered when what was left was killed, so the node lives"
    return f"{names(named)} {_was(named)} lost ({about}): {said}{more}"


def _about(rank: Rank) -> str:
    return "no exit code" if rank.code is None else f"exit code {rank.code}"


def _ended(trial: Trial, code: int) -> tuple[list[Rank], str]:
    """Where nobody failed: stopped, target not reached, or ended from outside."""
    silent, stopped = trial.having([None]), trial.having([cli.STOPPED, *ORDERLY])
    first = next(iter(trial.ranks.values()), None)
    limit = " at its time limit" if trial.slurm_says("due to time limit") else ""
    if silent and len(silent) == len(trial.ranks):
        wrote = any(r.last_lines for r in silent)
        what = "no rank left an exit code" if wrote else "no rank wrote a line: the program did not start"
        cause = (
            trial.slurm[-1] if trial.slurm else "killed with the job step, or the launcher failed; see the job's log"
        )
        return silent[:1], f"{what} (exit code {code} of the launcher): {cause}"
    if silent:
        lost = trial.lost_nodes()
        where = f"node {', '.join(lost)} vanished: " if lost and trial.slurm_says("node failure") else ""
        guess = "" if where else f"; they were killed with the job step{limit}, or their node is gone"
        return silent, f"{where}{names(silent)} left no exit code{guess}"
    if stopped:
        said = next((line for r in stopped for line in reversed(r.lines) if line.startswith("Stopped by ")), "")
        said = said or "asked to end before there was anything to save"
        return stopped[:1], f"{names(stopped)} stopped on request{limit} (exit code {stopped[0].code}): {said}"
    if code == cli.TARGET_NOT_REACHED and first:
        said = next((line for line in reversed(first.lines) if "NOT reached" in line), "the target was not reached")
        return [first], f"no failure: {said}"
    if code == cli.OK:
        return [], "no failure: the launcher and every rank ended well"
    return [], f"every rank ended well, but the launcher ended with exit code {code}; see the job's log"


def disk_problem(folder: Path) -> str:
    """A sentence if the folder's disk is full; empty otherwise."""
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize / 2**20
    if free < LOW_DISK_MIB:
        return f"The disk of {folder} is full ({free:.1f} MiB free): logs and checkpoints may be cut. Free space."
    if about.f_files and not about.f_favail:
        return f"The disk of {folder} can hold no more files (df -i): logs and checkpoints may be missing."
    return ""


def explain(folder: Path, code: int, nodes: list[str], per_node: int) -> str:
    """The message for the person at 2 a.m.; its first line names the cause."""
    trial = read(folder, nodes, per_node)
    blamed, sentence = verdict(trial, code)
    lines = [f"trial ended with exit code {code}: {sentence}"]
    if (folder / "killed.txt").is_file():
        lines.append("  run.sub killed the ranks that had not ended by themselves, after asking them for their stacks")
    if problem := disk_problem(folder):
        lines.append(problem)
    for rank in blamed[:1]:
        if rank.log is None:
            lines.append(f"  rank {rank.number} left no log: it was never started, or its file could not be written")
        elif rank.last_lines:
            lines += [f"  last lines of {rank.log}:", *(f"  | {line[:LINE_LENGTH]}" for line in rank.last_lines)]
    if trial.slurm:
        lines += ["  Slurm said:", *(f"  | {line[:LINE_LENGTH]}" for line in trial.slurm[-4:])]
    table = next((t for r in trial.ranks.values() if (t := _last_table(r.lines))), [])
    if table and any(r.code == cli.WATCHDOG for r in trial.ranks.values()):
        more = [f"  ... {len(table) - TABLE_LINES} more ranks"] if len(table) > TABLE_LINES else []
        lines += ["  the watchdog's table:", *(f"  {row[:LINE_LENGTH]}" for row in [*table[:TABLE_LINES], *more])]
    codes = sorted({r.code for r in trial.ranks.values()}, key=lambda c: (c is None, c))
    groups = [f"{'none' if c is None else f'{c} ({code_words(c)})'}: {names(trial.having([c]), True)}" for c in codes]
    lines.append(f"  exit codes: {'; '.join(groups) or 'none'}")
    stacks = sorted(folder.glob("stacks_rank*.txt"), key=lambda p: (len(p.name), p.name))
    if stacks:
        lines.append(f"  Python stacks: {stacks[0]}" + (f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""))
    lines.append(f"  all logs: {folder}/rank_<r>.log")
    return "\n".join(lines)


def _last_table(lines: list[str]) -> list[str]:
    heads = [i for i, line in enumerate(lines) if line.startswith("  rank  host ")]
    table: list[str] = []
    for line in lines[heads[-1] :] if heads else []:
        if not _TABLE_ROW.match(line):
            break
        table.append(line)
    return table
