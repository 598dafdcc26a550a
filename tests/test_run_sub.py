"""run.sub without Slurm, with a stand-in for the interpreter; on a real Slurm: tests/slurm/test_run_sub.py."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.configs import FILES, MODULES, PROGRAMS, ROOT

BENCHMARK = next(iter(MODULES))
PYTHON = r"""#!/bin/bash
printf '%s\n' "$*" >>"$NOTES/calls"
case $* in
*tools/preflight.py*)
    file="$*"
    file=${file##*--system-json }
    echo '{"submitter": "x"}' >"${file%% --*}"
    exit "${PREFLIGHT:-0}" ;;
*--print-config*) exit "${CONFIG:-0}" ;;
*" explain "*) echo "see /results/S_1/rank_0.log and $DATASET_DIR/train" ;;
*" summary "*) echo "the table of ${4}" ;;
"-m "*.train*)
    env -0 >"$NOTES/env_$RESULT_INDEX"
    echo "words of trial $RESULT_INDEX"
    echo ':::MLLOG {"key": "seed"}' | tee "$OUTPUT_DIR/result_$RESULT_INDEX.txt"
    eval "${DURING:-}"
    if [[ -n ${STAYS:-} ]]; then
        trap 'exit 4' USR1 TERM
        echo "$PPID" >"$NOTES/pid"
        echo ready >"$NOTES/fifo"
        while :; do read -rt 0.1 <>"$NOTES/pipe"; done
    fi
    read -ra codes <<<"${CODES:-0 0 0 0 0}"
    exit "${codes[$RESULT_INDEX]}" ;;
esac
"""


class Machine:
    """A machine with a data set, weights and a stand-in for Python."""

    def __init__(self, folder: Path):
        self.notes, self.logs = folder / "notes", folder / "my logs"
        for name in ("notes", "bin", "my data/set/train", "weights"):
            (folder / name).mkdir(parents=True)
        python = folder / "bin/python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.data = folder / "my data"
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MLPERF"))}
        self.environ = keep | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "NOTES": str(self.notes), "LOGDIR": str(self.logs),
            "DATADIR": str(self.data), "BACKBONE_DIR": str(folder / "weights"), "CONT": "", "DATESTAMP": "S",
            "DROPCACHE_CMD": "true", "BENCHMARK": BENCHMARK, "DGXSYSTEM": "box_001x01x002",
            "DGXNNODES": "1", "DGXNGPU": "1", "WALLTIME_RUNANDTIME": "5", "PYTHON": str(python),
        }  # fmt: skip

    def started(self, config: str = "", **more: str | None) -> subprocess.Popen:
        """run.sub with its variables, and after configs/config_<config>.sh where one is named."""
        environ = {name: value for name, value in (self.environ | more).items() if value is not None}
        script = ["bash", "-euc", 'source "$0" && exec "$1"', ROOT / f"configs/config_{config}.sh"] if config else []
        return subprocess.Popen(
            [*script, ROOT / "run.sub"],
            env=environ, cwd=self.notes, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, config: str = "", **more: str | None) -> tuple[int, str]:
        process = self.started(config, **more)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def calls(self) -> list[str]:
        file = self.notes / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def trial_environ(self, index=0) -> dict[str, str]:
        return dict(e.split("=", 1) for e in (self.notes / f"env_{index}").read_text().split("\0") if "=" in e)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_everything_missing_is_named_at_once(machine):
    names = ("BENCHMARK", "DGXSYSTEM", "DGXNGPU", "WALLTIME_RUNANDTIME", "CONT", "DATADIR", "BACKBONE_DIR")
    code, said = machine.run(**dict.fromkeys(names), NEXP="two")
    assert code == 2 and machine.calls() == []
    assert "error: BENCHMARK DGXSYSTEM DGXNGPU WALLTIME_RUNANDTIME missing: source configs" in said
    for name in ("CONT", "DATADIR", "BACKBONE_DIR"):
        assert f"error: {name} is missing" in said
    assert "NEXP=two is not a whole number" in said and said.endswith("nothing was started\n")


@pytest.mark.parametrize(
    "more, words",
    [
        ({"DATADIR": "/nowhere at all"}, "DATADIR=/nowhere at all: there is no such folder"),
        ({"DGXNNODES": "2"}, "this job has 1 nodes, DGXNNODES=2"),
        ({"CONT": "image"}, "run_with_docker.sh"),
        ({"LOGDIR": "/proc/logs"}, "LOGDIR=/proc/logs can't be written"),
        ({"LOGDIR": "a%j"}, "holds % or"),
        ({"VERIFY_MOUNTS": "most"}, "VERIFY_MOUNTS=most: choose"),
        ({"NEXP": "0"}, "NEXP=0 is not a whole number above 0"),
        ({"RESUME": "1", "DATESTAMP": None}, "RESUME=1 needs the DATESTAMP"),
        ({"REQUEUE": "yes"}, "REQUEUE=yes: choose 0 or 1"),
        ({"CLEAR_CACHES": "yes"}, "CLEAR_CACHES=yes: choose 0, 1 or files"),
        ({"SET_MAXQ_CLK": "1"}, "this config has no MAXQ_CLK"),
    ],
)
def test_what_is_wrong_is_said(machine, more, words):
    code, said = machine.run(**more)
    assert code == 2 and words in said and machine.calls() == [], said


def test_weights_and_data_are_asked_for_only_where_needed(machine):
    assert machine.run(BACKBONE_DIR=None, EXTRA_PARAMS="--workers 1 --no-pretrained")[0] == 0
    assert machine.run(BACKBONE_DIR=None, DATADIR=None, USE_SYNTHETIC_DATA="1", DATESTAMP="T")[0] == 0
    train = [call for call in machine.calls() if call.startswith("-m ") and "--print" not in call]
    assert train[-1].endswith("--synthetic")


@pytest.mark.parametrize("words", ["--checkpoint x.pt", "--checkpoint=x.pt", "--weights w", "--backbone_path w"])
def test_a_checkpoint_or_a_weights_file_needs_no_weights_folder(machine, words):
    machine.run(BACKBONE_DIR=None, EXTRA_PARAMS=words, PREFLIGHT="2")
    assert "preflight.py" in machine.calls()[-1] and "--backbone" not in machine.calls()[-1]


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--workers 1", True),
        ("--device auto", True),
        ("--device cpu --device cuda", True),
        ("--device cpu", False),
        ("--device=cpu", False),
        ("--workers 1\n--device  tpu", False),
        ("--no-cuda", False),
        ("--no_cuda", False),
    ],
)
def test_gpus_are_looked_for_where_the_program_wants_them(machine, words, wanted):
    assert machine.run(EXTRA_PARAMS=words, PREFLIGHT="2")[0] == 2
    assert ("--device cpu" not in machine.calls()[-1]) == wanted and "preflight" in machine.calls()[-1]


@pytest.mark.parametrize("path", [path for path in FILES if "--mode " in path.read_text()], ids=lambda path: path.stem)
def test_a_config_that_trains_nothing_is_refused(machine, path):
    code, said = machine.run(path.stem.removeprefix("config_"), BACKBONE_DIR=None)
    mode = re.search(r"--mode ([\w-]+)", path.read_text())[1]
    assert code == 2 and machine.calls() == [] and "BACKBONE_DIR" not in said
    assert f"error: EXTRA_PARAMS has --mode {mode}, but trials are trainings" in said and "./run_and_time.sh" in said


@pytest.mark.parametrize("words", ["--mode=evaluate", "--test-only", "--mode train --mode predict"])
def test_another_mode_is_refused_in_any_spelling(machine, words):
    code, said = machine.run(EXTRA_PARAMS=words)
    assert code == 2 and machine.calls() == [] and "trials are trainings" in said
    assert machine.run(EXTRA_PARAMS="--mode training")[0] == 0


@pytest.mark.parametrize("script, first", [("run.sub", "One job: "), ("run_with_docker.sh", "One machine ")])
def test_help_is_the_header_and_other_words_are_refused(script, first):
    done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith(first), done
    assert "SBATCH" not in done.stdout and "source configs/config_<system>.sh" in done.stdout
    done = subprocess.run([ROOT / script, "fast"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "nothing was started" not in done.stderr, "not one step further"


def test_a_stopped_job_is_resumed_where_it_was(machine):
    assert machine.run(NEXP="3", CODES="0 4 0")[0] == 4 and not (machine.logs / "S_3").exists()
    (machine.logs / "S_2/last.pt").touch()
    code, said = machine.run(NEXP="3", RESUME="1")
    assert code == 0 and "trial 1 ended with code 0 before" in said
    train = [call for call in machine.calls() if call.startswith("-m ") and "--print" not in call]
    assert [call.endswith("--resume --no-overwrite") for call in train] == [False, False, True, False]


def test_a_failed_trial_does_not_stop_the_others(machine):
    code, said = machine.run(NEXP="4", CODES="0 6 3 0", SEED="5")
    assert code == 6
    calls = machine.calls()[1:]  # without the look whether the packages are there
    assert "--print-config" in calls[0] and "tools/preflight.py" in calls[1]
    kinds = [
        next(k for k in ("train", "explain", "check", "summary") if f" {k}" in c or f".{k}" in c) for c in calls[2:]
    ]
    assert " ".join(kinds) == "train check train explain train explain check train check summary"
    assert [machine.trial_environ(k)["SEED"] for k in range(4)] == ["5", "6", "7", "8"]
    assert [(machine.logs / f"S_{k}/exit_code").read_text() for k in (1, 2, 3, 4)] == ["0\n", "6\n", "3\n", "0\n"]
    log = (machine.logs / "S_1.log").read_text()
    commit = r":::GITCOMMITID (?P<code>([0-9a-f]{40}(-dirty)?|unknown)) (?P=code)"
    assert re.fullmatch(
        rf":::DLPAL none none 1 \S+ unknown \S+\n:::SYSJSON {{.*}}\n{commit}\nwords of trial 0\n.*\n.*\n", log
    )
    assert re.search(r"trial 4 of 4: .*S_4\.log", said)


def test_what_a_trial_gets_to_know(machine):
    assert machine.run(MLPERF_SUBMISSION_PLATFORM="DGX")[0] == 0
    found = machine.trial_environ()
    assert found["DATASET_DIR"] == str(machine.data / "set"), "the data set inside DATADIR"
    assert found["OUTPUT_DIR"] == str(machine.logs / "S_1") and found["RESULT_INDEX"] == "0"
    assert found["TORCH_HOME"].endswith("/weights") and found["MLPERF_SUBMISSION_PLATFORM"] == "1xDGX"
    assert found["CACHES_CLEARED"] == "1" and "SEED" not in found
    preflight = machine.calls()[2]
    assert f"--data {machine.data / 'set'} --manifest {machine.logs}/expected-mounts.csv" in preflight


def test_no_event_without_dropped_caches(machine):
    code, said = machine.run(DROPCACHE_CMD="false")
    assert code == 0 and "warning: the page cache was not dropped" in said
    assert machine.trial_environ()["CACHES_CLEARED"] == "0"
    code, said = machine.run(DROPCACHE_CMD="false", CLEAR_CACHES="0", DATESTAMP="T")
    assert code == 0 and "warning" not in said
    machine.run(DROPCACHE_CMD="false", CLEAR_CACHES="files", DATESTAMP="U")
    assert machine.calls()[-3].endswith("--drop-file-cache")


@pytest.mark.parametrize("what", ["CONFIG", "PREFLIGHT"])
def test_no_trial_after_a_failed_preflight(machine, what):
    code, said = machine.run(**{what: "2"})
    assert code == 2 and "no trial was started" in said
    assert not (machine.notes / "env_0").exists()


@pytest.mark.parametrize(
    "during, reason",
    [
        ('rm -r "$LOGDIR"', "LOGDIR: .*/S_1 was removed"),
        ('rm "$LOGDIR/S_system.json"', "LOGDIR: .*/S_system.json was removed"),
        ('rm -r "$DATADIR"', ".*/my data/set is gone on .*"),
        (
            "echo 'echo Avail; echo 3M' >$NOTES/../bin/df; chmod +x $NOTES/../bin/df",
            "the disk of LOGDIR=.*my logs is full",
        ),
        (
            "printf '%s\n' 'echo dd: error writing x: Disk quota exceeded >&2' 'exit 1' >$NOTES/../bin/dd; "
            "chmod +x $NOTES/../bin/dd; printf 'exit 1\n' >$NOTES/../bin/df; chmod +x $NOTES/../bin/df",
            "LOGDIR=.*my logs: nothing can be written: Disk quota exceeded",
        ),
    ],
)
def test_what_would_fail_each_trial_ends_the_job_and_is_named(machine, during, reason):
    code, said = machine.run(NEXP="3", CODES="1 1 1", DURING=during)
    assert code == 1 and re.search(f"no further trial: {reason}$", said, re.MULTILINE), said
    assert not (machine.logs / "S_2").exists()


def test_a_look_at_the_folders_that_fails_ends_nothing(machine):
    df = machine.notes.parent / "bin/df"
    df.write_text("#!/bin/bash\necho df: no such mount >&2\nexit 1\n")
    df.chmod(0o755)
    code, said = machine.run(NEXP="2", CODES="1 0")
    assert code == 1 and "the table of" in said and (machine.logs / "S_2/exit_code").read_text() == "0\n", said
    assert not list(machine.logs.glob("S_1/.*")), "nothing is left of what was written to see whether one can"


def test_a_log_that_cannot_be_opened_ends_the_job_with_its_table(machine):
    code, said = machine.run(NEXP="3", RESUME="1", DURING='mkdir -p "$LOGDIR/S_2/rank_0.log"')
    assert code == 1 and re.search(r"no further trial: LOGDIR=.*my logs can't be written, see above$", said, re.M), said
    assert "the table of" in said and "go on with: RESUME=1 DATESTAMP=S ... run.sub" in said


def test_a_trial_needs_the_system_description(machine):
    code, said = machine.run(NEXP="2", DURING='rm "$LOGDIR/S_system.json"')
    assert code == 1 and "no further trial: LOGDIR=" in said and "S_system.json is gone" in said
    assert not (machine.logs / "S_2").exists()


@pytest.mark.parametrize("more, warned", [({"BATCHSIZE": "32"}, "BATCHSIZE=32"), ({"BATCHSIZE": "2"}, ""), ({}, "")])
def test_values_that_the_name_of_the_config_denies(machine, more, warned):
    code, said = machine.run(**more)
    words = f"warning: {warned}, but the name DGXSYSTEM=box_001x01x002 says 2"
    assert code == 0 and (words in said if warned else "warning" not in said), said


def test_an_earlier_job_is_not_overwritten(machine):
    assert machine.run()[0] == 0
    code, said = machine.run()
    assert code == 2 and "choose another DATESTAMP" in said
    assert machine.run(DATESTAMP=None, NOTES=str(machine.notes), PREFLIGHT="2")[0] == 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_trial_and_no_other_starts(machine, number):
    for name in ("fifo", "pipe"):
        os.mkfifo(machine.notes / name)
    process = machine.started(NEXP="3", STAYS="1")
    assert (machine.notes / "fifo").read_text() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and "every rank writes a checkpoint" in said and "no further trial" in said
    assert not (machine.logs / "S_2").exists() and "summary" in machine.calls()[-1]


def test_without_slurm_nothing_is_requeued(machine):
    scontrol = machine.notes.parent / "bin/scontrol"
    scontrol.write_text('#!/bin/bash\necho "$*" >>"$NOTES/scontrol"\n')
    scontrol.chmod(0o755)
    stops = 'trap "" USR1; kill -USR1 "$(ps -o ppid= -p "$PPID" | tr -d " ")"; read -rt 2 <> <(:)'
    code, said = machine.run(NEXP="2", CODES="0 0", REQUEUE="1", DURING=stops)
    assert code == 1 and "no further trial: stopped by SIGUSR1" in said and not (machine.notes / "scontrol").exists(), (
        said
    )


def test_the_readme_lists_every_variable_that_the_launchers_read():
    scripts = [
        "run.sub",
        "run_and_time.sh",
        "run_with_docker.sh",
        "configs/config_common.sh",
        "configs/config_mounts.sh",
        "configs/steps.sh",
        *(f"{name}/launch.sh" for name in MODULES),
    ]
    read = set()
    for name in scripts:
        text = re.sub(r"(^|\s)#.*", "", (ROOT / name).read_text())
        read |= set(re.findall(r"\$\{?!?#?([A-Z][A-Z0-9_]{2,})\b", text))
        for words in re.findall(r"^for name in ([A-Z_\\\s]+); do", text, re.MULTILINE):
            read |= set(words.replace("\\", " ").split())
    given = {
        "REMOVER",
        "REMOVER_PID",
        "BASH_REMATCH",
        "PATH",
        "SECONDS",
        "VIRTUAL_ENV",
        "BASH_SOURCE",
        "EUID",
        "HOSTNAME",
        "PYTHONPATH",
        "RANDOM",
        "NAME",
        "OMP_NUM_THREADS",
    }
    given |= {
        "CACHES_CLEARED",
        "RESULT_INDEX",
        "OUTPUT_DIR",
        "DATASET_DIR",
        "TORCH_HOME",
        "EXITS_FILE",
        "RANK",
        "LOCAL_RANK",
    }
    given |= {name for name in read if name.startswith(("SLURM", "OMPI_", "PET_", "NCCL_"))} - {"NCCL_TEST"}
    section = (ROOT / "README.md").read_text().split("## Variables of a job")[1].split("\n## ")[0]
    listed = {
        name
        for row in section.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row.split("|")[1])
    }
    assert read - given - listed == set(), "missing in the README"
    indirect = {"SYSTEM_DESCRIPTION", "MLPERF_SYSTEM_NAME", "WALLTIME", "MAXQ_CLK", "MINEDP_CLK", "GOMP_SPINCOUNT"}
    programs = set().union(*PROGRAMS.values(), indirect)
    assert listed - read - programs == set(), "read by nobody"
