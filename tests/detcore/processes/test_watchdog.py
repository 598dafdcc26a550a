"""The watchdog on real processes that are killed, stopped, hang, raise, or simply end at different times.

All scenarios run at once, once (see ranks.py); a test looks at one of them. A watchdog that does not end its world
shows as the time limit of the whole.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from detcore.cli import CRASH, OK, WATCHDOG

SCENARIOS = """killed1 killed0 stopped1 stopped0 asleep1 asleep0 behind0 raising1 raising0 in_c1 late1 late0
alone_asleep0 alone_late0 familiar1"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), *SCENARIOS.split()]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.wait(120) == 0
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert process.returncode == 0
    codes = json.loads((folder / "codes.json").read_text())

    def world(scenario):
        errors = [(folder / scenario / f"{rank}.err").read_text() for rank in range(len(codes[scenario]))]
        return codes[scenario], errors, folder / scenario

    return world


def named(text: str) -> set[str]:
    """The ranks that the watchdog's verdict in `text` gives as culprits."""
    found = set()
    for verdict in re.findall(r"^watchdog on rank \d: (rank .*)", text, re.MULTILINE):
        found |= set(re.findall(r"rank (\d) \(host", verdict))
    return found


@pytest.mark.parametrize("culprit", [0, 1])
def test_killed(worlds, culprit):
    codes, errors, folder = worlds(f"killed{culprit}")
    for rank in range(3):
        if rank == culprit:
            assert codes[rank] == -signal.SIGKILL
        else:
            assert codes[rank] == WATCHDOG
            assert named(errors[rank]) == {str(culprit)}
            assert "step 5, phase data" in errors[rank] and "killed" in errors[rank]
            assert "Thread" in (folder / f"stacks_rank{rank}.txt").read_text()
    tables = [rank for rank in range(3) if re.search(r"^  rank +host", errors[rank], re.MULTILINE)]
    assert tables == [1 if culprit == 0 else 0]


@pytest.mark.parametrize("culprit", [0, 1])
def test_stopped(worlds, culprit):
    codes, errors, _ = worlds(f"stopped{culprit}")
    other = 1 - culprit
    assert codes[other] == WATCHDOG
    assert named(errors[other]) == {str(culprit)}
    assert "step 5, phase data" in errors[other]
    assert codes[culprit] == WATCHDOG  # woken up after the other was gone


@pytest.mark.parametrize("scenario, culprit", [("asleep1", 1), ("asleep0", 0), ("behind0", 0)])
def test_hanging(worlds, scenario, culprit):
    codes, errors, folder = worlds(scenario)
    assert codes == [WATCHDOG, WATCHDOG]
    for text in errors:
        assert named(text) == {str(culprit)}
        assert "step 5, phase data" in text and "stood still for 7 s" in text
    assert "sleeping_for_ever" in (folder / f"stacks_rank{culprit}.txt").read_text()
    assert "sleeping_for_ever" not in (folder / f"stacks_rank{1 - culprit}.txt").read_text()


def test_a_phase_that_is_known_to_be_short_is_not_waited_for_as_long(worlds):
    codes, errors, _ = worlds("familiar1")
    assert codes == [WATCHDOG, WATCHDOG]
    for error in errors:
        assert named(error) == {"1"} and "step 59, phase step) stood still for 5 s" in error


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_of_one_ends_the_others(worlds, culprit):
    codes, errors, _ = worlds(f"raising{culprit}")
    assert codes[culprit] == CRASH and codes[1 - culprit] == WATCHDOG
    assert "Traceback" in errors[culprit] and "watchdog on" not in errors[culprit]
    assert named(errors[1 - culprit]) == {str(culprit)}
    assert "ended with an error: ValueError: boom" in errors[1 - culprit]


def test_hanging_in_c_code_that_blocks_the_interpreter(worlds):
    codes, errors, _ = worlds("in_c1")
    assert codes[0] == WATCHDOG and named(errors[0]) == {"1"}
    assert codes[1] == 1 and "misbehave" in errors[1]


@pytest.mark.parametrize("scenario", ["late0", "late1"])
def test_ending_at_different_times_is_no_death(worlds, scenario):
    codes, errors, folder = worlds(scenario)
    assert codes == [OK, OK]
    assert errors == ["", ""]
    assert not list(folder.glob("stacks*"))


def test_one_process_alone(worlds):
    codes, errors, folder = worlds("alone_asleep0")
    assert codes == [WATCHDOG]
    assert named(errors[0]) == {"0"} and "phase data" in errors[0]
    assert "sleeping_for_ever" in (folder / "stacks_rank0.txt").read_text()
    assert worlds("alone_late0")[:2] == ([OK], [""])
