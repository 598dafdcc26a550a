"""The test double of Pyxis for cluster.py: compiling it, images for it, and what it recorded."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = "apt-get install -y --no-install-recommends gcc libc6-dev libslurm-dev squashfs-tools"
FOLDERS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")  # links into /usr on a merged-usr system


def require(*programs: str, packages: str) -> None:
    """A clear error where one is missing; these tests fail then, they aren't skipped."""
    missing = [
        name for name in programs if not shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not found: on Debian, as root: {packages}")


def install(folder: Path, link: Path, version: str) -> str:
    """Compiles the plugin into a cluster's folder, known to its daemons as `link`; the line of plugstack.conf."""
    require("gcc", packages=PACKAGES)
    command = ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", folder / "spank_pyxis.so"]
    command += [f'-DPYXIS_VERSION="{version}"']
    made = subprocess.run([*command, HERE / "spank_containers.c"], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"spank_containers.c: is libslurm-dev there ({PACKAGES})?\n{made.stderr}")
    shutil.copy2(HERE / "enroot", folder / "enroot")
    (folder / "containers").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    tool = folder / "bin" / "enroot"
    tool.unlink(missing_ok=True)
    tool.symlink_to(link / "enroot")
    record = folder / "containers.jsonl"
    record.touch()
    record.chmod(0o666)
    return f"required {link}/spank_pyxis.so {link} {link}/enroot\n"


def records(folder: Path, job: int | None = None) -> list[dict]:
    """What the plugin wrote for each task of every step: job, step, node, rank, argv, options, cwd, entered."""
    file = folder / "containers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if job in (None, line["job"])]


# As Debian's: a login shell forgets the PATH that the image sets.
PROFILE = """\
PATH="/usr/local/bin:/usr/bin:/bin"
for file in /etc/profile.d/*.sh; do
    if [ -r "$file" ]; then . "$file"; fi
done
export PATH
"""


def make_image(path: Path, environment: dict[str, str] | None = None, python: bool = True) -> Path:
    """A tiny .sqsh without programs of its own: with host_mounts() the machine's bash and this Python run in it.

    `environment` are the variables that the image sets, as ENV lines of a Dockerfile do. `python`: its profile.d puts
    this Python on the PATH of login shells; else only the image's PATH has it.
    """
    require("mksquashfs", packages=PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("dev", "etc/profile.d", "proc", "root", "run", "sys", "tmp", "usr", "var/tmp"):
            (root / name).mkdir(parents=True)
        for name in FOLDERS:
            if Path("/", name).is_symlink():
                (root / name).symlink_to(os.readlink(Path("/", name)))
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            if Path("/etc", name).exists():
                shutil.copy2(Path("/etc", name), root / "etc" / name)
        where = Path(sys.executable).parent
        (root / "etc/profile").write_text(PROFILE)
        if python:
            (root / "etc/profile.d/python.sh").write_text(f"PATH={where}:$PATH\n")
        environment = {"PATH": f"{where}:{os.environ['PATH']}"} | (environment or {})
        lines = [f"{name}={value}\n" for name, value in environment.items()]
        (root / "etc" / "environment").write_text("".join(lines))
        (root / "etc" / "image").write_text("inside\n")
        path.unlink(missing_ok=True)
        command = ["mksquashfs", root, path, "-quiet", "-no-progress", "-all-root", "-noappend"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def host_mounts() -> str:
    """Mounts, read-only, that put the machine's programs and this interpreter with its packages into make_image's."""
    wanted = [Path("/usr"), Path("/etc/alternatives")]
    wanted += [Path("/", name) for name in FOLDERS if Path("/", name).is_dir() and not Path("/", name).is_symlink()]
    for prefix in (Path(sys.prefix), Path(sys.base_prefix).resolve()):
        if not any(prefix.is_relative_to(folder) for folder in wanted):
            wanted.append(prefix)
    return ",".join(f"{folder}:{folder}:ro" for folder in wanted)
