"""The dispatch rule: which implementation runs, what it says where it can't, and that torch.compile follows it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detcore import UserError
from detcore.device import native
from detcore.ops.normalize import OP, normalize

SCALE, SHIFT = torch.rand(3), torch.rand(3)
BUILT = pytest.mark.skipif(bool(native.load("detcore")), reason=native.load("detcore"))


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def policy():
    """Each test begins and ends with the rule `auto`."""
    with native.using("auto"):
        yield


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Another file as every program's library; the answers of the real one are forgotten meanwhile."""
    monkeypatch.setattr(native, "library_file", lambda program: tmp_path / "_kernels.so")
    native.load.cache_clear()
    yield tmp_path / "_kernels.so"
    native.load.cache_clear()


def test_an_unknown_rule_is_an_error():
    with pytest.raises(UserError, match="--ops fast: choose one of auto, reference, native"):
        native.choose("fast")


def test_variants_are_named_and_never_on_with_the_references():
    with pytest.raises(UserError, match="--variants fast: choose among merged_groups"):
        native.choose("auto", ["fast"])
    with native.using("auto", "stem"):
        assert native.variant("stem") and not native.variant("merged_groups")
        with native.using("reference", "stem"):
            assert not native.variant("stem")
        with native.using("auto"):
            assert not native.variant("stem")
        assert native.variant("stem")
    with pytest.raises(KeyError):
        native.variant("fast")


def test_using_restores_the_rule_also_after_an_error():
    with native.using("reference"), pytest.raises(ZeroDivisionError), native.using("native"):
        _ = 1 / 0
    assert native._policy == "auto"


@BUILT
def test_reference_never_runs_the_library():
    assert native.runs(OP, images(), SCALE)
    with native.using("reference"):
        assert not native.runs(OP, images(), SCALE)


@BUILT
@pytest.mark.parametrize(
    ("op", "tensors", "why"),
    [
        (OP, [torch.zeros(3, dtype=torch.float64)], r"no code for torch\.float64"),
        (OP, [torch.zeros(3), torch.zeros(3, device="meta")], "no code for tensors on meta"),
        ("detcore::unheard_of", [torch.zeros(3)], "has no op unheard_of"),
    ],
)
def test_native_says_why_it_can_not_run(op, tensors, why):
    assert not native.runs(op, *tensors)
    with native.using("native"), pytest.raises(UserError, match=f"--ops native: {op} can't run: .*{why}.*--ops auto"):
        native.runs(op, *tensors)


def test_a_library_that_is_not_built(library):
    assert not native.runs(OP, images())
    assert native.describe("detcore", torch.device("cpu")) == (
        f"ops: the PyTorch references, because {library} is not built (make ops)"
    )
    with native.using("native"), pytest.raises(UserError, match=r"is not built \(make ops\)"):
        native.runs(OP, images())


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library(library, content):
    library.write_bytes(content)
    assert not native.runs(OP, images())
    assert "can't be loaded" in (told := native.describe("detcore", torch.device("cpu"))) and "make ops" in told


@BUILT
@pytest.mark.parametrize("kept", [10, 63, 64, 4096, 0.5, 0.98])
def test_a_library_that_is_cut_off(library, kept):
    """Loading it would end the process by SIGBUS."""
    content = (native.ROOT / "detcore" / "_kernels.so").read_bytes()
    library.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert native.load("detcore") == f"{library} is cut off: build it again (make ops)"
    assert not native.runs(OP, images())


@BUILT
def test_a_library_of_another_program(library):
    """Loading it would define the other's ops a second time, which ends the process by SIGABRT."""
    library.write_bytes((native.ROOT / "detcore" / "_kernels.so").read_bytes())
    assert native.load("ssd300") == f"{library} is not the library of ssd300: build it again (make ops)"


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_a_library_of_another_torch_names_what_is_missing(library):
    source = library.with_suffix(".c")
    call = "int torch_of_tomorrow(void);\nint call(void) { return torch_of_tomorrow(); }\n"
    source.write_text(f'const char *program = "detcore";\n{call}')
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, source], check=True)
    assert "undefined symbol: torch_of_tomorrow" in native.load("detcore")
    assert f"built for another version of torch than {torch.__version__}" in native.load("detcore")


@BUILT
def test_describe(monkeypatch):
    cpu = torch.device("cpu")
    assert native.describe("detcore", cpu) == "ops: _kernels.so"
    with native.using("reference"):
        assert native.describe("detcore", cpu) == "ops: the PyTorch references (--ops reference)"
    monkeypatch.setattr(native, "has", lambda op, device: device == "cpu")
    file = native.library_file("detcore")
    assert native.describe("detcore", torch.device("cuda")) == (
        f"ops: WARNING, slower than the kernels: the PyTorch references, because {file} has no code for cuda: "
        "built without nvcc (make ops)"
    )


@BUILT
@pytest.mark.parametrize(("absent", "which"), [("detcore", "some of the"), ("ssd300", "some of the"), ("both", "the")])
def test_describe_tells_of_each_library(tmp_path, monkeypatch, absent, which):
    """A program's ops stand in its own library and in detcore's."""
    monkeypatch.setattr(
        native,
        "library_file",
        lambda program: native.ROOT.joinpath("nowhere" if absent in (program, "both") else "", program, "_kernels.so"),
    )
    native.load.cache_clear()
    told = native.describe("ssd300", torch.device("cpu"))
    native.load.cache_clear()
    first = "detcore" if absent == "detcore" else "ssd300"
    assert (
        told
        == f"ops: {which} PyTorch references, because {native.ROOT}/nowhere/{first}/_kernels.so is not built (make ops)"
    )


@BUILT
def test_a_program_without_kernels_has_those_of_detcore():
    assert native.libraries("maskrcnn") == ["detcore"] and native.libraries("ssd300") == ["ssd300", "detcore"]
    assert native.describe("maskrcnn", torch.device("cpu")) == "ops: _kernels.so"


@BUILT
@pytest.mark.parametrize("rule", ["auto", "native", "reference"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_through_the_rule(backend, rule):
    def step(x: Tensor) -> Tensor:
        return normalize(x, SCALE, SHIFT, torch.bfloat16).relu()

    torch.compiler.reset()
    seen = []

    def watch(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    with native.using(rule):
        x = images()
        found = torch.compile(step, fullgraph=True, backend=watch)(x)
        torch.testing.assert_close(found, step(x))
    assert any("detcore.normalize" in name for name in seen) == (rule != "reference")


@BUILT
def test_compile_follows_a_changed_rule():
    compiled = torch.compile(lambda x: normalize(x, SCALE, SHIFT, torch.float32) + 1, fullgraph=True, backend="eager")
    x = images()
    torch.compiler.reset()
    with native.using("reference"):
        first = compiled(x)
    torch.testing.assert_close(compiled(x), first)


def test_importing_the_package_needs_no_library():
    """The references serve a checkout in which nothing is built: seen in a process that can't find the libraries."""
    program = (
        "from pathlib import Path; from detcore.device import native;"
        "native.library_file = lambda name: Path('/nowhere');"
        "import torch; from detcore.ops.normalize import normalize;"
        "x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8);"
        "print(normalize(x, torch.ones(3), torch.ones(3), torch.float32).sum().item())"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, text=True, capture_output=True)
    assert done.stdout.strip() == "12.0", done.stderr


def test_an_op_of_a_newer_program_is_not_loaded():
    """A library from before the op's time does not stop the program from starting."""
    if native.load("detcore"):
        pytest.skip("not built")
    assert native.loaded("detcore::normalize") and not native.loaded("detcore::of_tomorrow")
    assert not native.runs("detcore::of_tomorrow", torch.zeros(1))
    assert not native.loaded("no_such_program::normalize")
