"""The recipes of configs/ for RetinaNet are those that were published."""

import re

import pytest

from tests.configs import FOLDER, configs_of, exports, settings, triple

RECIPES = {  # nodes, GPUs a node, images a GPU, learning rate, warm-up epochs, epochs at most, as published
    "DGXA100": (1, 8, 32, 1e-4, 1, 8),
    "DGXH100_001x08x032": (1, 8, 32, 8.5e-5, 0, 8),
    "DGXH200_001x08x032": (1, 8, 32, 8.5e-5, 0, 8),
    "DGXB200_001x08x032": (1, 8, 32, 8.5e-5, 0, 8),
    "DGXA100_008x08x008": (8, 8, 8, 1e-4, 1, 8),
    "DGXH100_008x08x004": (8, 8, 4, 1e-4, 1, 6),
    "DGXH200_008x08x004": (8, 8, 4, 1e-4, 1, 6),
    "DGXB200_008x08x004": (8, 8, 4, 1e-4, 1, 6),
}
CLOCKS = {  # MHz, published for these systems: SET_MAXQ_CLK, SET_MINEDP_CLK
    **dict.fromkeys(("DGXH100_001x08x032", "DGXH200_001x08x032", "DGXB200_001x08x032"), ("1260", "1620")),
    **dict.fromkeys(("DGXH100_008x08x004", "DGXH200_008x08x004"), ("1410", "1830")),
    "DGXB200_008x08x004": ("1260", "1620"),
}


def test_all_systems_are_here():
    assert configs_of("single_stage_detector").keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    path = FOLDER / f"config_{name}.sh"
    exported = exports(path)
    config = settings(exported)
    found = (int(exported["DGXNNODES"]), int(exported["DGXNGPU"]), config.batch_size)
    assert (*found, config.lr, config.warmup_epochs, config.epochs) == RECIPES[name]
    assert f"global batch {found[0] * found[1] * found[2]}." in path.read_text().splitlines()[0]
    assert config.departures() == [] and config.mlperf_division == "closed"
    assert (exported.get("MAXQ_CLK"), exported.get("MINEDP_CLK")) == CLOCKS.get(name, (None, None))


@pytest.mark.parametrize("name", ["cpu_demo", "cpu_demo_002x02x004"])
def test_demo_is_small_open_and_named_so(name):
    exported = exports(FOLDER / f"config_{name}.sh")
    config = settings(exported)
    nodes, gpus = int(exported["DGXNNODES"]), int(exported["DGXNGPU"])
    assert (nodes, gpus, config.batch_size) == (triple(name) or (1, 1, 8)) and config.device == "cpu"
    assert config.mlperf_division == "open" and config.departures() and config.mlperf_org == "demonstration"
    assert config.dataset == "custom" and str(config.dataset_path) == "build/demo-data"
    assert config.norm == "batch" and not config.pretrained
    if nodes == 1:  # make demo runs it again and again
        assert config.overwrite and config.gallery > 0
    assert re.fullmatch(r"\d+ CPU cores \S+", config.mlperf_platform)
