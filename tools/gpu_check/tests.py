"""The part `tests`: the gpu tests in groups of files, each in a pytest of its own, side by side.

A row has groups {name: {passed, failed, skipped_tests, not_run, error}}, their sums, failures [[test, what it said]]
and slowest [[test, seconds]]; while it is unfinished also outcomes {group: {test: outcome}}, by which the next call
goes on. A test that ends its process, loses the CUDA context or hangs has failed; the rest of its group goes on in a
new process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tools.gpu_check.state import CONTEXT_LOST, ROOT, Context, Job, OutOfTime, Row, Skip, leave, load

PATIENCE = 60.0
"""Seconds after which a test, or the start of a pytest, counts as hung."""
STARTS = 8
"""So many processes may a group use up."""
GROUPS = {
    "ops": {
        "triton": r"^tests/detcore/ops/test_conv3x3_kernels\.py$",
        **{folder.parent.name: f"^tests/{folder.parent.name}/ops/" for folder in sorted(ROOT.glob("tests/*/ops"))},
    },
    "steps": {"graphs": r"test_graphs\w*\.py$", "training": r"^tests/test_gpu\.py$", "others": ""},
}
"""Job: {group: pattern of its files}; a file belongs to the first group that it fits."""


def gpu_test_files() -> list[str]:
    """The test files that hold tests for a GPU; others are not even imported, so they may want what is not there."""
    marks = re.compile(r"mark\.gpu|\bimplementation\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if marks.search(file.read_text(encoding="utf-8"))]


def grouped(files: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """{job: {group: its files}}, without empty groups."""
    left = list(files)
    found: dict[str, dict[str, list[str]]] = {}
    for job, groups in GROUPS.items():
        for group, pattern in groups.items():
            own = [file for file in left if re.search(pattern, file)]
            left = [file for file in left if file not in own]
            if own:
                found.setdefault(job, {})[group] = own
    return found


def pytest_command(base: Path) -> list[str]:
    """pytest that writes nothing into the checkout."""
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={base}"]


def tests(context: Context) -> Iterable[Job]:
    """pytest -m gpu: the ops' tests, then those of whole steps."""

    def case(job: str, groups: dict[str, list[str]]) -> Callable[[], Row]:
        def run() -> Row:
            if not context.gpu:
                raise Skip("the gpu tests want a GPU")
            return run_groups(context, "tests", job, groups)

        return run

    for job, groups in grouped(gpu_test_files()).items():
        yield job, case(job, groups)


class Group:
    """The tests of some files, in one process after the other until all have been through.

    outcomes: {test: outcome} of earlier calls, which are not run again. words: further words for pytest.
    """

    def __init__(self, name: str, files: Sequence[str], outcomes: dict[str, str], work: Path, threads: int,
                 words: Sequence[str]):  # fmt: skip
        self.name, self.files, self.outcomes, self.words = name, files, outcomes, words
        self.said: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.error, self.left, self.starts, self.finished = "", 0, 0, False
        self.work = work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.start()

    def start(self) -> None:
        self.starts += 1
        outcomes, without = self.work / f"outcomes{self.starts}.jsonl", self.work / "without.txt"
        outcomes.write_text("")
        without.write_text("\n".join(self.outcomes), encoding="utf-8")
        command = [*pytest_command(self.work / "tmp"), "-p", "tools.gpu_check.pytest_plugin", f"--outcomes={outcomes}"]
        command += [f"--without={without}", "--continue-on-collection-errors", *self.words, *self.files]
        self.records, self.rest, self.test, self.ended = outcomes.open(encoding="utf-8"), "", None, False
        self.output = (self.work / f"output{self.starts}.txt").open("w+", encoding="utf-8", errors="replace")
        self.since = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def read(self) -> None:
        """Takes in what the plugin has written; a last line without its end waits."""
        *lines, self.rest = (self.rest + self.records.read()).split("\n")
        for record in map(json.loads, lines):
            if "collected" in record:
                self.left = record["collected"]
            elif "start" in record:
                self.test, self.since = record["start"], time.monotonic()
            elif "finish" in record:
                self.test, self.since = None, time.monotonic()
            elif "end" in record:
                self.ended = True
            elif self.outcomes.get(record["test"]) != "failed":  # a teardown may fail after a test has passed
                self.seconds[record["test"]] = record["seconds"]
                self.put(record["test"], record["outcome"], record["said"])

    def put(self, test: str, outcome: str, said: str = "") -> None:
        self.left -= test not in self.outcomes
        self.outcomes[test] = outcome
        if outcome == "failed":
            self.said[test] = said.strip().splitlines()[-1][:200] if said.strip() else ""
            print(f"FAILED {test}\n{said}", flush=True)

    def poll(self) -> None:
        """Looks at the process; starts another one after a test that has ended it."""
        if self.finished:
            return
        code = self.process.poll()
        self.read()
        if code is None:
            if time.monotonic() - self.since <= PATIENCE:
                return
            self.kill()
            if self.test is None:
                self.stop(f"pytest hung for {PATIENCE:.0f} s outside of a test: {self.last_words()}")
                return
            self.put(self.test, "failed", f"hung: no end after {PATIENCE:.0f} s")
        elif self.ended and code != CONTEXT_LOST:
            self.stop("" if code in (0, 1, 5) else f"pytest ended with code {code}: {self.last_words()}")
            return
        elif code == CONTEXT_LOST:
            print(f"{self.name}: the CUDA context was lost", flush=True)
        elif self.test is None:
            self.stop(f"pytest ended with code {code}: {self.last_words()}")
            return
        else:
            self.put(self.test, "failed", f"its process died, code {code}")
        if self.starts < STARTS:
            self.start()
        else:
            self.stop(f"given up after {STARTS} processes")

    def stop(self, error: str) -> None:
        self.error, self.finished = error, True

    def kill(self) -> None:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(3)

    def last_words(self) -> str:
        """The end of what pytest printed, which goes to the log as a whole."""
        self.output.seek(0)
        text = self.output.read()
        print(text[-4000:], flush=True)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")[:200]

    def row(self) -> Row:
        counts = {word: list(self.outcomes.values()).count(word) for word in ("passed", "failed", "skipped")}
        row = {"passed": counts["passed"], "failed": counts["failed"], "skipped_tests": counts["skipped"]}
        row["not_run"] = max(0, self.left)
        return row | ({"error": self.error} if self.error else {})


def run_groups(context: Context, part: str, job: str, groups: dict[str, list[str]],
               words: Sequence[str] = ("-m", "gpu and not dali")) -> Row:  # fmt: skip
    """Runs a job's groups side by side; its row is in the JSON while they run. Raises OutOfTime with it."""
    entry = load(context.out)["parts"].get(part, {})
    before = {} if job in entry.get("anew", ()) else entry.get("rows", {}).get(job, {})
    done = before.get("outcomes", {})
    threads = max(1, (os.cpu_count() or 1) // len(groups))
    running = []
    try:
        for name, files in groups.items():
            running.append(Group(name, files, dict(done.get(name, {})), context.work / "tests", threads, words))
        noted = time.monotonic()
        while not all(group.finished for group in running):
            time.sleep(0.2)
            for group in running:
                group.poll()
            if time.monotonic() - noted > 2:
                noted = time.monotonic()
                leave(context, part, job, summary(running, before) | outcomes(running))
            if context.left() < 1:
                row = summary(running, before) | outcomes(running)
                raise OutOfTime(f"stopped, {sum(g['not_run'] for g in row['groups'].values())} tests not run", row)
    finally:
        for group in running:
            if group.process.poll() is None:
                group.kill()
    return summary(running, before)


def outcomes(groups: Sequence[Group]) -> Row:
    return {"outcomes": {group.name: group.outcomes for group in groups}}


def summary(groups: Sequence[Group], before: Row) -> Row:
    """The row of a job, whose earlier row `before` knows what failed in earlier calls."""
    rows = {group.name: group.row() for group in groups}
    row: Row = {kind: sum(r[kind] for r in rows.values()) for kind in ("passed", "failed", "skipped_tests", "not_run")}
    said = dict(before.get("failures", [])) | {test: words for group in groups for test, words in group.said.items()}
    seconds = {test: s for group in groups for test, s in group.seconds.items()}
    row |= {"groups": rows, "failures": [list(item) for item in said.items()]}
    row["slowest"] = sorted(map(list, seconds.items()), key=lambda item: -item[1])[:5]
    errors = [f"{name}: {r['error']}" for name, r in rows.items() if "error" in r]
    if said:
        errors.insert(0, f"{len(said)} failed: {', '.join(said)}")
    if not row["passed"] + row["failed"] + row["skipped_tests"] and all(group.finished for group in groups):
        errors.append("pytest found no test")
    return row | ({"error": "; ".join(errors)[:400]} if errors else {})
