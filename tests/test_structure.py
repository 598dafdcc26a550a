"""The rules of CONTRIBUTING.md that a machine can check: who imports whom, device words, sizes, leftovers, paths."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path.parent.name for path in ROOT.glob("*/train.py"))
KNOW_DEVICES = {
    "detcore/device/base.py",
    "detcore/device/cuda.py",
    "detcore/device/native.py",
    "detcore/device/select.py",
    "detcore/device/tpu.py",
    "detcore/data/dali.py",
}
ROOMS = ("detection", "training", "nn", "ops", "device", "processes", "data", "evaluation")  # below them the ground
WRITTEN_BY_RUNS = (".venv", "build", "results")
LONG_FUNCTIONS = {"detcore/training/engine.py:train": 120}
PROGRAMS = ["detcore", *BENCHMARKS]
PACKAGES = [*PROGRAMS, "dataprep"]


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(*folders: str) -> list:
    return [pytest.param(path, id=name(path)) for path in files(*folders)]


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, also inside functions. Relative imports give the file's own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0]


def test_there_is_something_to_check():
    assert "single_stage_detector" in BENCHMARKS and len(files("detcore")) > 10 and len(files("tests")) > 10


@pytest.mark.parametrize("path", python(*PACKAGES))
def test_imports_go_to_detcore_only(path):
    """From a benchmark and from dataprep; detcore imports neither."""
    own = path.relative_to(ROOT).parts[0]
    allowed = {own} if own == "detcore" else {own, "detcore"}
    assert set(imported(path)) & {"tests", "tools", *PACKAGES} <= allowed


def module_name(path: Path) -> str:
    return name(path).removesuffix(".py").replace("/", ".")


@lru_cache
def known_modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in files(*PACKAGES, "tools"))


def modules(path: Path) -> Iterator[str]:
    """The modules of this repository that a file imports, also inside functions: detcore.data.view, not its names."""
    known = known_modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ({f"{node.module}.{alias.name}" for alias in node.names} | {node.module}) & known


def test_no_module_imports_itself_by_way_of_others():
    graph = {name(path).removesuffix(".py").replace("/", "."): set(modules(path)) for path in files(*PACKAGES)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def room(module: str) -> int:
    """How high a module of detcore lies; the ground (boxes, config, cli) below all rooms."""
    part = module.split(".")[1]
    return len(ROOMS) - ROOMS.index(part) if part in ROOMS else 0


@pytest.mark.parametrize("path", python("detcore"))
def test_a_room_imports_only_those_below_it(path):
    own = module_name(path)
    above = [module for module in modules(path) if module.startswith("detcore.") and room(module) > room(own)]
    assert above == []


def test_the_rooms_are_those_of_the_folder():
    assert {path.parent.name for path in (ROOT / "detcore").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("path", python(*PACKAGES))
def test_device_words_stay_in_their_files(path):
    if name(path) in KNOW_DEVICES:
        return
    text = path.read_text()
    if path.name in ("config.py", "records.py") and path.parent.name in BENCHMARKS:
        text = re.sub(r"--(no-)?cuda[a-z-]*|no cuda", "", text)  # flags of the original programs
    text = re.sub(r"nvidia-[a-z]+-cuda\d+", "", text)  # names of wheels
    lines = text.splitlines()
    assert [f"{i}: {line}" for i, line in enumerate(lines, 1) if re.search(r"cuda|xla|\.is_cuda", line)] == []


@pytest.mark.parametrize("path", python(*PACKAGES, "public-scripts", "tools"))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = LONG_FUNCTIONS.get(f"{name(path)}:{node.name}", 80)
            assert node.end_lineno - node.lineno + 1 <= limit, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", python(*PACKAGES, "public-scripts", "tests", "tools"))
def test_no_error_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: except without a class"
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"line {node.lineno}: except: pass"


TOOLS = ("tools/bench", "tools/compare_losses", "tools/gpu_check", "tools/preflight", "tools/submission")


@pytest.mark.parametrize("path", python(*PACKAGES, *TOOLS, "public-scripts", "tests/dataprep", "tests/tools/gpu_check"))
def test_the_search_path_is_left_alone(path):
    """Packages find each other from the checkout; run_module.py alone puts it on the path, for its scripts."""
    assert ("sys.path" in path.read_text()) == (name(path) == "public-scripts/run_module.py")


def test_no_notes_to_oneself():
    places = files(*PACKAGES, "tools", "tests", "configs", "public-scripts", suffixes=(".py", ".sh", ".md"))
    top = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".md", ".sh", ".toml", ".lock")]
    places += [*top, ROOT / "Makefile", ROOT / ".ci" / "run"]
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)))
    assert [name(path) for path in places if marks.search(path.read_text())] == []


def exists(path: str) -> bool:
    """Whether a path (or pattern) is in the repository; a bare file name also in a program's folder."""
    folders = [ROOT] if "/" in path else [ROOT, *(ROOT / package for package in PACKAGES)]
    if path in KNOW_DEVICES or path.startswith(WRITTEN_BY_RUNS):
        return True
    return any(next(folder.glob(path), None) for folder in folders)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_paths_in_the_text_exist(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    words = [word.rstrip("/") for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    words += [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
    named = re.compile(r"[\w.*-]+(/[\w.*-]+)+|[\w.*-]+\.(py|sh|md|toml|lock)")
    paths = {word for word in words if named.fullmatch(word)}
    assert len(paths) > 3
    assert sorted(path for path in paths if not exists(path)) == []


def test_the_tree_in_the_readme_is_the_repository():
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1].strip("\n").splitlines()
    missing, folder = [], ROOT
    for line in tree:
        words = line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = ROOT / words
            missing += [] if exists(words.rstrip("/")) else [words]
            continue
        for word in words.split(", "):
            candidates = (folder / word, folder / f"{word}.py")
            missing += [] if any(path.exists() for path in candidates) else [f"{name(folder)}/{word}"]
    assert missing == []
    told = {line.strip().split("  ")[0].rstrip("/") for line in tree if not line.startswith(" ")}
    assert told >= {*PACKAGES, "configs", "public-scripts", "tools", "tests"}


@pytest.mark.parametrize("path", python("tools/submission"))
def test_the_submission_tools_stay_light(path):
    """They import no benchmark but its table of public runs, and nothing of torch."""
    text = path.read_text().replace("from single_stage_detector import convergence", "")
    assert not re.search(r"^\s*(import|from) (torch|single_stage_detector|ssd300)\b", text, re.MULTILINE)


def test_no_tool_imports_itself_by_way_of_others():
    """Here a package's own file counts as well, since it may hold code."""
    known = known_modules()
    graph = {}
    for path in files("tools"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        ends = {end for start in found for end in (start, f"{start}.__init__")} & known
        graph[module_name(path)] = ends - {module_name(path)}  # a package's own file imports from the package
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


NAMES_A_BENCHMARK = re.compile(r"single_stage_detector|ssd300|retinanet|efficientdet|maskrcnn", re.IGNORECASE)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in sorted((ROOT / "tools/gpu_check").glob("*.py"))])
def test_the_core_of_gpu_check_names_no_benchmark(path):
    assert NAMES_A_BENCHMARK.findall(path.read_text()) == []


HELP = """
import runpy, sys
from contextlib import redirect_stdout
from io import StringIO
if sys.argv[1] == "without torch":
    sys.modules["torch"] = None  # its import fails
for module in sys.argv[2:]:
    sys.argv = [module, "--help"]
    said = StringIO()
    try:
        with redirect_stdout(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0 and "usage: " in said.getvalue(), module
"""


def help_of(*words: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tools_that_need_no_torch_start_without_it():
    single = ("gpu_check", "gpu_carry", "preflight", "compare_losses", "make_scenes", "make_openimages", "tpu_check")
    help_of("without torch", *(f"tools.{name}" for name in single))
    help_of("without torch", *(f"tools.bench.{name}" for name in ("evaluation", "index", "openimages", "shards")))
    for name in ("report", "trials", "package_results"):  # older names, also as modules; each becomes another process
        command = [sys.executable, "-m", f"tools.{name}", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_every_benchmark_says_what_it_does():
    help_of("with torch", *(f"tools.bench.{path.stem}" for path in files("tools/bench") if path.stem != "__init__"))


OLDER_NAMES = [
    path for path in sorted((ROOT / "tools").glob("*.py")) if "The older name of `python -m tools." in path.read_text()
]


@pytest.mark.parametrize("path", OLDER_NAMES, ids=lambda path: path.name)
def test_older_names_lead_to_the_module_of_that_name(path):
    module = re.search(r'^run\("(tools\.[\w.]+)"\)$', path.read_text(), re.MULTILINE)[1]
    assert module.removeprefix("tools.").replace("bench.", "bench_") == path.stem or ".submission." in module
    assert {module, f"{module}.__main__"} & (known_modules() - {module_name(path)})


def test_an_older_name_starts_from_anywhere(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name in ("gpu_check.py", "bench_index.py"):
        command = [sys.executable, ROOT / "tools" / name, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
