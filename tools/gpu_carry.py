"""What a GPU machine without a network lacks, in one folder to take along with the checkout.

    python -m tools.gpu_carry [DIR] [--data DIR] [--packages NAME,...] [--limit 64]

DIR, by default build/carry, gets wheels of the packages that such a machine lacks (Python 3.12, x86-64, the versions of
requirements.lock), every program's library compiled here for compute capability 9.0 (H100, H200) with a hash of its
sources, and the data set bccd. Git ignores it. There one command starts it all:

    python3 -m tools.gpu_check --out results/gpu --carried build/carry

The last lines of what is printed are those to go on with there. The libraries serve torch 2.11 to 2.15 (stable ABI) and
need no more of glibc and libstdc++ than Ubuntu 24.04 has. They are used while csrc/ and setup.py are what they were
built from; nothing is compiled there then. Exit code 1, with a line that says why, if something can't be had or DIR and
the files of the checkout together pass --limit MiB.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "carry.json"
"""In DIR: {sources: hash, code: hash, architectures, libraries: {program: hash}, commit}."""
NEEDED = ("torchvision", "numpy", "PIL", "mlperf_logging", "msgspec", "pycocotools", "pytest", "hypothesis")
"""Modules that parts of gpu_check import, beside torch."""
PACKAGES = ("mlperf-logging", "msgspec", "pycocotools", "hotcoco")
"""Those that a machine for computing with PyTorch lacks; their own needs it has."""
ARCHITECTURES = "9.0"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64")  # fmt: skip
SYSTEM = {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)}
"""Newest versions of symbols in Ubuntu 24.04."""


class CarryError(Exception):
    """What can't be had, and what to do."""


def programs() -> list[str]:
    return sorted(folder.parent.name for folder in ROOT.glob("*/csrc"))


def library(program: str) -> Path:
    return ROOT / program / "_kernels.so"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def hash_of(files: Iterable[Path]) -> str:
    """Of names in the checkout and contents."""
    found = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        found.update(f"{file.relative_to(ROOT)} {sha256(file)}\n".encode())
    return found.hexdigest()


def sources_hash() -> str:
    """Of all that the libraries are made of."""
    return hash_of([ROOT / "setup.py", *ROOT.glob("*/csrc/*")])


def code_hash() -> str:
    """Of all that a check runs."""
    folders = ("tools", "tests", *(file.parent.name for file in ROOT.glob("*/__init__.py")))
    return hash_of([ROOT / "setup.py", *ROOT.glob("*/csrc/*"), *(f for d in folders for f in (ROOT / d).rglob("*.py"))])


def commit(carried: Path) -> str:
    """The commit that was carried, for a checkout without git; with a mark of its own where the code is another one."""
    known, code = manifest(carried), code_hash()
    return known["commit"] + ("" if known["code"] == code else f"+{code[:8]}")


def manifest(carried: Path) -> dict:
    return json.loads((carried / NAME).read_text(encoding="utf-8"))


def data(carried: Path) -> Path | None:
    """The folder of bccd among what was carried; None if it was left out."""
    folder = carried / "bccd"
    return folder if folder.is_dir() else None


def put_in_place(carried: Path, work: Path) -> tuple[Path, list[str]]:
    """Unpacks the wheels below the work folder and copies the libraries to their programs if they fit the sources.

    Returns the folder of packages and lines that say what was done. A library that is there already is not touched; a
    new one is younger than its sources, so that no test builds it again.
    """
    site, wheels = work / "site", sorted(carried.glob("wheels/*.whl"))
    mark, want = site / "wheels.txt", "\n".join(wheel.name for wheel in wheels)
    said = []
    if wheels and not (mark.is_file() and mark.read_text() == want):
        shutil.rmtree(site, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *map(str, wheels)]
        installed = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if installed.returncode:
            said.append(f"the carried wheels can't be installed: {installed.stdout.strip()[-400:]}")
        else:
            mark.write_text(want)
    if manifest(carried)["sources"] != sources_hash():
        return site, [*said, "the carried libraries are of other sources (csrc/, setup.py): they are compiled here"]
    for program, wanted in manifest(carried)["libraries"].items():
        if not library(program).is_file() or sha256(library(program)) != wanted:
            library(program).unlink(missing_ok=True)  # a process may have the old one in use
            shutil.copyfile(carried / "libraries" / program / "_kernels.so", library(program))
        os.utime(library(program))
    return site, said


def in_place(carried: Path) -> str:
    """ "" if every program's library is the carried one and fits the sources, else the reason why not."""
    known = manifest(carried)
    if known["sources"] != sources_hash():
        return "the carried libraries are of other sources"
    other = [p for p in programs() if not library(p).is_file() or sha256(library(p)) != known["libraries"].get(p)]
    return f"{', '.join(other)}: not the carried library" if other else ""


def run(command: list[str], what: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise CarryError(
            f"{what}: {' '.join(command[:6])} ... ended with code {done.returncode}:\n{done.stdout[-1500:]}"
        )
    return done.stdout


def get_wheels(folder: Path, packages: list[str]) -> None:
    """Wheels for Python 3.12; of a package without any one is built here, which serves if it is pure Python."""
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for name in packages:
        wanted = f"{name}=={locked[name]}" if name in locked else name
        command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
        command += ["--implementation", "cp", *(word for platform in PLATFORMS for word in ("--platform", platform))]
        try:
            run([*command, "--dest", str(folder), wanted], wanted)
        except CarryError:
            run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), wanted], wanted)
            if not list(folder.glob(f"{name.replace('-', '_')}-*-none-any.whl")):
                raise CarryError(f"{wanted}: no wheel for Python 3.12, and not pure Python: leave it out") from None


def compile_libraries(folder: Path) -> dict[str, str]:
    """The programs' libraries below the folder; their hashes by program."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", str(ROOT / "build" / "carry_objects")]
    said = run(command, "the libraries", TORCH_CUDA_ARCH_LIST=ARCHITECTURES)
    found = {}
    for program in programs():
        file = folder / program / "_kernels.so"
        if b".nv_fatbin" not in file.read_bytes():
            lines = [line for line in said.splitlines() if line.startswith("setup.py: ")]
            raise CarryError(f"{program}: no code for GPUs was built; {' '.join(lines)}")
        if too_new := newer_symbols(file.read_bytes()):
            raise CarryError(f"{file} needs {', '.join(too_new)}, which Ubuntu 24.04 lacks: build on an older system")
        found[program] = sha256(file)
    return found


def newer_symbols(content: bytes) -> list[str]:
    """Versions of the C and C++ libraries' symbols in a library that SYSTEM does not have."""
    found = set(re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_(\d[\d.]*)(?=\0)", content))
    versions = [(name.decode(), tuple(map(int, version.decode().split(".")))) for name, version in found]
    return sorted(f"{name}_{'.'.join(map(str, version))}" for name, version in versions if version > SYSTEM[name])


def size(files: list[Path]) -> float:
    """In MiB."""
    return sum(file.lstat().st_size for file in files) / 2**20


def prepare(folder: Path, data_set: Path | None, packages: list[str], limit: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("wheels", "libraries", "bccd"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "wheels").mkdir()
    print(f"wheels for Python 3.12: {', '.join(packages)}", flush=True)
    get_wheels(folder / "wheels", packages)
    print(f"libraries for compute capability {ARCHITECTURES}: compiling takes about two minutes", flush=True)
    libraries = compile_libraries(folder / "libraries")
    if data_set:
        print(f"the data set bccd: copied from {data_set}", flush=True)
        shutil.copytree(data_set, folder / "bccd")
    else:
        print("bccd is not at shared/data/bccd and --data was not given: left out, and the part bccd will be skipped")
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    about = {"sources": sources_hash(), "code": code_hash(), "architectures": ARCHITECTURES, "libraries": libraries}
    about["commit"] = run(git, "git").strip()
    (folder / NAME).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], "git").split("\0")
    tree = size([ROOT / name for name in listed if name and os.path.lexists(ROOT / name)])
    sizes = {
        name: size([f for f in (folder / name).rglob("*") if f.is_file()]) for name in ("wheels", "libraries", "bccd")
    }
    told = ", ".join(f"{name} {mib:.1f}" for name, mib in sizes.items())
    print(
        f"{folder}: {told} MiB; with the checkout's {tree:.1f} MiB: {tree + sum(sizes.values()):.1f} of {limit:g} MiB"
    )
    if tree + sum(sizes.values()) > limit:
        raise CarryError(f"that is more than {limit:g} MiB: leave something out (--data, --packages)")
    print(what_next(folder))


def what_next(folder: Path) -> str:
    """What to copy to the other machine, and the commands there."""
    inside = folder.is_relative_to(ROOT)
    there = folder.relative_to(ROOT) if inside else Path("build") / "carry"
    command = f"python3 -m tools.gpu_check --out results/gpu --carried {there}"
    return f"""Copy the checkout, and {folder}, which git does not list, to {there} in it. There, in the checkout:
    {command}
After the first call, or with its gpu_check.json on another machine:
    {command} --go-on gpu_check.json"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.gpu_carry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "carry")
    parser.add_argument("--data", type=Path, help="the data set bccd, where it is not at shared/data/bccd")
    parser.add_argument("--packages", default=",".join(PACKAGES), help="that the machine lacks")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB of the folder and the checkout's files together")
    options = parser.parse_args(argv)
    places = [options.data] if options.data else [ROOT / "shared/data/bccd", ROOT.parent / "shared/data/bccd"]
    found = next((place for place in places if (place / "annotations" / "instances_train.json").is_file()), None)
    if options.data and not found:
        parser.error(f"--data {options.data}: no annotations/instances_train.json in it")
    try:
        prepare(options.folder.resolve(), found, options.packages.split(","), options.limit)
    except CarryError as error:
        print(f"gpu_carry: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
