"""run.sub with stand-ins for Slurm, Pyxis and Enroot: what it asks of them. With a real Slurm: tests/slurm."""

import os
import re
import signal
import subprocess

import pytest

from tests.test_run_sub import ROOT, Machine

# Runs the command here, once; with --container-name, the containers' paths among its words are those of this machine.
SRUN = r"""#!/bin/bash
lost() { # the job is cancelled at that moment, where the test says whom to signal
    [[ ! -e $NOTES/late ]] || kill -TERM $(<"$NOTES/late")
    exit 1
}
words=() output=/dev/stdout tasks=1 nodes=1
while [[ $1 == --* ]]; do
    case $1 in
    --output=*) output=${1#*=} && output=${output//%t/0} ;;
    --ntasks=*) tasks=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --nodelist=*) list=${1#*=} ;;
    --container-name=*) inside=1 ;;
    --job-name=*) echo "$$ 7.5 ${1#*=}" >"$NOTES/step" ;; # what squeue lists while this process lives
    --container-image=*) ((${PYXIS:-0} == 0)) || exit "$PYXIS" ;;
    esac
    words+=("$1")
    shift
done
echo "${words[*]} :: $*" >>"$NOTES/srun"
compgen -e >>"$NOTES/exported"
[[ -z ${XDG_CACHE_HOME-} ]] || echo "$XDG_CACHE_HOME" >>"$NOTES/xdg"
[[ ! -e $NOTES/cancelled ]] || exit 1
[[ ! -e $NOTES/lost || $nodes == 1 && ${list:-} != "$(<"$NOTES/lost")" && $(<"$NOTES/lost") != all ]] || lost
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$tasks SLURM_NTASKS=$tasks SLURM_PROCID=0 SLURM_LOCALID=0 SLURMD_NODENAME=n1
if [[ ${inside:-} ]]; then
    set -- "${@//\/results/$LOGDIR}"
    set -- "${@//\/workspace\/ssd/$ROOT}"
    cd "$ROOT"
    OUTPUT_DIR=${OUTPUT_DIR/#\/results/$LOGDIR} EXITS_FILE=${EXITS_FILE/#\/results/$LOGDIR}
fi
exec "$@" >>"$output"
"""
SCONTROL = r"""#!/bin/bash
case "$1 $2" in
"show hostnames") printf '%s\n' n1 n2 ;;
"show config") printf '%s\n' "KillWait = 30 sec" "TaskPlugin = task/none" "PluginDir = $NOTES" \
    "PlugStackConfig = $NOTES/plugstack.conf" ;;
"show job") cat "$NOTES/job" 2>/dev/null ;;
requeue*)
    echo "$2" >>"$NOTES/requeued"
    [[ ! -e $NOTES/refuses ]] || exit 1
    kill -TERM "$PPID" ;; # Slurm ends this start
esac
"""
SQUEUE = r"""#!/bin/bash
echo "7.batch batch"
read -r pid step <"$NOTES/step" && kill -0 "$pid" && echo "$step"
exit 0
"""
ENROOT = r"""#!/bin/bash
echo "$* ${ENROOT_DATA_PATH-}" >>"$NOTES/enroot"
"""


def make_slurm(tmp_path) -> Machine:
    """Two nodes, a Pyxis of 0.24, an image; jobs have the id 7."""
    machine = Machine(tmp_path / "a")
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "enroot": ENROOT, "squeue": SQUEUE, "scancel": ""}.items():
        path = tmp_path / "a/bin" / name
        path.write_text(text or "#!/bin/bash\n")
        path.chmod(0o755)
    (tmp_path / "a/image.sqsh").touch()
    pyxis(machine, "0.24.0")
    machine.environ |= {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a job", "SLURM_JOB_NODELIST": "n[1-2]", "ROOT": str(ROOT),
        "SLURM_JOB_CPUS_PER_NODE": "4(x2)", "DGXNNODES": "2", "DGXSYSTEM": "box",
    }  # fmt: skip
    machine.image = {"CONT": str(tmp_path / "a/image.sqsh")}
    return machine


@pytest.fixture
def slurm(tmp_path):
    return make_slurm(tmp_path)


def pyxis(machine, version: str) -> None:
    (machine.notes / "plugstack.conf").write_text("include more/*.conf\n")
    (machine.notes / "more").mkdir(exist_ok=True)
    (machine.notes / "more/pyxis.conf").write_text("# required none.so\nrequired spank_pyxis.so runtime_path=/run\n")
    (machine.notes / "spank_pyxis.so").write_bytes(b"\x7fELF\0pyxis: version v" + version.encode() + b"\0more\0")


def steps(machine) -> list[tuple[str, str]]:
    return [
        tuple(line.split(" :: ", 1)) for line in (machine.notes / "srun").read_text().splitlines() if " :: " in line
    ]


def test_tools_of_the_host_see_no_variable_of_the_container(slurm):
    slurm.environ["XDG_CACHE_HOME"] = "/home/me/.cache"
    code, said = slurm.run(**slurm.image)
    assert code == 0, said
    added = set((slurm.notes / "exported").read_text().split()) - set(slurm.environ) - {"_", "OLDPWD", "PWD", "SHLVL"}
    assert added <= {
        "MASTER_ADDR", "MASTER_PORT", "MLPERF_SUBMISSION_PLATFORM", "DATASET_DIR", "TORCH_HOME", "OUTPUT_DIR",
        "RESULT_INDEX", "CACHES_CLEARED", "EXITS_FILE", "TORCH_CPP_LOG_LEVEL",
    }  # fmt: skip
    assert set((slurm.notes / "xdg").read_text().splitlines()) == {"/home/me/.cache"}
    inner = [
        command
        for options, command in steps(slurm)
        if "--container-name" in options and "--container-image" not in options
    ]
    assert len(inner) >= 6 and all(command.startswith("env XDG_CACHE_HOME=/results/.cache ") for command in inner)
    assert slurm.trial_environ()["XDG_CACHE_HOME"] == f"{slurm.logs}/.cache"


def test_no_step_attaches_to_a_container_that_another_is_leaving(slurm):
    assert slurm.run(**slurm.image)[0] == 0
    names = re.findall(r"--container-name=(\S*)", (slurm.notes / "srun").read_text())
    assert set(names) == {"a_job-7:no_exec"}


def test_containers_are_removed_where_pyxis_has_made_them(slurm):
    assert slurm.run(**slurm.image, ENROOT_DATA_PATH="/home/me/enroot")[0] == 0
    assert (slurm.notes / "enroot").read_text().splitlines() == ["remove -f pyxis_a_job-7 "] * 2
    assert "\nremove pyxis_a_job-7 20\n" in (slurm.notes / "srun").read_text(), "a third of KillWait is left for it"


@pytest.mark.parametrize("batch_script", ["ends", "is cancelled"])
def test_containers_are_removed_before_slurm_kills(slurm, batch_script):
    """The step that waits: when nobody tells it to, it acts a little before KillWait is over."""
    text = (ROOT / "configs/steps.sh").read_text()
    remover = re.search(r"^remover='(.*?)'$", text, re.MULTILINE | re.DOTALL)[1]
    read, write = os.pipe()
    remover = remover.replace("read -r\n", "printf ready >&2\nread -r\n")
    waiting = subprocess.Popen(
        ["bash", "-c", remover, "pyxis_x", "1"], stdin=read, stderr=subprocess.PIPE,
        env=os.environ | {"PATH": f"{slurm.notes.parent}/bin:{os.environ['PATH']}", "NOTES": str(slurm.notes)},
    )  # fmt: skip
    os.close(read)
    assert waiting.stderr.read(5) == b"ready"
    if batch_script == "ends":
        os.close(write)
    else:
        waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(30) == 0
    assert (slurm.notes / "enroot").read_text() == "remove -f pyxis_x \n"


@pytest.mark.parametrize("word", ["$x", 'a"b', "`id`", "a\\b"])
def test_paths_that_pyxis_cannot_mount_are_refused(slurm, word, tmp_path):
    code, said = slurm.run(**slurm.image, EXTRA_MOUNTS=f"{tmp_path}/{word}:/more")
    assert code == 2 and "EXTRA_MOUNTS=" in said and "which Pyxis (here: 0.24) can't mount" in said
    assert not (slurm.notes / "srun").exists()


@pytest.mark.parametrize("variable, place", [("LOGDIR", ""), ("DATADIR", "/train"), ("BACKBONE_DIR", "")])
def test_it_is_the_mounted_path_that_counts(slurm, tmp_path, variable, place):
    (tmp_path / f"cost$5/x{place}").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "cost$5/x")
    code, said = slurm.run(**slurm.image | {variable: str(tmp_path / "link")})
    assert code == 2 and f"{variable}={tmp_path}/cost$5/x holds one of" in said and said.count("holds one of") == 1, (
        said
    )


def test_pyxis_is_found_behind_tabs_and_an_include_that_matches_nothing(slurm):
    pyxis(slurm, "0.20.0")
    (slurm.notes / "plugstack.conf").write_text("include\tmore/*.conf\ninclude none/*.conf\n")
    (slurm.notes / "more/pyxis.conf").write_text("\trequired\tspank_pyxis.so runtime_path=/run\n")
    code, said = slurm.run(**slurm.image)
    assert code == 2 and "here it is 0.20" in said, said


def test_blanks_want_a_pyxis_that_can_mount_them(slurm):
    pyxis(slurm, "0.20.0")
    code, said = slurm.run(**slurm.image)
    assert (
        code == 2 and f"LOGDIR={slurm.logs} holds a blank, which Pyxis can mount from 0.24 on; here it is 0.20" in said
    )
    for version in ("1.0.0", "no such thing"):
        pyxis(slurm, version)
        assert slurm.run(**slurm.image, DATESTAMP=version[0])[0] == 0


def test_messages_of_containers_name_paths_of_the_host(slurm):
    said = slurm.run(**slurm.image, CODES="6")[1]
    assert f"see {slurm.logs}/S_1/rank_0.log and {slurm.data}/set/train" in said
    slurm.run(**slurm.image, DATESTAMP="T")
    check = next(command for _, command in steps(slurm) if " check " in command)
    assert f"/results/T_1/result_0.txt --called {slurm.logs}/T_1/result_0.txt" in check


def test_an_image_without_python_is_told_about_login_shells(slurm):
    (slurm.notes.parent / "bin/python").rename(slurm.notes.parent / "bin/python.none")
    code, said = slurm.run(**slurm.image, PATH=f"{slurm.notes.parent}/bin:/usr/bin:/bin")
    assert code == 2 and "CONT=" in said and "/etc/profile.d" in said and "activate .venv" not in said, said


def test_the_image_of_this_repository_survives_a_login_shell():
    text = (ROOT / "Dockerfile").read_text()
    path = re.search(r"^ENV PATH=(\S+):\$PATH", text, re.MULTILINE)[1]
    assert re.search(rf"PATH={path}:\\?\$PATH.* >/etc/profile\.d/\S+\.sh", text)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"WORK_DIR": "/elsewhere"}, "holds no /elsewhere/run_and_time.sh: WORK_DIR is where it has the repository"),
        ({"PYXIS": "1"}, "no container from CONT="),
    ],
)
def test_what_is_wrong_with_a_container_is_named(slurm, more, words):
    code, said = slurm.run(**slurm.image, **more)
    assert code == 2 and words in said, said


def test_a_node_without_enroot_is_named(slurm):
    (slurm.notes.parent / "bin/enroot").unlink()
    code, said = slurm.run(**slurm.image)
    assert code == 2 and "enroot is not on PATH on n1" in said, said


def test_a_cancelled_job_in_containers_still_has_its_table(slurm):
    for name in ("fifo", "pipe"):
        os.mkfifo(slurm.notes / name)
    process = slurm.started(**slurm.image, STAYS="1")
    assert (slurm.notes / "fifo").read_text() == "ready\n"
    (slurm.notes.parent / "bin/scancel").write_text('#!/bin/bash\nkill -TERM "$(<"$NOTES/pid")"\n')
    (slurm.notes / "cancelled").touch()  # no step can be started any more
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert (
        f"the table of {slurm.logs}" in said
        and "/results" not in said
        and "no further trial: stopped by SIGTERM" in said
    ), said
    assert "trial 1 was stopped and left no checkpoint in" in said and "failed" not in said
    assert "go on with: RESUME=1 DATESTAMP=S ... sbatch" in said


def test_a_rank_that_missed_the_signal_gets_it_once_more(slurm):
    """The first one reaches nobody: the training's step is not there yet."""
    for name in ("fifo", "pipe"):
        os.mkfifo(slurm.notes / name)
    scancel = """#!/bin/bash
    echo "$*" >>"$NOTES/scancel"
    [[ ! -e $NOTES/once ]] || kill -TERM "$(<"$NOTES/pid")"
    touch "$NOTES/once"
    """
    (slurm.notes.parent / "bin/scancel").write_text(scancel.replace("    ", ""))
    process = slurm.started(STAYS="1")
    assert (slurm.notes / "fifo").read_text() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and said.count("SIGUSR1: every rank") == 1, said
    assert (slurm.notes / "scancel").read_text() == "-s USR1 7.5\n" * 2, "the step of the training alone"


@pytest.mark.parametrize("listed, warned", [(3, False), (99, True)])
def test_a_trial_waits_for_the_step_of_the_one_before(slurm, listed, warned):
    (slurm.notes.parent / "bin/sleep").write_text('#!/bin/bash\necho "$1" >>"$NOTES/slept"\nexec /bin/sleep 0.01\n')
    (slurm.notes.parent / "bin/sleep").chmod(0o755)
    (slurm.notes.parent / "bin/squeue").write_text(
        f'#!/bin/bash\n[[ $(grep -c 2 "$NOTES/slept") -ge {listed} ]] || echo trial_1 n2\n'
    )
    code, said = slurm.run()
    assert code == 0 and (slurm.notes / "slept").read_text().count("2\n") == (45 if warned else listed)
    assert ("step of an earlier trial on n2: drain" in said) == warned, said
