"""A pytest plugin for the part `tests`: each result on disk at once, an end to lost contexts.

    pytest -p tools.gpu_check.pytest_plugin --outcomes FILE [--without FILE]

--outcomes gets one JSON object a line, written through at once: {"collected": n}, {"start": test}, {"test", "outcome",
"seconds", "said"} (passed, failed or skipped; said: the failure in full), {"finish": test} and {"end": exit code}.
--without names a file of tests, one a line, that are not run. After a test that has lost the CUDA context the process
ends at once with state.CONTEXT_LOST, since every later test would fail for its sake.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tools.gpu_check.state import CONTEXT_LOST, LOST


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--without", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes"), config.getoption("--without")))


class Outcomes:
    def __init__(self, file: Path, without: Path | None):
        self.file = file.open("a", encoding="utf-8")
        self.without = set(without.read_text(encoding="utf-8").splitlines()) if without else set()

    def write(self, **record: object) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        dropped = [item for item in items if item.nodeid in self.without]
        items[:] = [item for item in items if item.nodeid not in self.without]
        if dropped:
            config.hook.pytest_deselected(items=dropped)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, said=report.longreprtext[-4000:])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.when == "teardown" and report.skipped:
            return
        said = report.longreprtext if report.failed else ""
        self.write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), said=said[-4000:])
        if report.failed and lost(said):
            os._exit(CONTEXT_LOST)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(finish=nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(end=int(exitstatus))


def lost(said: str) -> bool:
    """Whether this process's CUDA context is lost, by what a test said or by the GPU; does not import torch itself."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return bool(LOST.search(said))
    from tools.gpu_check.jobs import lost_context

    return lost_context(said, gpu=True)
