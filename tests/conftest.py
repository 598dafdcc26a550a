"""Fixtures shared by the whole suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import emulation


def pytest_configure(config: pytest.Config) -> None:
    # Drawn examples are the same in every run, or no change could trust a pass; --hypothesis-seed=N draws others.
    # The health check is about fixtures with a state from example to example: those used with examples have none.
    same = config.getoption("--hypothesis-seed") is None
    settings.register_profile(
        "same", derandomize=same, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    settings.load_profile("same")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are compared bit for bit: their threads must not adapt to load
    if not hasattr(config, "workerinput"):  # xdist's workers come after the process that starts them
        emulation.build_cpu_libraries()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data sets that may lie beside the checkout; tests that want it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data sets beside this checkout")
    return folder


@pytest.fixture(params=["cpu", "emulated gpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> Iterator[emulation.Implementation]:
    """Each implementation of the native ops in turn, on `implementation.device`: see tests/emulation."""
    with emulation.running(request.param) as running:
        yield running
