"""What the preflight says of a job that can't be submitted; the command `python -m tools.submission` itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.submission import __main__ as command
from tools.submission.before import obstacles

ROOT = Path(__file__).parents[3]
SOUND = {
    "BENCHMARK": "single_stage_detector", "MLPERF_SUBMISSION_ORG": "Uni", "NEXP": "5", "DGXNNODES": "1",
    "DGXNGPU": "8", "BATCHSIZE": "32",
}  # fmt: skip
OBSTACLES = {
    "org": ({"MLPERF_SUBMISSION_ORG": "unset"}, "MLPERF_SUBMISSION_ORG was never set"),
    "division": ({"MLPERF_DIVISION": "open"}, "it is for the open division"),
    "division option": ({"EXTRA_PARAMS": "--division=open"}, "it is for the open division"),
    "seed": ({"SEED": "1"}, "seeds are fixed"),
    "seed option": ({"EXTRA_PARAMS": "--lr 1e-4 --seed 3"}, "seeds are fixed"),
    "caches": ({"CLEAR_CACHES": "0"}, "CLEAR_CACHES=0"),
    "resumed": ({"RESUME": "1"}, "a trial that is resumed"),
    "batch": ({"DGXNNODES": "100"}, "above the largest reference point (25600, the point is for 4096)"),
    "accumulation": ({"EXTRA_PARAMS": "--accumulate 100"}, "above the largest reference point (25600"),
    "runs": ({"NEXP": "1"}, "NEXP is 1, a result has exactly 5 runs"),
    "data": ({"EXTRA_PARAMS": "--dataset coco"}, "another data set (--dataset coco)"),
    "synthetic": ({"USE_SYNTHETIC_DATA": "1"}, "random images"),
    "weights": ({"EXTRA_PARAMS": "--no_pretrained"}, "weights of ImageNet"),
    "benchmark": ({"BENCHMARK": "ssd300"}, "ruleset 5.1.0 has no benchmark ssd300"),
    "round": ({"MLPERF_RULESET": "6.0.0"}, "ruleset 6.0.0 has no rules for logs of retinanet"),
    "ruleset": ({"MLPERF_RULESET": "5"}, "no ruleset 5"),
}


def test_a_sound_job_has_no_obstacle():
    assert obstacles(SOUND) == []
    assert obstacles(SOUND | {"CLEAR_CACHES": "files", "MLPERF_DIVISION": "closed", "DGXNNODES": "16"}) == []


@pytest.mark.parametrize("name", OBSTACLES)
def test_each_obstacle(name):
    changes, words = OBSTACLES[name]
    found = obstacles(SOUND | changes)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(("program", "data", "told"), [("maskrcnn", "coco", False), ("maskrcnn", "custom", True),
                                                       ("single_stage_detector", "openimages-mlperf", False),
                                                       ("single_stage_detector", "custom", True)])  # fmt: skip
def test_each_benchmark_has_a_data_set_of_its_own(program, data, told):
    found = obstacles(SOUND | {"BENCHMARK": program, "EXTRA_PARAMS": f"--dataset {data}"})
    assert (f"it trains on another data set (--dataset {data})" in found) == told


def test_all_of_them_together():
    variables = SOUND | {"MLPERF_SUBMISSION_ORG": "", "SEED": "1", "CLEAR_CACHES": "0", "RESUME": "1", "NEXP": "2"}
    assert len(obstacles(variables | {"BATCHSIZE": "none"})) == 5  # a batch that is no number is another check's affair


def test_the_command_lists_its_commands(capsys):
    assert command.main([]) == 2 and command.main(["nothing"]) == 2
    assert "'nothing' is no command" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0 and f"python -m tools.submission {name}" in capsys.readouterr().out


def test_it_starts_without_torch_and_the_rest(tmp_path):
    """Nor scipy and pandas, before they are needed."""
    names = ", ".join(f"tools.submission.{name}" for name in (*command.COMMANDS, "before", "trials"))
    heavy = {"torch", "torchvision", "numpy", "scipy", "pandas", "mlperf_logging", "yaml"}
    code = f"import sys, {names}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "script, words", [("trials.py", "explain"), ("package_results.py", "--org"), ("report.py", "PATH")]
)
def test_older_names_work_from_anywhere(script, words, tmp_path):
    command_line = [sys.executable, ROOT / "tools" / script, "--help"]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and words in done.stdout, done.stderr
