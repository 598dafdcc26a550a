"""run_and_time.sh with a stand-in for the interpreter that notes how it was called. Nothing is trained."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from detcore.training.config import RunConfig
from tests.configs import MODULES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "run_and_time.sh"
BENCHMARK = next(iter(MODULES))
PROGRAM = f"{BENCHMARK}.train"
NOTE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >"$NOTES/argv"
env -0 >"$NOTES/env"
exit "${CODE:-0}"
"""
ON_SIGNAL = """#!/bin/bash
for name in TERM USR1 INT; do trap "echo $name >>'$NOTES/signals'; stop=1" $name; done
echo started >"$NOTES/ready"
cat "$NOTES/ready" >&3
until [[ ${stop:-} ]]; do read -r -t 0.05 <>"$NOTES/pipe"; done
exit 4
"""


class Sandbox:
    """A PATH with only what the script needs, and the stand-ins put there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.notes = folder / "bin", folder / "notes with space"
        self.bin.mkdir()
        self.notes.mkdir()
        for tool in ("bash", "env", "dirname", "date", "id", "cat", "sleep"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def put(self, name: str, text: str = NOTE) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environ(self, **environ: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "NOTES": str(self.notes), "BENCHMARK": BENCHMARK, **environ}

    def run(self, *argv: str, **environ: str) -> subprocess.CompletedProcess:
        environ = {name: value for name, value in self.environ(**environ).items() if value is not None}
        return subprocess.run([SCRIPT, *argv], env=environ, capture_output=True, text=True, cwd=self.notes, timeout=60)

    def argv(self) -> list[str]:
        return (self.notes / "argv").read_text().split("\0")[:-1]

    def env(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in (self.notes / "env").read_text().split("\0") if entry)


@pytest.fixture
def box(tmp_path) -> Sandbox:
    sandbox = Sandbox(tmp_path)
    sandbox.put("python")
    return sandbox


SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "5"}  # fmt: skip
OMPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"}
PLAIN = ["python", "-m", PROGRAM]


def test_one_rank_with_both_kinds_of_options(box):
    done = box.run("--seed", "1", "a b", "*", EXTRA_PARAMS="--image-size 128 128\n --workers  1", DATASET_DIR="/x y/z")
    assert done.returncode == 0, done.stderr
    assert box.argv() == [*PLAIN, "--image-size", "128", "128", "--workers", "1", "--seed", "1", "a b", "*"]
    env = box.env()
    assert env["DATASET_DIR"] == "/x y/z" and env["PYTHONPATH"] == str(ROOT) and env["PWD"] == str(box.notes)
    added = set(env) - set(box.environ()) - {"DATASET_DIR", "EXTRA_PARAMS", "PWD", "OLDPWD", "SHLVL", "_", "PYTHONPATH"}
    assert added == set(), "the script has no default of its own"


@pytest.mark.parametrize(
    "words, environ, folder",
    [
        ([], {}, str(RunConfig().output_dir)),
        ([], {"OUTPUT_DIR": "/a & b/*/S_2"}, "/a & b/*/S_2"),
        (["--output-dir", "of the user"], {"OUTPUT_DIR": "/other"}, "of the user"),
        (["--output_dir=of_the=user"], {}, "of_the=user"),
        (["--output", "of EfficientDet"], {"OUTPUT_DIR": "/other"}, "of EfficientDet"),
    ],
)
def test_output_in_extra_params_is_the_runs_folder(box, words, environ, folder):
    box.run(*words, "{output}", EXTRA_PARAMS="--save {output}/checkpoints --json-summary={output}/x{output}", **environ)
    extra = ["--save", f"{folder}/checkpoints", f"--json-summary={folder}/x{folder}"]
    assert box.argv() == [*PLAIN, *extra, *words, "{output}"], "what the shell gave stays as it is"


def test_result_line(box):
    lines = box.run().stdout.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(rf"RESULT,{BENCHMARK.upper()},,\d+,[^,]+,\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", lines[0])
    assert box.run(**SLURM | {"SLURM_PROCID": "0"}).stdout.startswith("RESULT,")
    assert box.run(**SLURM).stdout == "" and box.run(**OMPI).stdout == "" and box.run(**TORCHRUN).stdout == ""


@pytest.mark.parametrize("code", [1, 2, 3, 4, 6, 137])
def test_the_programs_exit_code_without_a_result(box, code):
    done = box.run(CODE=str(code))
    assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.parametrize("environ", [SLURM, OMPI, TORCHRUN], ids=["srun", "mpirun", "torchrun"])
def test_under_a_launcher_it_is_one_rank(box, environ):
    assert box.run(DGXNGPU="8", DGXNNODES="8", **environ).returncode == 0
    assert box.argv() == PLAIN
    assert box.env()["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["plain", "batch script", "one task"],
)
def test_without_a_launcher_torchrun_starts_all_ranks_of_the_machine(box, environ):
    done = box.run("--lr", "1", DGXNGPU="4", DGXNNODES="1", EXTRA_PARAMS="--workers 1", **environ)
    assert done.returncode == 0 and done.stdout.startswith("RESULT,")
    expected = ["python", "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    expected += ["--nproc_per_node=4"]
    assert box.argv() == [*expected, "-m", PROGRAM, "--workers", "1", "--lr", "1"]
    assert "SIGUSR1" in box.env()["PET_SIGNALS_TO_HANDLE"]
    box.run(DGXNGPU="4", BIND="1")
    assert box.argv() == [*expected, "--numa-binding", "socket", "-m", PROGRAM]


def test_several_nodes_without_a_launcher_are_refused(box):
    done = box.run(DGXNGPU="8", DGXNNODES="8")
    assert done.returncode == 2 and "DGXNNODES=8" in done.stderr and "srun" in done.stderr
    assert not (box.notes / "argv").exists()


@pytest.mark.parametrize("gpus", ["1", "8"])
def test_several_machines_by_torchrun(box, gpus):
    machine = {"DGXNGPU": gpus, "DGXNNODES": "2", "MASTER_ADDR": "m0", "MASTER_PORT": "29501"}
    done = box.run("--lr", "1", NODE_RANK="1", **machine)
    assert done.returncode == 0 and done.stdout == "", "the result line is machine 0's"
    together = ["--nnodes=2", "--node_rank=1", "--master_addr=m0", "--master_port=29501", f"--nproc_per_node={gpus}"]
    assert box.argv() == ["python", "-m", "torch.distributed.run", *together, *PLAIN[1:], "--lr", "1"]
    assert box.run(NODE_RANK="0", **machine).stdout.startswith("RESULT,")


def test_how_each_rank_ended_is_noted(box):
    exits = box.notes / "exits file.txt"
    box.run(EXITS_FILE=str(exits), SLURMD_NODENAME="n3", CODE="3", **SLURM)
    done = box.run(EXITS_FILE=str(exits), SLURMD_NODENAME="n3", CODE="137", **SLURM)
    assert done.stderr == "run_and_time.sh: rank 5 on n3: the program was killed by signal 9 (KILL)\n"
    assert re.fullmatch(r"5 n3 3 \d{10}\n5 n3 137 \d{10}\n", exits.read_text())


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"BENCHMARK": None}, "BENCHMARK is unset"), ({"BENCHMARK": "other"}, "there is no"),
        ({"PATH": None}, "no python found"), ({"BIND": "1", "DGXNSOCKET": "2"}, "DGXSOCKETCORES"),
        ({"DGXNGPU": "many"}, "unbound variable"),
    ],
)  # fmt: skip
def test_an_end_before_the_program_starts_is_noted_too(box, environ, words):
    """run.sub ends the other ranks once it reads that one has failed."""
    if environ.pop("PATH", "") is None:
        (box.bin / "python").unlink()
    if "BIND" in environ:
        box.put("numactl")
    exits = box.notes / "exits.txt"
    done = box.run(**{"EXITS_FILE": str(exits), "SLURMD_NODENAME": "n3", **SLURM, **environ})
    assert words in done.stderr and done.returncode != 0 and not (box.notes / "argv").exists()
    assert re.fullmatch(rf"5 n3 {done.returncode} \d{{10}}\n", exits.read_text())


@pytest.mark.parametrize("word", ["--print-config", "--help", "-h"])
def test_a_question_is_answered_by_one_process_without_a_result(box, word):
    done = box.run(word, DGXNGPU="8", DGXNNODES="8")
    assert done.returncode == 0 and done.stdout == "" and box.argv() == [*PLAIN, word]


@pytest.mark.parametrize("words", [("--mode", "evaluate"), ("--mode=predict",), ("--test-only",)])
def test_only_a_training_has_a_result(box, words):
    assert box.run(*words).stdout == ""


def test_threads_of_a_single_rank_are_left_alone(box):
    box.run(DGXNGPU="1")
    assert "OMP_NUM_THREADS" not in box.env()
    box.run(DGXNGPU="8", OMP_NUM_THREADS="3", **SLURM)
    assert box.env()["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "local, more, cpus",
    [
        ("0", {}, "0-55,112-167"),
        ("3", {}, "0-55,112-167"),
        ("4", {}, "56-111,168-223"),
        ("7", {"DGXHT": "1"}, "56-111"),
        ("5", {"DGXNSOCKET": "1", "DGXHT": "1"}, "0-55"),
        ("5", {"DGXNSOCKET": "4", "DGXHT": "1", "DGXSOCKETCORES": "16"}, "32-47"),
    ],
)
def test_binding_to_the_socket(box, local, more, cpus):
    box.put("numactl")
    machine = {"DGXNGPU": "8", "DGXNSOCKET": "2", "DGXSOCKETCORES": "56", "DGXHT": "2"} | more
    box.run("--lr", "1", BIND="1", **machine, **SLURM | {"SLURM_LOCALID": local})
    assert box.argv() == ["numactl", f"--physcpubind={cpus}", "--", str(box.bin / "python"), *PLAIN[1:], "--lr", "1"]
    box.run(**machine, **SLURM)
    assert box.argv() == PLAIN


def test_binding_without_numactl_says_so_and_runs(box):
    done = box.run(BIND="1", DGXSOCKETCORES="4")
    assert done.returncode == 0 and "numactl is not installed" in done.stderr and box.argv() == PLAIN


def test_interpreter(box, tmp_path):
    (box.bin / "python").rename(box.bin / "python3")
    box.run()
    assert box.argv()[0] == "python3"
    own = tmp_path / "an interpreter"
    own.write_text(NOTE)
    own.chmod(0o755)
    box.run(PYTHON=str(own))
    assert box.argv()[0] == "an interpreter"
    (box.bin / "python3").unlink()
    done = box.run()
    assert done.returncode == 2 and "no python found" in done.stderr


def test_without_a_config(box):
    done = box.run(BENCHMARK=None)
    assert done.returncode == 2 and "source configs/config_<system>.sh first" in done.stderr
    done = box.run(BENCHMARK="none")
    assert done.returncode == 2 and "BENCHMARK=none" in done.stderr


@pytest.mark.parametrize("to_group", [False, True], ids=["script", "group"])
@pytest.mark.parametrize(
    "sent, heard", [("SIGTERM", "TERM"), ("SIGUSR1", "USR1"), ("SIGINT", "INT"), ("SIGHUP", "TERM")]
)
def test_signals_reach_the_program_once_and_its_code_comes_back(box, sent, heard, to_group):
    box.put("python", ON_SIGNAL)
    os.mkfifo(box.notes / "pipe")
    read, write = os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", f'exec 3>&{write}; exec "{SCRIPT}"'], env=box.environ(), pass_fds=[write],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )  # fmt: skip
    os.close(write)
    try:
        assert os.read(read, 100) == b"started\n"
        (os.killpg if to_group else os.kill)(process.pid, getattr(signal, sent))
        out, _ = process.communicate(timeout=60)
    finally:
        os.close(read)
        process.kill()
    assert (process.returncode, out) == (4, "")
    assert (box.notes / "signals").read_text().split() == [heard]


@pytest.mark.parametrize("environ, heard", [(SLURM, "QUIT CONT"), ({"DGXNGPU": "2"}, "")], ids=["srun", "torchrun"])
def test_where_srun_started_the_rank_the_program_is_asked_for_its_stacks(box, environ, heard):
    """As under proctrack/cgroup: the signal reaches this script alone. torchrun would end by SIGQUIT."""
    box.put("python", ON_SIGNAL.replace("TERM USR1 INT; do", "TERM; do", 1).replace(
        "echo started", """for name in QUIT CONT; do trap "echo $name >>'$NOTES/signals'" $name; done\necho started"""
    ))  # fmt: skip
    os.mkfifo(box.notes / "pipe")
    read, write = os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", f'exec 3>&{write}; exec "{SCRIPT}"'], env=box.environ(**environ), pass_fds=[write],
        start_new_session=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    try:
        assert os.read(read, 100) == b"started\n"
        for name in heard.split():
            os.kill(process.pid, getattr(signal, f"SIG{name}"))
            for _ in range(600):  # two signals at once are heard as one
                if (box.notes / "signals").exists() and name in (box.notes / "signals").read_text():
                    break
                time.sleep(0.05)
        os.kill(process.pid, signal.SIGQUIT)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        os.close(read)
        process.kill()
    assert process.returncode == 4
    found = (box.notes / "signals").read_text().split()
    assert found[-1] == "TERM" and set(found) == {*heard.split(), "TERM"}


def test_a_folder_that_is_gone_does_not_change_the_exit_code(box):
    done = box.run(EXITS_FILE=str(box.notes / "gone/exits.txt"), CODE="5", **SLURM)
    assert done.returncode == 5 and "gone/exits.txt can't be written" in done.stderr


def test_a_stopped_program_has_not_ended(box):
    box.put(
        "python",
        '#!/bin/bash\necho $$ >&3\nuntil [[ -e $NOTES/go ]]; do read -r -t 0.05 <>"$NOTES/pipe"; done\nexit 3\n',
    )
    os.mkfifo(box.notes / "pipe")
    read, write = os.pipe()
    process = subprocess.Popen(["bash", "-c", f'exec 3>&{write}; exec "{SCRIPT}"'], env=box.environ(), pass_fds=[write])
    os.close(write)
    program = int(os.read(read, 100))
    os.close(read)
    try:
        os.kill(program, signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        (box.notes / "go").touch()
        os.kill(program, signal.SIGCONT)
        assert process.wait(30) == 3
    finally:
        os.kill(program, signal.SIGCONT) if process.poll() is None else None
        process.kill()
