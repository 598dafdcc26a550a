"""The local Slurm itself, and the test double of Pyxis: what other tests stand on has to be true."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import Cluster, children, parse_job
from tests.slurm.containers import host_mounts, records, require

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, body: str) -> Path:
    path.write_text("#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2\n" + body)
    return path


def test_two_by_two_tasks_each_on_its_node_and_in_the_projects_python(cluster):
    words = "echo $SLURM_PROCID $SLURM_LOCALID $(hostname) $WHAT; python -c 'import sys; print(sys.prefix)'"
    answer = cluster.run("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", words, env=cluster.env(WHAT="a b"))
    tasks = ["0 0 n1 a b", "1 1 n1 a b", "2 0 n2 a b", "3 1 n2 a b"]
    assert sorted(answer.stdout.splitlines()) == sorted([*tasks, *[sys.prefix] * 4])


def test_environment_is_that_of_a_user_outside_of_jobs(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("DATADIR", "/data")
    values = cluster.env(DATADIR=None, NEXP=2)
    assert not {"SLURM_JOB_ID", "MASTER_ADDR", "DATADIR"} & set(values)
    assert values["NEXP"] == "2" and values["SLURM_CONF"].endswith("slurm.conf")


def test_job_with_spaces_everywhere(cluster, tmp_path):
    folder = tmp_path / "a b=c"
    folder.mkdir()
    script = write(folder / "my job.sub", 'echo "$1, $2"; getent hosts n2 | cut -d" " -f1; srun pwd; exit 5\n')
    job = cluster.submit("--job-name=the job", script, "one two", "Key=3", cwd=folder)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["JobName"]) == ("FAILED", "5:0", "the job")
    assert (fields["WorkDir"], fields["Command"]) == (str(folder), f"{script} one two Key=3")
    assert fields["StdOut"] == str(folder / f"slurm-{job}.out")
    assert cluster.output(job).splitlines() == ["one two, Key=3", "127.0.1.2", *[str(folder)] * 4]


def test_fields_of_a_job():
    lines = ["JobId=3 JobName=a JobState=x", "   JobState=RUNNING TRES=cpu=4,mem=2M", "   Command=/a b=c"]
    fields = parse_job("\n".join(lines))
    assert fields["JobName"] == "a JobState=x" and fields["JobId"] == "3" and fields["JobState"] == "RUNNING"
    assert fields["TRES"] == "cpu=4,mem=2M" and fields["Command"] == "/a b=c"


def test_waiting_too_long_shows_the_jobs_output_and_the_logs(cluster, tmp_path):
    job = cluster.submit(write(tmp_path / "job.sub", "echo still here; sleep 60\n"), cwd=tmp_path)
    cluster.wait(job, states={"RUNNING"})
    with pytest.raises(AssertionError, match=r"(?s)RUNNING.*after 0\.5 s.*still here.*slurmctld\.log.*slurmd-n1\.log"):
        cluster.wait(job, timeout=0.5)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_a_task_is_found_and_killed_from_outside(cluster, tmp_path):
    job = cluster.submit(write(tmp_path / "job.sub", "srun --kill-on-bad-exit=1 sleep 60\n"), cwd=tmp_path)
    pid = cluster.task(job, 3)
    assert cluster.processes("n2")[pid][-2:] == ["sleep", "60"] or cluster.processes("n2")[pid][-1] == "60"
    assert pid not in cluster.processes("n1")
    os.kill(pid, signal.SIGKILL)
    assert cluster.wait(job, 30)["JobState"] == "FAILED"
    assert "n2: task 3: Killed" in cluster.output(job)


@pytest.mark.parametrize(("words", "code"), [("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_exit_codes_and_signals_pass_through(cluster, container_cluster, image, words, code):
    inside = [f"--container-image={image}", f"--container-mounts={host_mounts()}"]
    assert cluster.run("srun", "-n1", "bash", "-c", words, check=False).returncode == code
    assert container_cluster.run("srun", "-n1", *inside, "bash", "-c", words, check=False).returncode == code


def test_requeue_starts_again_at_once_with_the_same_id(cluster, tmp_path):
    body = 'echo "start ${SLURM_RESTART_COUNT:-0}"\n((SLURM_RESTART_COUNT)) && exit\n'
    script = write(tmp_path / "job.sub", body + "scontrol requeue $SLURM_JOB_ID; sleep 60\n")
    job = cluster.submit("--open-mode=append", script, cwd=tmp_path)
    cluster.requeue_now(job)
    assert cluster.wait(job)["Restarts"] == "1"
    said = cluster.output(job)
    assert said.startswith("start 0\n") and said.endswith("start 1\n")


def test_two_clusters_side_by_side_and_fake_gpus(cluster, tmp_path):
    with Cluster(tmp_path / "other", nodes=("g1",), gpus=2) as other:
        assert other.run("sinfo", "-h", "-o", "%N %G").stdout.strip() == "g1 gpu:2"
        words = "echo $SLURM_JOB_NUM_NODES $CUDA_VISIBLE_DEVICES"
        assert other.run("srun", "--gpus-per-node=2", "bash", "-c", words).stdout.strip() == "1 0,1"
        assert other.run("srun", "hostname").stdout == "g1\n"
        assert cluster.run("srun", "-N2", "hostname").stdout.split().count("n2") == 1


def test_a_node_that_loses_power_takes_its_processes_with_it_and_comes_back(tmp_path):
    with Cluster(tmp_path / "slurm", settings={"SlurmdTimeout": 5}) as running:
        job = running.submit(write(tmp_path / "job.sub", "srun sleep 60\n"), cwd=tmp_path)
        pid = running.task(job, 3)
        running.power_off("n2")
        assert not Path(f"/proc/{pid}").exists()
        running.power_on("n2")
        running.run("scancel", job)
        running.wait(job)
        running.set_node("n1", "drain")
        assert "DRAIN" in running.node_state("n1")
        deadline = time.monotonic() + 30
        while running.run("srun", "-w", "n2", "--immediate=5", "hostname", check=False).stdout != "n2\n":
            assert time.monotonic() < deadline, running.logs()


def test_nothing_is_left_when_the_test_run_is_killed(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.slurm.cluster import Cluster
with Cluster({str(tmp_path / "slurm")!r}) as running:
    job = running.submit("--wrap=setsid -f sleep 600; env -i sleep 600", "--output=/dev/null")
    running.wait(job, states={{"RUNNING"}})
    print("ready", running._link.parent, flush=True)
    time.sleep(600)
"""
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    ready, link = killed.stdout.readline().split()
    everything = descendants(killed.pid)
    killed.kill()
    killed.wait()
    Path(link, "d").unlink()
    Path(link).rmdir()
    assert ready == "ready" and len(everything) > 5
    deadline = time.monotonic() + 5
    while alive := [pid for pid in everything if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def test_stop_leaves_neither_processes_nor_mounts(tmp_path, image):
    before = set(descendants(os.getpid()))
    with pytest.raises(ZeroDivisionError), Cluster(tmp_path / "a b", containers="0.24.0") as running:
        link = running._link.parent
        script = f"srun --container-image='{image}' --container-mounts={host_mounts()} sleep 600\n"
        running.task(running.submit(write(tmp_path / "job.sub", script), cwd=tmp_path), 3)
        _ = 1 / 0
    assert set(descendants(os.getpid())) <= before
    assert not link.exists()
    assert str(tmp_path) not in Path("/proc/mounts").read_text() + subprocess.getoutput("losetup -a")


def test_clear_errors_when_slurm_is_missing_or_does_not_start(tmp_path, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"slurmctld-none not found: on Debian, as root: apt-get install .* slurmctld"
    ):
        require("slurmctld-none", packages=cluster_module.PACKAGES)
    broken = Cluster(tmp_path / "slurm", settings={"SchedulerType": "sched/none-such"})
    with pytest.raises(AssertionError, match=r"(?s)Slurm did not start: slurmctld ended.*none-such"):
        broken.__enter__()
    assert not broken.daemons


# The test double of Pyxis


def srun(running: Cluster, *words, check=True, env=None) -> subprocess.CompletedProcess:
    return running.run("srun", "-N2", "--ntasks-per-node=1", *words, check=check, env=env)


def test_options_are_recorded_for_every_task_on_both_nodes(container_cluster, image, tmp_path):
    mounts = f"{host_mounts()},{tmp_path}:/results"
    words = [f"--container-image={image}", f"--container-mounts={mounts}", "--container-workdir=/results"]
    words += ["--container-name=recorded:create", "--no-container-mount-home", "--container-env=A,B"]
    job = srun(container_cluster, *words, "bash", "-c", 'echo "$SLURM_JOB_ID"').stdout.split()[0]
    lines = sorted(records(container_cluster.folder, int(job)), key=lambda line: line["rank"])
    assert [(line["node"], line["rank"], line["step"], line["entered"]) for line in lines] == [
        ("n1", 0, 0, True),
        ("n2", 1, 0, True),
    ]
    for line in lines:
        assert line["argv"] == ["bash", "-c", 'echo "$SLURM_JOB_ID"'] and line["cwd"] == "/results"
        assert line["options"] == {
            "container-image": str(image),
            "container-mounts": mounts,
            "container-workdir": "/results",
            "container-name": "recorded:create",
            "no-container-mount-home": True,
            "container-env": "A,B",
        }


def test_it_really_enters_the_image(container_cluster, image, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "out dir").mkdir()
    mounts = f"{host_mounts()},{tmp_path}/data:/datasets:ro,{tmp_path}/out dir:/results"
    words = (
        """cat /etc/image; pwd; ls -d /home; touch /datasets/x; touch /x; touch "/results/$(hostname)" && echo wrote"""
    )
    entered = [f"--container-image={image}", f"--container-mounts={mounts}"]
    answer = srun(container_cluster, *entered, "bash", "-c", words)
    assert sorted(answer.stdout.split()) == ["/root", "/root", "inside", "inside", "wrote", "wrote"]
    assert answer.stderr.count("cannot access '/home'") == 2
    assert answer.stderr.count("/datasets/x': Read-only file system") == 2
    assert answer.stderr.count("touch '/x': Read-only file system") == 2
    assert sorted(file.name for file in (tmp_path / "out dir").iterdir()) == ["n1", "n2"]
    assert not any((tmp_path / "data").iterdir())


def test_torch_runs_inside(container_cluster, image):
    words = [f"--container-image={image}", f"--container-mounts={host_mounts()}", sys.executable, "-c"]
    answer = container_cluster.run("srun", "-n1", *words, "import torch; print(torch.ones(3).sum().item())")
    assert answer.stdout == "3.0\n"


def test_variables_of_the_image_and_of_the_pytorch_hook_win(container_cluster, image):
    show = 'echo "$FROM_IMAGE $FROM_HOST $MASTER_ADDR $((MASTER_PORT - 61000 - SLURM_JOB_ID % 4536)) $RANK $WORLD_SIZE"'
    words = [f"--container-image={image}", f"--container-mounts={host_mounts()}"]
    host = container_cluster.env(FROM_IMAGE="no", FROM_HOST="yes", MASTER_ADDR="mine", RANK="9")
    answer = srun(container_cluster, *words, "bash", "-c", show, env=host)
    assert sorted(answer.stdout.splitlines()) == ["yes yes n1 0 0 2", "yes yes n1 0 1 2"]
    kept = "--container-env=FROM_IMAGE,MASTER_ADDR"
    answer = srun(container_cluster, *words, kept, "bash", "-c", show, env=host)
    assert sorted(answer.stdout.splitlines()) == ["no yes mine 0 0 2", "no yes mine 0 1 2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--container-image=/none.sqsh"], "No such file or directory: /none.sqsh"),
        (["--container-image=tiny.sqsh"], "failed to import docker image: tiny.sqsh"),
        (["--container-image=/etc/hosts"], "Invalid image format"),
        (["--container-image={image}", "--container-mounts=/none:/x"], "No such file or directory: /none"),
        (["--container-image={image}", "--container-mounts=data:/x"], "mount source must be"),
        (["--container-image={image}", "--container-mounts={host}", "--container-workdir=/none"], "chdir to /none"),
        (["--container-image={image}"], "no login shell in the container"),
        (["--container-name=never"], 'a container with name "never" does not exist'),
    ],
)
def test_what_is_missing_fails_and_the_command_does_not_run(container_cluster, image, words, message):
    words = [word.format(image=image, host=host_mounts()) for word in words]
    answer = srun(container_cluster, *words, "bash", "-c", "echo ran", check=False)
    assert answer.returncode and message in answer.stderr and "ran" not in answer.stdout
    assert container_cluster.run("srun", "-N2", "enroot", "list").stdout.count("pyxis_") <= 2  # recorded's


def test_mounts_alone_are_ignored_with_a_warning(container_cluster, tmp_path):
    answer = srun(container_cluster, f"--container-mounts={tmp_path}:/results", "ls", "-d", "/results", check=False)
    assert answer.stderr.count("ignoring --container-mounts because neither --container-image nor") == 2
    assert not records(container_cluster.folder)[-1]["entered"]


def test_named_containers_live_on_their_node_until_removed(container_cluster, image):
    mounts = f"--container-mounts={host_mounts()}"
    fresh = [f"--container-image={image}", mounts, "--container-name=stale"]
    container_cluster.run("srun", "-w", "n1", *fresh, "--container-writable", "touch", "/left")
    listed = srun(container_cluster, "-l", "enroot", "list").stdout.splitlines()
    assert [line for line in listed if "stale" in line] == ["0: pyxis_stale"]
    # a stale one of the name is used, whatever image is asked for; the other node starts from the image
    answer = srun(container_cluster, *fresh[1:], "--container-image=/none.sqsh", "ls", "/left", check=False)
    assert answer.stdout == "/left\n" and "/none.sqsh" in answer.stderr
    # writing has to be asked for again
    answer = container_cluster.run("srun", "-w", "n1", mounts, "--container-name=stale", "touch", "/x", check=False)
    assert answer.returncode and "Read-only" in answer.stderr
    container_cluster.run("srun", "-w", "n1", "enroot", "remove", "-f", "pyxis_stale")
    answer = container_cluster.run("srun", "-w", "n1", mounts, "--container-name=stale", "true", check=False)
    assert answer.returncode and "does not exist" in answer.stderr
    answer = container_cluster.run("srun", "-w", "n1", "enroot", "remove", "-f", "pyxis_stale", check=False)
    assert answer.returncode == 1 and "No such file or directory" in answer.stderr


def test_a_step_attaches_to_a_running_container_unless_told_not_to(container_cluster, image, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    script, step = tmp_path / "job.sub", "srun -N1 -n1 --overlap --container-name=one"
    a, b = (f"--container-mounts={host_mounts()},{tmp_path / folder}:/{folder}" for folder in ("a", "b"))
    lines = [f"{step} --container-image={image} {a} bash -c 'touch /a/in; sleep 600' &"]
    lines += [f"until [[ -e {tmp_path}/a/in ]]; do sleep 0.1; done", f"{step} {b} ls -d /a /b"]
    lines += [f"{step}:no_exec {b} ls -d /a /b", "scancel $SLURM_JOB_ID"]
    script.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    job = container_cluster.submit(f"--output={tmp_path}/out", script)
    container_cluster.wait(job)
    attached = {
        line["step"]: line["attached"] for line in records(container_cluster.folder, job) if line["step"] != "batch"
    }
    assert attached == {0: False, 1: True, 2: False}
    said = (tmp_path / "out").read_text()
    assert "cannot access '/b'" in said and said.count("/b\n") == 1, said
    container_cluster.run("srun", "-w", "n1", "enroot", "remove", "-f", "pyxis_one")


def test_sbatch_takes_the_options_too_and_runs_the_script_inside(container_cluster, image, tmp_path):
    script = tmp_path / "job.sub"
    script.write_text("#!/bin/bash\ncat /etc/image; pwd\n")
    words = [f"--container-image={image}", f"--container-mounts={host_mounts()}", "--container-workdir=/var"]
    job = container_cluster.submit(*words, f"--output={tmp_path}/out", script)
    container_cluster.wait(job)
    assert [line["step"] for line in records(container_cluster.folder, job)] == ["batch"]
    assert (tmp_path / "out").read_text().endswith("\ninside\n/var\n")
