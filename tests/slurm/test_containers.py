"""run.sub with CONT: the options of every step and what runs inside, on the test double of Pyxis (containers.py).

The image holds no programs: EXTRA_MOUNTS brings the machine's, this Python and the repository. It sets PYTORCH_VERSION,
so that Enroot's hook for PyTorch gives each task its own MASTER_PORT, RANK and so on, over those of run.sub.
"""

import errno
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import USER, Cluster, environment
from tests.slurm.containers import host_mounts, make_image, records
from tests.slurm.jobs import LONG, ONE_RANK, ROOT, SHARED

pytestmark = pytest.mark.slurm
FLAGS = dict.fromkeys(("no-container-mount-home", "container-remap-root", "container-writable"), True)
DATA, WEIGHTS = "/datasets/open-images-v6", "/torch-home"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """KillWait (here Slurm's default) is what a rank has to write its checkpoint when the job is cancelled."""
    with Cluster(tmp_path_factory.mktemp("slurm"), containers="0.24.0", cpus=8, kill_wait=30) as running:
        yield running


@pytest.fixture(scope="module")
def foreign(cluster, image):
    """A container of somebody else on each node, whose name begins like ours."""
    return make_container(cluster, image, "detector-")


@pytest.fixture(scope="module")
def inside(image, tmp_path_factory):
    """The variables of a job in containers."""
    weights = make_weights(tmp_path_factory.mktemp("weights") / "the weights")
    extra = f"{ROOT}:/workspace/ssd:ro,{host_mounts()}"
    return {"CONT": image, "EXTRA_MOUNTS": extra, "BACKBONE_DIR": weights}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of a user who has exported variables that Enroot reads."""
    home = tmp_path_factory.mktemp("home")
    os.chown(home, USER.pw_uid, USER.pw_gid)
    return {"XDG_CACHE_HOME": home / "cache", "ENROOT_DATA_PATH": home / "data"}


@pytest.fixture(scope="module")
def whole(submit_for_module, foreign, inside, exported):
    """A job of two trials that has ended, for several tests."""
    job = submit_for_module(NEXP=2, SEED=5, DROPCACHE_CMD="true drop", **inside, **exported)
    job.until_end(420)
    began = time.monotonic()
    assert job.wait() == 0, job.said()
    assert time.monotonic() - began < 12, "no step is left that Slurm must kill after KillWait"
    return job


def make_weights(folder: Path) -> Path:
    folder.mkdir()
    (folder / "resnet.pth").write_text("unused\n")
    return folder


def containers(cluster) -> dict[str, list[str]]:
    """What `enroot list` says on each node; its folder is a mount of the node's own."""
    folders = {
        node: Path(f"/proc/{cluster.daemons[node].pid}/root{cluster.folder}/containers") for node in cluster.nodes
    }
    return {node: sorted(path.name for path in folder.iterdir()) for node, folder in folders.items()}


def make_container(cluster, image, name, node=None) -> str:
    """On one node or both; it holds the file /stale."""
    where = ["-w", node] if node else ["-N2", "--ntasks-per-node=1"]
    options = [f"--container-image={image}", f"--container-name={name}", f"--container-mounts={host_mounts()}"]
    cluster.run("srun", *where, *options, "--container-writable", "touch", "/stale", **cluster.identity)
    return f"pyxis_{name}"


def only_on(cluster, node: str, source: Path, folder: Path) -> Path:
    """A copy of a file or folder that the other node does not see; its path is the same for both."""
    folder.mkdir()
    script = 'mount -t tmpfs tmpfs "$1" && cp -r "$0" "$1"'
    cluster.run("srun", "-w", node, "bash", "-c", script, source, folder)
    return folder / source.name


def test_trials_reach_their_target_and_the_logs_are_on_the_host(whole, image):
    for k in (1, 2):
        assert whole.status(k) == "success"
        assert [e["value"] for e in whole.events(k) if e["key"] == "seed"] == [4 + k]
        assert whole.events(k)[0]["key"] == "cache_clear"
        assert f":::DLPAL {image} {whole.id} 2 n[1-2] " in (whole.logs / f"{whole.stem}_{k}.log").read_text()
        assert {f"rank_{rank}.log" for rank in range(4)} < {path.name for path in whole.trial(k).iterdir()}
    said = whole.said()
    assert len(re.findall("^compliance .*: SUCCESS$", said, re.MULTILINE)) == 2
    assert "2 of 2 trials ended with success" in said and "couldn't" not in said
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "this will not be submittable to the closed division" in warnings[0]
    assert {f"{whole.stem}_system.json", f"compliance_{whole.stem}.out"} < {path.name for path in whole.logs.iterdir()}


def test_every_step_says_which_container_it_wants(whole, inside, data, image):
    name = f"detector-{whole.id}"
    mounts = f"{whole.logs}:/results,{data}:{DATA}:ro,{inside['BACKBONE_DIR']}:{WEIGHTS}:ro,{inside['EXTRA_MOUNTS']}"
    ours = {
        "container-name": f"{name}:no_exec",
        "container-mounts": mounts,
        "container-workdir": "/workspace/ssd",
        **FLAGS,
    }
    steps = {}
    for line in records(whole.cluster.folder, whole.id):
        if line["step"] != "batch":
            steps.setdefault(line["step"], []).append(line)
    seen = []
    for number in sorted(steps):
        lines = sorted(steps[number], key=lambda line: line["rank"])
        argv, options = lines[0]["argv"], lines[0]["options"]
        nodes = [line["node"] for line in lines]
        assert all(line["argv"] == argv and line["options"] == options for line in lines)
        inner = argv[1:2] == ["XDG_CACHE_HOME=/results/.cache"]
        words = " ".join(Path(word).name if i == 0 else word for i, word in enumerate(argv[2 * inner :]))
        kind = words.split()[0] if words.startswith(("bash", "sh ")) else " ".join(words.split()[:2])
        assert not any(line["attached"] for line in lines)
        if kind in ("sync", "true drop") or (kind == "bash" and not inner):
            assert options == {} and nodes == ["n1", "n2"] and not any(line["entered"] for line in lines)
        elif kind == "sh":
            first = {"container-image": str(image), **ours, "container-workdir": "/"}
            assert options == first and all(line["cwd"] == "/" for line in lines) and nodes == ["n1", "n2"]
        else:
            assert options == ours
            wide = kind in ("python tools/preflight.py", "run_and_time.sh") and "--print-config" not in argv
            assert nodes == (["n1", "n1", "n2", "n2"] if wide else ["n1"])
        assert all(line["entered"] and line["cwd"] == "/workspace/ssd" for line in lines) or kind == "sh" or not options
        seen.append(kind)
    assert [kind for kind in seen if kind != "bash"] == [
        "sh", "python -c", "run_and_time.sh --print-config", "python tools/preflight.py", "true drop",
        *["sync", "true drop", "run_and_time.sh", "python tools/trials.py"] * 2, "python tools/trials.py",
    ]  # fmt: skip
    assert seen.count("bash") == 4, "two for the containers' end, one for GIT_COMMIT, one that waits with the table"


def test_its_containers_are_removed_and_no_others(whole, foreign):
    assert containers(whole.cluster) == {"n1": [foreign], "n2": [foreign]}


def test_enroot_reads_the_users_variables_and_none_of_ours(whole, exported):
    assert (exported["XDG_CACHE_HOME"] / "enroot").is_dir(), "the double hands it on, as Pyxis does"
    assert not exported["ENROOT_DATA_PATH"].exists() and not Path("/results").exists()
    assert (whole.logs / ".cache/detcore").is_dir() and not (exported["XDG_CACHE_HOME"] / "detcore").exists()


def test_messages_name_paths_of_the_host(whole):
    assert "/results" not in whole.said().replace(str(whole.logs), ""), whole.said()
    assert f"{whole.logs}/{whole.stem}_1/result_0.txt" in whole.said()
    assert "/results" not in (whole.logs / f"compliance_{whole.stem}.out").read_text()


def test_a_job_with_an_odd_name_and_a_stale_container_of_its_name_and_a_killed_rank(
    submit, cluster, image, inside, foreign
):
    last = int(cluster.run("srun", "bash", "-c", 'echo "$SLURM_JOB_ID"').stdout)
    stale = make_container(cluster, image, f"my_odd_job__1_____a_-{last + 2}", "n2")
    job = submit('--job-name=my odd,job: 1/$()"a"', **LONG, **inside)
    job.until_step()
    assert job.id == last + 2
    assert containers(cluster) == {"n1": [foreign, stale], "n2": [foreign, stale]}
    for rank in range(4):
        root = Path(f"/proc/{job.program(rank)}/root")
        assert (root / "etc/image").read_text() == "inside\n" and not (root / "stale").exists()
        for folder in (DATA, WEIGHTS, "/workspace/ssd"):
            with pytest.raises(OSError) as error:
                (root / folder[1:] / "x").touch()
            assert error.value.errno == errno.EROFS
        values = environment(job.program(rank))
        assert (values["FROM_IMAGE"], values["RANK"], values["LOCAL_RANK"]) == ("yes", str(rank), str(rank % 2))
        assert (values["MASTER_ADDR"], values["MASTER_PORT"]) == ("n1", str(61000 + job.id % 4536))
        assert values["DATASET_DIR"] == DATA and values["OUTPUT_DIR"] == f"/results/{job.stem}_1"
    os.kill(job.program(3), signal.SIGKILL)
    assert job.wait() == 137
    said = job.said()
    assert re.search(r"trial.*rank 3.*n2.*(SIGKILL|signal 9)", said), said
    assert job.status() == "aborted" and "0 of 1 trials" in said
    assert containers(cluster) == {"n1": [foreign], "n2": [foreign]}


@pytest.fixture(scope="module")
def cancelled(cluster, submit_for_module, foreign, inside):
    """Two jobs side by side that have been cancelled; the ranks of the second can't end before they are killed."""
    more = LONG | inside | {"NEXP": 2, "FROM_IMAGE": "no", "config": ONE_RANK}
    jobs = [submit_for_module(*SHARED, **more) for _ in range(2)]
    for job in jobs:
        job.until_step()
    slow = [jobs[1].program(rank) for rank in range(2)]
    cluster.run("scancel", *(job.id for job in jobs))
    while slow:  # again and again, because scancel lets stopped processes go on
        for pid in list(slow):
            try:
                os.kill(pid, signal.SIGSTOP)
            except ProcessLookupError:
                slow.remove(pid)
        time.sleep(0.002)
    for job in jobs:
        job.wait()
        assert cluster.job(job.id)["JobState"] == "CANCELLED"
    return jobs


def test_scancel_leaves_a_checkpoint_and_no_container(cancelled, cluster, foreign):
    job = cancelled[0]
    assert job.status() == "aborted" and (job.trial() / "last.pt").exists()
    assert "Stopped by SIGTERM" in job.rank(0)
    assert (
        "0 of 2 trials ended with success" in job.said() and "trial 1 was stopped; its checkpoint is in" in job.said()
    )
    assert "/results" not in job.said().replace(str(job.logs), ""), job.said()
    assert containers(cluster) == {"n1": [foreign], "n2": [foreign]}, job.said()


def test_containers_are_removed_also_where_ranks_do_not_end_before_they_are_killed(cancelled, cluster, foreign):
    assert "Stopped by SIGTERM" not in cancelled[1].rank(0)
    assert containers(cluster) == {"n1": [foreign], "n2": [foreign]}, cancelled[1].said()


def test_an_image_whose_login_shell_finds_no_python(submit, inside, tmp_path):
    job = submit(**inside | {"CONT": make_image(tmp_path / "debian.sqsh", python=False)})
    assert job.wait() == 2 and "/etc/profile.d" in job.said() and "activate" not in job.said(), job.said()


def test_an_older_pyxis_and_a_wrong_folder(submit_to, inside, image, tmp_path):
    with Cluster(tmp_path / "c", containers="0.20.0") as cluster:
        submit = submit_to(cluster)
        job = submit(**inside)
        assert (
            job.wait() == 2
            and "my logs holds a blank, which Pyxis can mount from 0.24 on; here it is 0.20" in job.said()
        )
        plain = tmp_path / "logs"
        plain.mkdir()
        os.chown(plain, USER.pw_uid, USER.pw_gid)
        weights = make_weights(tmp_path / "weights")
        data = tmp_path / "data"
        (data / "train").mkdir(parents=True)
        plain = {"LOGDIR": plain, "BACKBONE_DIR": weights, "DATADIR": data, "WORK_DIR": "/elsewhere"}
        job = submit(**inside | plain)
        assert job.wait() == 2, job.said()
        assert "holds no /elsewhere/run_and_time.sh" in job.said()
        cluster.run("srun", "-w", "n2", "mount", "--bind", "/dev/null", "/usr/local/bin/enroot")
        job = submit(**inside | plain)
        assert job.wait() == 2 and "enroot is not on PATH on n2" in job.said(), job.said()


@pytest.mark.parametrize(
    ("variable", "node"),
    [("CONT", None), ("CONT", "n1"), ("CONT", "n2"), ("EXTRA_MOUNTS", None), ("EXTRA_MOUNTS", "n1"), ("DATADIR", "n1")],
)
def test_what_a_node_lacks_is_named_before_any_trial(submit, cluster, image, inside, foreign, data, tmp_path, variable,
                                                     node):  # fmt: skip
    source = {"CONT": image, "EXTRA_MOUNTS": Path(shutil.__file__), "DATADIR": data}[variable]
    path = only_on(cluster, node, source, tmp_path / f"only {node}") if node else tmp_path / "no where"
    value = f"{inside['EXTRA_MOUNTS']},{path}:/more" if variable == "EXTRA_MOUNTS" else path
    job = submit(**inside | {variable: value})
    assert job.wait() == 2, job.said()
    said = job.said()
    assert str(path) in said and ("n2" if node == "n1" else "on n1") in said
    assert said.rstrip().endswith("no trial was started" if node == "n1" else "nothing was started")
    assert not any(job.logs.glob("*_1*")) and ":::MLLOG" not in said
    assert containers(cluster) == {"n1": [foreign], "n2": [foreign]}
