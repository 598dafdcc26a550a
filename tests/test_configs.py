"""Every configs/config_*.sh: what it exports is read by somebody, fits its name, and the program accepts it.

What a benchmark's recipes are to be stands in tests/<benchmark>/test_recipes.py.
"""

import importlib
import os
import re
import subprocess
from itertools import pairwise

import pytest

from detcore import UserError
from tests.configs import FILES, FOLDER, MODULES, PROGRAMS, ROOT, exports, launch, settings, triple, variables

DEMOS = [path for path in FILES if "cpu_demo" in path.name]
SYSTEMS = [path for path in FILES if path not in DEMOS]
MACHINES = {  # GPUs, sockets, cores a socket, hardware threads a core
    "DGX1": (8, 2, 20, 2),
    "DGXA100": (8, 2, 64, 2),
    "DGXB200": (8, 2, 56, 2),
    "DGXH100": (8, 2, 56, 2),
    "DGXH200": (8, 2, 56, 2),
    "cpu": (1, 1, int(subprocess.check_output(["env", "-i", "nproc"])), 1),
    "tpu": (1, 2, 48, 2),
}
LAUNCHER = {
    "BENCHMARK", "EXTRA_PARAMS", "DGXNNODES", "DGXNGPU", "DGXSYSTEM", "DGXSOCKETCORES", "DGXNSOCKET", "DGXHT",
    "WALLTIME_RUNANDTIME", "WALLTIME", "MAXQ_CLK", "MINEDP_CLK",
    "NCCL_NVLS_ENABLE", "NCCL_GRAPH_REGISTER", "NCCL_LOCAL_REGISTER", "GOMP_SPINCOUNT", "MLPERF_RULESET",
}  # fmt: skip
REQUIRED = LAUNCHER - {"MAXQ_CLK", "MINEDP_CLK", "GOMP_SPINCOUNT", "MLPERF_RULESET"} | {"BATCHSIZE"}
HERE = 'source "$(dirname "${BASH_SOURCE[0]}")/'
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
by_system = pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)


def test_a_config_after_another_is_as_in_a_new_shell():
    """The values of the first are taken back; what somebody has set stays."""
    others = {exports(path)["BENCHMARK"]: path for path in SYSTEMS}.values()
    order = [DEMOS[0], *others, *others, others_last := list(others)[-1], others_last]
    for earlier, later in {*pairwise(order)}:
        script = 'set -eu; source "$0"; export NUMEPOCHS=77; source "$1"; env -0'
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-c", script, earlier, later],
            env={"PATH": os.environ["PATH"], "LR": "9"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert variables(done.stdout) == exports(later, LR="9", NUMEPOCHS="77")
        told = f"{later.name}: taken back what {earlier.name} had set: "
        assert (told in done.stderr and "BATCHSIZE" in done.stderr) == (earlier != later)


@by_file
def test_every_export_has_a_reader(path):
    exported = exports(path)
    names, read = set(exported), PROGRAMS[exported["BENCHMARK"]]
    assert names - read - LAUNCHER == set()
    trains = "--mode" not in exported["EXTRA_PARAMS"]
    recipe = {"NUMEPOCHS", "LR", *(name for name in read if name.startswith("WARMUP_"))} if trains else set()
    assert (REQUIRED | recipe) - names == set()


@by_file
def test_a_config_has_a_machine_and_the_common_part_and_says_what_differs(path):
    text = path.read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    machine = lines[0].removeprefix(f"{HERE}systems/").removesuffix('.sh"')
    assert machine in MACHINES and lines[-1] == f'{HERE}config_common.sh"'
    assert len(lines) < 9 and all(line.startswith(("export ", f"{HERE}../")) for line in lines[1:-1])
    exported = exports(path)
    names = ("DGXNGPU", "DGXNSOCKET", "DGXSOCKETCORES", "DGXHT")
    found, own = tuple(int(exported[name]) for name in names), re.findall(r"(DGX\w+)=", text)
    assert found[1:] == MACHINES[machine][1:] and not {*names[1:]} & {*own}
    assert (found[0] == MACHINES[machine][0]) != ("DGXNGPU" in own)


def test_every_machine_is_used():
    assert {path.stem for path in (FOLDER / "systems").iterdir()} == {*MACHINES}
    text = "".join(path.read_text() for path in FILES)
    assert [name for name in MACHINES if f"systems/{name}.sh" not in text] == []


@by_file
def test_the_system_is_called_as_the_file(path):
    exported = exports(path)
    assert exported["DGXSYSTEM"] == path.stem.removeprefix("config_")
    if expected := triple(path.stem):
        assert tuple(int(exported[name]) for name in ("DGXNNODES", "DGXNGPU", "BATCHSIZE")) == expected


def test_a_config_in_another_folder(tmp_path):
    """With a copy of the common part alone, as configs were before they shared machines and recipes."""
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "config_common.sh").write_text((FOLDER / "config_common.sh").read_text())
    own = folder / "config_OTHER_001x02x003.sh"
    own.write_text(f'export WALLTIME_RUNANDTIME=7\n{HERE}config_common.sh"\n')
    assert exports(own)["DGXSYSTEM"] == "OTHER_001x02x003" and exports(own)["WALLTIME"] == "24"


@by_system
def test_header_says_what_to_expect_and_that_it_was_not_measured(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "published by" in header and "not measured here" in header.lower() and "Expected: " in header


@by_system
def test_the_cores_suffice(path):
    exported = exports(path)
    config = settings(exported, *(["--checkpoint", "x.pt"] if "--mode eval" in exported["EXTRA_PARAMS"] else []))
    cores = int(exported["DGXNSOCKET"]) * int(exported["DGXSOCKETCORES"])
    assert (config.workers + 1) * int(exported["DGXNGPU"]) <= cores


@by_file
def test_walltime_and_sourcing_twice(path):
    minutes = int(exports(path)["WALLTIME_RUNANDTIME"])
    slower = exports(path, SET_MAXQ_CLK="1")
    assert int(slower["WALLTIME_RUNANDTIME"]) == minutes + minutes // 2
    assert exports(path, **slower) == slower


def test_walltime_of_a_job():
    minutes = int(exports(FILES[0])["WALLTIME_RUNANDTIME"])
    for clock, run in (
        ({}, minutes),
        ({"SET_MAXQ_CLK": "0"}, minutes),
        ({"SET_MAXQ_CLK": "1"}, minutes + minutes // 2),
        ({"SET_MINEDP_CLK": "1"}, minutes + minutes // 3),
    ):
        for runs in (1, 5):
            exported = exports(FILES[0], NEXP=str(runs), **clock)
            assert int(exported["WALLTIME_RUNANDTIME"]) == run
            assert int(exported["WALLTIME"]) == 12 + runs * (run + 5)


@by_file
def test_the_environment_overrides_each_hyperparameter(path):
    own = exports(path)
    given = {
        "BATCHSIZE": "3", "EVALBATCHSIZE": "5", "NUMEPOCHS": "77", "LR": "0.25",
        "EXTRA_PARAMS": "--workers 1  --seed 9", "DATASET_DIR": "/a b/c", "MLPERF_DIVISION": "closed",
        "MLPERF_SUBMISSION_ORG": "we & co", "MLPERF_SUBMISSION_PLATFORM": "two words", "LOG_INTERVAL": "30",
        "SEED": "8", **dict.fromkeys(launch(own["BENCHMARK"])["own_variables"].split("|"), "7"),
    }  # fmt: skip
    assert set(own) & PROGRAMS[own["BENCHMARK"]] <= set(given)
    exported = exports(path, **given)
    assert {name: exported[name] for name in given} == given


def test_what_all_benchmarks_share_names_none():
    launchers = [ROOT / name for name in ("run.sub", "run_and_time.sh", "run_with_docker.sh")]
    shared = [FOLDER / name for name in ("config_common.sh", "config_mounts.sh", "steps.sh")]
    tests = [*(ROOT / "tests").glob("test_run_*.py"), ROOT / "tests/configs.py", ROOT / "tests/test_configs.py"]
    own = [*MODULES, *(launch(name)["container_data"] for name in MODULES)]
    found = [(path.name, word) for path in [*launchers, *shared, *tests] for word in own if word in path.read_text()]
    assert len(own) > 3 and found == []


@pytest.mark.parametrize("benchmark", MODULES)
@pytest.mark.parametrize("flag", ["--eval-only", "--eval_only", "--evaluate", "--validate=1"])
def test_every_program_knows_what_others_call_mode_evaluate(benchmark, flag):
    program = importlib.import_module(f"{benchmark}.train")
    with pytest.raises(UserError, match=r"unknown flag --\w.*\(did you mean --mode evaluate\?\)"):
        program.main([flag, "--lr", "0.1"])
