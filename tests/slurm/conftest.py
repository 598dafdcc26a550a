"""A local Slurm for a module's tests; see cluster.py, and containers.py for what the containers are."""

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.containers import make_image


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of four CPUs, no containers."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def container_cluster(tmp_path_factory):
    """Two nodes of four CPUs with the test double of Pyxis."""
    with Cluster(tmp_path_factory.mktemp("slurm"), containers=True) as running:
        yield running


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """A .sqsh that sets two variables; it wants host_mounts() to run anything."""
    path = tmp_path_factory.mktemp("image") / "tiny.sqsh"
    return make_image(path, {"FROM_IMAGE": "yes", "PYTORCH_VERSION": "2.9"})
