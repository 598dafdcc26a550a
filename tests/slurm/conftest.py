"""A local Slurm for a module's tests; see cluster.py, and containers.py for what the containers are."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.containers import make_image
from tests.slurm.jobs import make_data, start


class Folders:
    """As pytest's tmp_path_factory, but users who are not root can enter what it makes."""

    def __init__(self, base: Path) -> None:
        self.base, self.count = base, 0

    def mktemp(self, name: str) -> Path:
        self.count += 1
        folder = self.base / f"{name}{self.count}"
        folder.mkdir()
        return folder


@pytest.fixture(scope="session")
def tmp_path_factory():
    base = Path(tempfile.mkdtemp(prefix="test-slurm-"))
    base.chmod(0o755)
    yield Folders(base)
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def tmp_path(tmp_path_factory):
    return tmp_path_factory.mktemp("case")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of four CPUs, no containers."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def container_cluster(tmp_path_factory):
    """Two nodes of four CPUs with the test double of Pyxis."""
    with Cluster(tmp_path_factory.mktemp("slurm"), containers="0.24.0") as running:
        yield running


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """A .sqsh that sets two variables; it wants host_mounts() to run anything."""
    path = tmp_path_factory.mktemp("image") / "tiny.sqsh"
    return make_image(path, {"FROM_IMAGE": "yes", "PYTORCH_VERSION": "2.9"})


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The scenes that jobs.py trains on."""
    return make_data(tmp_path_factory.mktemp("data") / "the scenes")


@pytest.fixture(scope="module")
def submit_for_module(cluster, data, tmp_path_factory):
    """As submit, for jobs that several tests look at; they are cancelled after the module."""
    jobs = []

    def submit(*words, **environ):
        jobs.append(start(cluster, data, tmp_path_factory.mktemp("jobs") / "user", *words, **environ))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.end()


@pytest.fixture
def submit_to(data, tmp_path):
    """submit_to(cluster)(*words, **environ) submits a job of run.sub (jobs.start); all are cancelled after the test."""
    jobs = []

    def submit_to(cluster):
        def submit(*words, **more):
            jobs.append(start(cluster, data, tmp_path / f"user {len(jobs)}", *words, **more))
            return jobs[-1]

        return submit

    yield submit_to
    for job in jobs:
        if job.cluster.daemons:  # else the test has stopped its own cluster
            job.end()


@pytest.fixture
def submit(cluster, submit_to):
    """submit_to the module's cluster."""
    return submit_to(cluster)
