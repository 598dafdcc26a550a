"""Every configs/config_*.sh: what it exports is read by somebody, fits its name, and the program accepts it."""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

from detcore.config import load
from single_stage_detector import config as retinanet
from ssd300 import config as ssd300

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(set(FOLDER.glob("config_*.sh")) - {FOLDER / "config_common.sh", FOLDER / "config_mounts.sh"})
DEMOS = [path for path in FILES if "cpu_demo" in path.name]
SYSTEMS = [path for path in FILES if path not in DEMOS]
MODULES = {"single_stage_detector": retinanet, "ssd300": ssd300}
PROGRAMS = {
    name: {f.metadata["detcore.option"]["env"] for f in dataclasses.fields(module.Config)} - {None}
    for name, module in MODULES.items()
}
LAUNCHER = {
    "BENCHMARK", "EXTRA_PARAMS", "DGXNNODES", "DGXNGPU", "DGXSYSTEM", "DGXSOCKETCORES", "DGXNSOCKET", "DGXHT",
    "WALLTIME_RUNANDTIME", "WALLTIME", "MAXQ_CLK", "MINEDP_CLK",
    "NCCL_NVLS_ENABLE", "NCCL_GRAPH_REGISTER", "NCCL_LOCAL_REGISTER", "GOMP_SPINCOUNT",
}  # fmt: skip
REQUIRED = LAUNCHER - {"MAXQ_CLK", "MINEDP_CLK", "GOMP_SPINCOUNT"} | {"BATCHSIZE"}
TRAINING = {
    "single_stage_detector": {"NUMEPOCHS", "LR", "WARMUP_EPOCHS"},
    "ssd300": {"NUMEPOCHS", "LR", "WARMUP_STEPS"},
}
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
SSD300 = {  # GPUs, images a GPU, learning rate of 32 images, warm-up steps, precision, as in the original's scripts
    "A100_FP16_1GPU": (1, 256, 2.6e-3, 300, "fp16"),
    "A100_FP16_4GPU": (4, 256, 2.7e-3, 1200, "fp16"),
    "A100_FP16_8GPU": (8, 128, 2.7e-3, 1200, "fp16"),
    "A100_FP32_8GPU": (8, 128, 2.7e-3, 1200, "tf32"),
    "A100_TF32_1GPU": (1, 64, 2.6e-3, 300, "tf32"),
    "A100_TF32_4GPU": (4, 64, 2.6e-3, 300, "tf32"),
    "A100_TF32_8GPU": (8, 128, 2.7e-3, 1200, "tf32"),
    **{f"FP16_{n}GPU": (n, 64, 2.6e-3, 300, "fp16") for n in (1, 4, 8)},
    **{f"FP32_{n}GPU": (n, 32, 2.6e-3, 300, "fp32") for n in (1, 4, 8)},
    "DGXH100_001x08x128": (8, 128, 2.7e-3, 1200, "bf16"),
    "DGXH200_001x08x128": (8, 128, 2.7e-3, 1200, "bf16"),
    "DGXH100_002x08x064": (16, 64, 2.7e-3, 1200, "bf16"),
}
SSD300_MODES = {  # mode, images, precision
    "FP16_EVAL": ("evaluate", 32, "fp16"),
    "FP32_EVAL": ("evaluate", 32, "fp32"),
    "FP16_INFERENCE_BENCHMARK": ("benchmark-inference", 64, "fp16"),
    "FP32_INFERENCE_BENCHMARK": ("benchmark-inference", 32, "fp32"),
}
SSD300_TPU = {  # cores, images a core, micro-batches, warm-up steps, precision, log interval, workers
    "1CORE_BS64": (1, 64, 1, 1848, "fp32", 10, 4),
    "1CORE_BS128": (1, 128, 1, 924, "fp32", 10, 4),
    "1CORE_BS128_BF16": (1, 128, 1, 924, "bf16", 10, 4),
    "1CORE_BS1024": (1, 128, 8, 300, "fp32", 16, 8),
    "1CORE_BS2048": (1, 128, 16, 300, "fp32", 16, 8),
    "8CORE_BS1024": (8, 128, 1, 300, "bf16", 16, 8),
}
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
by_system = pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
by_retinanet = pytest.mark.parametrize(
    "path", [path for path in SYSTEMS if "SSD300" not in path.stem], ids=lambda path: path.stem
)


def exports(path: Path, **environ: str) -> dict[str, str]:
    """What a shell with nothing but PATH and `environ` exports after sourcing `path` from another folder."""
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-euc", 'source "$0" && env -0', path],
        env={"PATH": os.environ["PATH"], **environ}, capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    assert done.stderr == ""
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {name: value for name, value in found.items() if name not in ("PATH", "PWD", "OLDPWD", "SHLVL", "_")}


def settings(exported: dict[str, str], *more: str):
    """The program's settings as run_and_time.sh starts it."""
    module = MODULES[exported["BENCHMARK"]]
    loaded = load(module.Config, [*exported["EXTRA_PARAMS"].split(), *more], exported, module.IGNORED_FLAGS)
    assert loaded.notices == []
    return loaded.config


def test_all_systems_are_here():
    published = {f"SSD300_{name}" for name in (*SSD300, *SSD300_MODES, *SSD300_TPU)}
    assert {path.stem.removeprefix("config_") for path in SYSTEMS} == {*RECIPES, *published}


def test_a_config_after_another_is_as_in_a_new_shell():
    """The values of the first are taken back; what somebody has set stays."""
    first, second = FOLDER / "config_DGXA100.sh", FOLDER / "config_SSD300_DGXH100_002x08x064.sh"
    for earlier, later in ((first, second), (second, first), (DEMOS[0], first), (first, first)):
        script = 'set -eu; source "$0"; export NUMEPOCHS=77; source "$1"; env -0'
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-c", script, earlier, later],
            env={"PATH": os.environ["PATH"], "LR": "9"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
        wanted = exports(later, LR="9", NUMEPOCHS="77")
        assert {name: value for name, value in found.items() if name in wanted} == wanted
        assert set(found) - set(wanted) <= {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}
        told = f"{later.name}: taken back what {earlier.name} had set: "
        assert (told in done.stderr and "BATCHSIZE" in done.stderr) == (earlier != later)


@by_file
def test_every_export_has_a_reader(path):
    exported = exports(path)
    names, benchmark = set(exported), exported["BENCHMARK"]
    assert names - PROGRAMS[benchmark] - LAUNCHER == set()
    trains = "--mode" not in exported["EXTRA_PARAMS"]
    assert set() == (REQUIRED | TRAINING[benchmark] if trains else REQUIRED) - names


@by_file
def test_benchmark_is_the_first_export_and_the_common_part_the_last_line(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    benchmark = "ssd300" if "ssd300" in path.stem.lower() else "single_stage_detector"
    assert lines[0] == f"export BENCHMARK={benchmark}"
    assert lines[-1] == 'source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"'


@by_file
def test_the_system_is_called_as_the_file(path, tmp_path):
    assert exports(path)["DGXSYSTEM"] == path.stem.removeprefix("config_")
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in (path.name, "config_common.sh"):
        (folder / name.replace(path.name, "config_OTHER_001x02x003.sh")).write_text((FOLDER / name).read_text())
    assert exports(folder / "config_OTHER_001x02x003.sh")["DGXSYSTEM"] == "OTHER_001x02x003"


@by_retinanet
def test_recipe(path):
    exported = exports(path)
    config = settings(exported)
    found = (int(exported["DGXNNODES"]), int(exported["DGXNGPU"]), config.batch_size)
    assert (*found, config.lr, config.warmup_epochs, config.epochs) == RECIPES[exported["DGXSYSTEM"]]
    if triple := re.search(r"_(\d{3})x(\d{2})x(\d{3})$", exported["DGXSYSTEM"]):
        assert found == tuple(int(number) for number in triple.groups())
    assert f"global batch {found[0] * found[1] * found[2]}." in path.read_text().splitlines()[0]
    assert config.departures() == [] and config.mlperf_division == "closed"
    cores = int(exported["DGXNSOCKET"]) * int(exported["DGXSOCKETCORES"])
    assert (config.workers + 1) * found[1] <= cores


@pytest.mark.parametrize("name", SSD300)
def test_recipe_of_ssd300(name):
    path = FOLDER / f"config_SSD300_{name}.sh"
    exported = exports(path)
    config, gpus = settings(exported), int(exported["DGXNNODES"]) * int(exported["DGXNGPU"])
    assert (gpus, config.batch_size, config.lr, config.warmup, config.precision) == SSD300[name]
    if triple := re.search(r"_(\d{3})x(\d{2})x(\d{3})$", name):
        found = (int(exported["DGXNNODES"]), int(exported["DGXNGPU"]), config.batch_size)
        assert found == tuple(int(number) for number in triple.groups())
    assert f"global batch {gpus * config.batch_size}." in path.read_text().splitlines()[0]
    assert config.departures() == [] and config.mode == "train"
    cores = int(exported["DGXNSOCKET"]) * int(exported["DGXSOCKETCORES"])
    assert (config.workers + 1) * int(exported["DGXNGPU"]) <= cores


@pytest.mark.parametrize("name", SSD300_TPU)
def test_recipe_of_ssd300_on_a_tpu(name):
    path = FOLDER / f"config_SSD300_{name}.sh"
    exported = exports(path)
    config = settings(exported)
    found = (max(config.num_cores, 1), config.batch_size, config.accumulate, config.warmup, config.precision)
    assert (*found, config.log_interval, config.workers) == SSD300_TPU[name]
    images = found[0] * config.batch_size * config.accumulate
    assert f"_BS{images}" in path.stem and f"global batch {images}." in path.read_text().splitlines()[0]
    assert config.device == "tpu" and config.lr == 2.6e-3 and config.departures() == []
    assert exported["SEED"] == "42" and config.seed == 42
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1", "the program starts the cores' processes"
    assert str(config.save) == "{output}/checkpoints" and str(config.json_summary) == "{output}/summary.json"


@pytest.mark.parametrize("name", SSD300_TPU)
def test_the_data_of_a_tpu_by_any_of_its_names(name):
    given: dict[str, str] = {}
    for variable in ("COCO_DIR", "DATA_DIR", "DATASET_DIR"):  # each counts before those in front of it
        given[variable] = f"/a folder/{variable}"
        assert exports(FOLDER / f"config_SSD300_{name}.sh", **given)["DATASET_DIR"] == given[variable]


@pytest.mark.parametrize("name", SSD300_MODES)
def test_evaluation_and_benchmark_of_ssd300(name):
    exported = exports(FOLDER / f"config_SSD300_{name}.sh")
    more = ["--checkpoint", "x.pt"] if name.endswith("EVAL") else []
    config = settings(exported, *more)
    images = config.eval_batch_size or config.batch_size
    assert (config.mode, images, config.precision) == SSD300_MODES[name]
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1"


@by_system
def test_header_says_what_to_expect_and_that_it_was_not_measured(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "published by" in header and "not measured here" in header.lower() and "Expected: " in header


def test_demo_of_ssd300_is_small_and_open():
    exported = exports(FOLDER / "config_ssd300_cpu_demo.sh")
    config = settings(exported)
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1" and config.device == "cpu" and not config.pretrained
    assert config.backbone == "resnet18" and config.dataset == "custom" and config.target_map
    assert config.mlperf_org == "demonstration" and config.overwrite and config.gallery > 0 and config.departures()


@pytest.mark.parametrize("path", [path for path in DEMOS if "ssd300" not in path.stem], ids=lambda path: path.stem)
def test_demo_is_small_open_and_named_so(path):
    exported = exports(path)
    config = settings(exported)
    nodes, gpus = int(exported["DGXNNODES"]), int(exported["DGXNGPU"])
    assert (nodes, gpus) == ((1, 1) if path.stem == "config_cpu_demo" else (2, 2)) and config.device == "cpu"
    if triple := re.search(r"_(\d{3})x(\d{2})x(\d{3})$", path.stem):
        assert tuple(map(int, triple.groups())) == (nodes, gpus, config.batch_size)
    assert config.mlperf_division == "open" and config.departures() and config.mlperf_org == "demonstration"
    assert config.dataset == "custom" and str(config.dataset_path) == "build/demo-data"
    assert config.norm == "batch" and not config.pretrained
    if nodes == 1:  # make demo runs it again and again
        assert config.overwrite and config.gallery > 0
    assert re.fullmatch(r"\d+ CPU cores \S+", config.mlperf_platform)


@by_file
def test_walltime(path):
    minutes = int(exports(path)["WALLTIME_RUNANDTIME"])
    for clock, run in (
        ({}, minutes),
        ({"SET_MAXQ_CLK": "0"}, minutes),
        ({"SET_MAXQ_CLK": "1"}, minutes + minutes // 2),
        ({"SET_MINEDP_CLK": "1"}, minutes + minutes // 3),
    ):
        for runs in (1, 5):
            exported = exports(path, NEXP=str(runs), **clock)
            assert int(exported["WALLTIME_RUNANDTIME"]) == run
            assert int(exported["WALLTIME"]) == 12 + runs * (run + 5)


@by_file
def test_sourcing_twice_changes_nothing(path):
    once = exports(path, SET_MAXQ_CLK="1")
    assert exports(path, **once) == once


@by_file
def test_the_environment_overrides_each_hyperparameter(path):
    own = exports(path)
    given = {
        "BATCHSIZE": "3", "EVALBATCHSIZE": "5", "NUMEPOCHS": "77", "LR": "0.25", "WARMUP_EPOCHS": "0.5",
        "WARMUP_STEPS": "7",
        "EXTRA_PARAMS": "--workers 1  --seed 9", "DATASET_DIR": "/a b/c", "MLPERF_DIVISION": "closed",
        "MLPERF_SUBMISSION_ORG": "we & co", "MLPERF_SUBMISSION_PLATFORM": "two words", "LOG_INTERVAL": "30",
        "SEED": "8",
    }  # fmt: skip
    assert set(own) & PROGRAMS[own["BENCHMARK"]] <= set(given)
    exported = exports(path, **given)
    assert {name: exported[name] for name in given} == given
