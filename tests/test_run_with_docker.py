"""run_with_docker.sh with a stand-in for Docker that notes how it was called. No container is started."""

import itertools
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.configs import MODULES, PROGRAMS, ROOT, configs_of, exports, launch

BENCHMARK = next(iter(MODULES))
DATA = launch(BENCHMARK)["container_data"]
SCRIPT = ROOT / "run_with_docker.sh"
NOTE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >"$NOTES/argv"
exit "${CODE:-0}"
"""
ON_SIGNAL = """#!/bin/bash
for name in TERM USR1 INT; do trap "echo $name >'$NOTES/signal'; exit 4" $name; done
echo started >&3
while :; do read -r -t 0.05 <>"$NOTES/pipe"; done
"""
MACHINE = {"BENCHMARK": BENCHMARK, "DGXSYSTEM": "ONE_001x08x032", "DGXNNODES": "1", "DGXNGPU": "8",
           "WALLTIME_RUNANDTIME": "30", "CONT": "registry/detectors:1"}  # fmt: skip
INSIDE = {"DATASET_DIR", "OUTPUT_DIR", "RESULT_INDEX", "CACHES_CLEARED"}  # set by run.sub, for each trial
# Not passed on as they are.
HOST = {"CONT", "DATADIR", "DATA_DIR", "COCO_DIR", "BACKBONE_DIR", "LOGDIR", "EXTRA_MOUNTS", "WORK_DIR", "PYTHON",
        "TORCH_HOME"}  # fmt: skip


class Sandbox:
    """A PATH with only what the script needs, folders with spaces, and a stand-in for Docker."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.notes = folder / "bin", folder / "a folder"
        self.data, self.weights, self.logs = (self.notes / name for name in ("the data", "the weights", "the logs"))
        for path in (self.bin, self.data / "train", self.weights):
            path.mkdir(parents=True)
        for tool in ("bash", "env", "dirname", "id", "realpath", "mkdir"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.put("docker")

    def put(self, name: str, text: str = NOTE) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environ(self, **more: str | None) -> dict[str, str]:
        folders = {"DATADIR": str(self.data), "BACKBONE_DIR": str(self.weights), "LOGDIR": str(self.logs)}
        environ = {"PATH": str(self.bin), "NOTES": str(self.notes), **MACHINE, **folders, **more}
        return {name: value for name, value in environ.items() if value is not None}

    def run(self, script: Path = SCRIPT, **more: str | None) -> subprocess.CompletedProcess:
        environ = self.environ(**more)
        return subprocess.run([script], env=environ, capture_output=True, text=True, cwd=self.notes, timeout=60)

    def argv(self, script: Path = SCRIPT, **more: str | None) -> list[str]:
        done = self.run(script, **more)
        assert done.returncode == 0, done.stderr
        return (self.notes / "argv").read_text().split("\0")[:-1]

    def passed(self, **more: str | None) -> set[str]:
        """What follows --env: NAME or NAME=VALUE."""
        return set(after(self.argv(**more), "--env"))


def after(argv: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(argv) if word == option]


@pytest.fixture
def box(tmp_path) -> Sandbox:
    return Sandbox(tmp_path)


def test_the_container(box):
    argv = box.argv()
    assert argv[:2] == ["docker", "run"] and argv[-2:] == ["registry/detectors:1", "./run.sub"]
    assert {"--rm", "--init", "--ipc=host", "--network=host"} <= set(argv)
    assert {"--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(argv)
    assert after(argv, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert after(argv, "--workdir") == ["/workspace/ssd"]
    assert set(after(argv, "--volume")) == {
        f"{box.data}:{DATA}:ro", f"{box.weights}:/torch-home:ro", f"{box.logs}:/results",
    }  # fmt: skip
    inside = {"CONT=", "LOGDIR=/results", f"DATADIR={DATA}", "BACKBONE_DIR=/torch-home"}
    assert box.passed() == inside | (set(MACHINE) - {"CONT"})
    assert after(box.argv(WORK_DIR="/my code"), "--workdir") == ["/my code"]


def test_the_command_is_printed_as_a_shell_reads_it(box):
    printed = box.run().stdout
    assert printed.startswith("+ 'docker' 'run' ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed[2:]}"], capture_output=True, text=True, check=True)
    assert words.stdout.split("\0")[:-1] == box.argv()


def test_gpus_where_there_are_some(box):
    assert "--gpus" not in box.argv()
    box.put("nvidia-smi", "#!/bin/bash\nexit 9\n")
    assert "--gpus" not in box.argv(), "the driver doesn't answer"
    box.put("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a GPU'\n")
    assert after(box.argv(), "--gpus") == ["all"]


def test_podman(box):
    (box.bin / "docker").rename(box.bin / "podman")
    box.put("nvidia-smi", "#!/bin/bash\n")
    argv = box.argv(DOCKER=str(box.bin / "podman"))
    assert argv[0] == "podman" and after(argv, "--device") == ["nvidia.com/gpu=all"] and "--gpus" not in argv
    argv = box.argv(DOCKER=str(box.bin / "podman"), CUDA_VISIBLE_DEVICES="2,3")
    assert after(argv, "--device") == ["nvidia.com/gpu=2", "nvidia.com/gpu=3"]
    assert ("--userns=keep-id" in argv) == (os.geteuid() != 0)
    done = box.run()
    assert done.returncode == 2 and "DOCKER=docker is not on PATH" in done.stderr


def test_more_words_for_docker_come_last_and_are_not_expanded(box):
    argv = box.argv(DOCKER_ARGS="--privileged  --user 0:0\n --label *")
    assert argv[-7:-2] == ["--privileged", "--user", "0:0", "--label", "*"]


def test_more_mounts(box):
    other = box.notes / "more"
    other.mkdir()
    volumes = after(box.argv(EXTRA_MOUNTS=f"{other}:/x y:ro,{other}"), "--volume")
    assert volumes[-2:] == [f"{other}:/x y:ro", f"{other}:{other}"]
    done = box.run(EXTRA_MOUNTS="more:/x,/is/not/there")
    assert done.returncode == 2 and "EXTRA_MOUNTS: more:/x must begin with /" in done.stderr
    assert "/is/not/there is not there" in done.stderr


def test_everything_that_is_missing_is_said_at_once(box):
    names = [*MACHINE, "DATADIR", "BACKBONE_DIR"]
    done = box.run(**dict.fromkeys(names))
    assert done.returncode == 2 and "nothing was started" in done.stderr and not (box.notes / "argv").exists()
    assert [name for name in names if not re.search(rf"error: .*\b{name}\b.* missing", done.stderr)] == []


def test_what_is_wrong_is_refused(box):
    done = box.run(CONT="", DGXNNODES="8", DATADIR="/is/not/there")
    assert done.returncode == 2 and not (box.notes / "argv").exists()
    for words in ("CONT is empty", "DGXNNODES=8: Docker runs on one machine", "DATADIR=/is/not/there: "):
        assert words in done.stderr


def test_what_is_not_needed(box):
    argv = box.argv(BACKBONE_DIR=None, EXTRA_PARAMS="--image-size 64 64 --no-pretrained")
    assert not any("torch-home" in word or word.startswith("BACKBONE_DIR") for word in argv)
    argv = box.argv(BACKBONE_DIR=None, DATADIR=None, LOGDIR=None, USE_SYNTHETIC_DATA="1")
    assert after(argv, "--volume") == [f"{box.notes}/results:/results"]
    assert not any(word.startswith("DATADIR") for word in argv)


def test_variables_go_by_name_and_secrets_do_not_go(box):
    values = {"EXTRA_PARAMS": "--a 'b c'", "MLPERF_SUBMISSION_ORG": "us & them", "NCCL_DEBUG": "INFO", "NEXP": "5"}
    secrets = {"AWS_SECRET_ACCESS_KEY": "a", "GITHUB_TOKEN": "b", "WANDB_API_KEY": "c", "HOME": "/root", "MY_NEXP": "1",
               "DATASET_DIR": "/host", "OUTPUT_DIR": "/host", "TORCH_HOME": "/host", "PYTHONPATH": "/host"}  # fmt: skip
    passed = box.passed(**values, **secrets)
    assert set(values) <= passed and passed & set(secrets) == set()
    assert not any("us & them" in word for word in box.argv(**values))


@pytest.mark.parametrize("benchmark", MODULES)
def test_the_config_and_all_that_the_programs_read_is_passed(box, benchmark):
    text = "".join((ROOT / name).read_text() for name in ("run.sub", "configs/config_mounts.sh"))
    launcher = {name for name in re.findall(r"\$\{!?([A-Z][A-Z_]+):[-+?]", text) if not name.startswith("SLURM_")}
    wanted = (
        (PROGRAMS[benchmark] | launcher) - INSIDE - HOST - {"GIT_COMMIT", "VIRTUAL_ENV", "REQUEUE", "REMOVER_PID"}
    )  # the image's; Slurm's
    assert len(wanted) > 25
    assert wanted - box.passed(**dict.fromkeys(wanted, "1") | MACHINE | {"BENCHMARK": benchmark}) == set()


@pytest.mark.parametrize("benchmark", MODULES)
def test_every_export_of_its_configs_is_passed(box, benchmark):
    exported = {}
    for path in configs_of(benchmark).values():
        exported |= exports(path) if "--mode " not in path.read_text() else {}
    exported |= {"DGXNNODES": "1"}
    names = exported.keys() - {"DATASET_DIR"}
    assert len(names) > 15 and names - box.passed(**{name: exported[name] for name in names}) == set()


def test_a_new_benchmark_brings_its_folder_alone(box):
    """No file that others share has to know it."""
    tree = box.notes / "a tree"
    (tree / "newcomer").mkdir(parents=True)
    (tree / "configs").symlink_to(ROOT / "configs")
    (tree / SCRIPT.name).write_text(SCRIPT.read_text())
    (tree / SCRIPT.name).chmod(0o755)
    (tree / "newcomer/launch.sh").write_text("container_data=/datasets/new own_variables='FOCAL_ALPHA|TILES'\n")
    own = {"BENCHMARK": "newcomer", "FOCAL_ALPHA": "1", "TILES": "2"}
    argv = box.argv(tree / SCRIPT.name, **own)
    assert f"{box.data}:/datasets/new:ro" in after(argv, "--volume")
    assert {*own, "DATADIR=/datasets/new"} <= set(after(argv, "--env"))
    assert not {"FOCAL_ALPHA", "TILES"} & box.passed(FOCAL_ALPHA="1", TILES="2")
    done = box.run(tree / SCRIPT.name, BENCHMARK="none")
    assert done.returncode == 2 and f"BENCHMARK=none: there is no {tree}/none/launch.sh" in done.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 137])
def test_the_exit_code_comes_back(box, code):
    assert box.run(CODE=str(code)).returncode == code


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_reach_docker(box, sent):
    box.put("docker", ON_SIGNAL)
    os.mkfifo(box.notes / "pipe")
    read, write = os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", f'exec 3>&{write}; exec "{SCRIPT}"'], env=box.environ(), pass_fds=[write],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )  # fmt: skip
    os.close(write)
    try:
        assert os.read(read, 100) == b"started\n"
        process.send_signal(getattr(signal, sent))
        assert process.wait(60) == 4
    finally:
        os.close(read)
        process.kill()
    assert (box.notes / "signal").read_text().strip() == sent.removeprefix("SIG")
