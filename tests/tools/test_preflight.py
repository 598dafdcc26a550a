"""The preflight: alone in this process; worlds of real processes, of which some misbehave; under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from detcore import UserError
from detcore.cli import run_main
from detcore.data import manifest
from tools.preflight import __main__ as preflight
from tools.preflight import checks, team
from tools.preflight.summary import Summary

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180
SLEEP = "import time\nwhile True: time.sleep(3600)\n"
HANG = f"def hang(*_):\n    {SLEEP.replace(chr(10), chr(10) + '    ', 1)}\nteam.GRACE_S = 4.0\n"


def make_node(folder: Path, files: int = 3) -> Path:
    """A node's own disk: data with `files` files, and a folder for output."""
    (folder / "data/train").mkdir(parents=True)
    (folder / "out").mkdir()
    for i in range(files):
        (folder / f"data/train/{i}").write_bytes(bytes(9))
    return folder


@pytest.fixture
def alone(tmp_path, monkeypatch, capsys):
    """Calls the tool without a launcher; returns exit code, stdout, stderr."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MLPERF_")) or name in ("RANK", "WORLD_SIZE", "SYSTEM_DESCRIPTION"):
            monkeypatch.delenv(name)
    make_node(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = run_main(preflight.main, ["--device", "cpu", *words])
        return code, *capsys.readouterr()

    return call


def test_one_process_without_a_launcher(alone):
    words = ["--data", "data", "--backbone", "data/train", "--output", "out", "--ranks-per-node", "1"]
    code, out, err = alone(
        *words, "--write-manifest", "--verify", "full", "--json", "f.json", "--system-json", "s.json"
    )
    assert (code, err) == (0, "")
    assert "everything is in place" in out and "files and bytes as data/expected-mounts.csv says" in out
    figures = json.loads(Path("f.json").read_text())
    assert figures["problems"] == figures["warnings"] == [] and figures["free_output_gib"] > 0
    assert json.loads(Path("s.json").read_text())["number_of_nodes"] == "1"
    assert list(Path("out").iterdir()) == []
    assert alone("--bandwidth-mib", "0")[0] == 0  # nothing has to be given


def test_all_problems_at_once(alone):
    Path("file").write_text("x")
    Path("empty/.git").mkdir(parents=True)
    Path("empty/.git/x").write_text("x")
    Path("cut").mkdir()
    Path("cut/a").write_text("x")
    (Path("cut") / manifest.NAME).write_text("folder,files,bytes\n.,1,1\n" + "".join(f"d{i},2,2\n" for i in range(9)))
    options = "--data nowhere file empty data cut --backbone none --output file --verify quick --ranks-per-node 4"
    code, out, err = alone(*options.split(), "--min-shm-gib", "1e9", "--system-json", "s.json")
    assert (code, out) == (2, "")
    expected = (
        "--backbone none: No such file or directory",
        "--data nowhere: No such file or directory",
        "--data file: Not a directory",
        "--data empty holds no files",
        "--verify quick: data/expected-mounts.csv: no such manifest",
        "--data cut, folder d0: expected 2 files, found none",
        "--data cut: 4 more folders are not as cut/expected-mounts.csv says",
        "--output file can't be written: Not a directory",
        "/dev/shm has",
        "1 rank on ",
    )
    lines = err.splitlines()
    assert f"found {len(lines) - 1} problems" in lines[0] and len(lines) - 1 == len(expected) + 4
    for words in expected:
        assert sum(words in line for line in lines) == 1, (words, err)
    assert all(line.startswith("  rank 0 on ") for line in lines[1:])
    assert not Path("s.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--timeout 0", "--min-free-gib -1", "--max-clock-skew nan", "--verify quick", "--write-manifest",
        "--manifest m --data a b", "--ranks-per-node 0", "--verify some",
    ],
)  # fmt: skip
def test_options_that_make_no_sense(alone, words):
    with pytest.raises(SystemExit) as error:
        alone(*words.split())
    assert error.value.code == 2


def test_files_that_cannot_be_written(alone):
    code, _, err = alone("--json", "nowhere/f.json", "--system-json", "nowhere/s.json")
    assert code == 2 and "--json nowhere/f.json can't be written: No such file" in err
    assert "nowhere/s.json can't be written: No such file" in err
    Path("values.json").write_text('{"colling": "air"}')
    code, _, err = alone("--system-json", "s.json", "--values", "values.json")
    assert code == 2 and "no field 'colling', did you mean 'cooling'?" in err


def test_a_full_and_a_read_only_file_system(alone, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        code, _, err = alone("--output", "small")
        assert code == 2 and "--output small has 0.00 GiB free, --min-free-gib wants 1: free space" in err
        assert alone("--output", "small", "--min-free-gib", "0")[0] == 0
        (place / "x").write_bytes(bytes(2**20))
        code, _, err = alone("--output", "small", "--min-free-gib", "0")
        assert code == 2 and "--output small can't be written: No space left on device; free space there" in err
        assert [path.name for path in place.iterdir()] == ["x"]
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        code, _, err = alone("--output", "small", "--min-free-gib", "0")
        assert code == 2 and "--output small can't be written: Read-only file system" in err
    finally:
        subprocess.run(["umount", place], check=True)


def test_gpus_are_demanded(alone, monkeypatch):
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    code, _, err = alone("--device", "auto")
    assert code == 2 and "sees 0 GPUs for 1 ranks" in err and "--device cpu" in err


def told(gpu: tuple[str, str, int] | None = None, **facts) -> dict:
    """A rank's report, as it travels."""
    if gpu:
        facts["gpu"] = dict(zip(("name", "id", "visible"), gpu))
    return {"problems": [], "warnings": [], "facts": {"versions": {"torch": "2"}, **facts}}


def summary_of(hosts: list[str], reports: list[dict]):
    ours = SimpleNamespace(world=SimpleNamespace(size=len(hosts), rank=0), hosts=hosts, silent={}, timeout_s=1)
    summary = Summary(ours)
    summary.take_reports(dict(enumerate(reports)), None)
    return summary


def test_gpus_of_ranks():
    # One GPU visible to each of several ranks is right, as long as it is not the same one.
    hosts = ["n1", "n1", "n2", "n2"]
    summary = summary_of(hosts, [told(("H100", name, 1)) for name in "abab"])
    assert summary.problems == summary.warnings == {} and summary.all_have_gpus
    summary = summary_of(hosts, [told(("H100", name, 1)) for name in "abcc"])
    assert [(words[:40], who) for words, who in summary.problems.items()] == [
        ("ranks 2, 3 on n2 got the same GPU (c): g", {2, 3})
    ]
    gpus = [("H100", "a", 4), ("H100", "b", 4), ("A100", "c", 2), ("A100", "d", 2)]
    summary = summary_of(hosts, [told(gpu) for gpu in gpus])
    assert summary.problems == {}
    assert summary.warnings == {
        "4 GPUs for 2 ranks: the rest stays idle": {0, 1},
        "not the same everywhere: GPU H100": {0, 1},
        "not the same everywhere: GPU A100": {2, 3},
    }
    assert not summary_of(hosts, [told(("H100", "a", 1))] * 3 + [told()]).all_have_gpus


def test_bandwidth_formula_and_clock_limits():
    summary = summary_of(["n1", "n1", "n2", "n2"], [told(free_shm_gib=3.0)] * 4)
    figures = {"bytes": 26_214_400, "backend": "nccl", "dtype": "float16", "seconds": 0.001}
    clocks = {"0": [0, 0], "2": [-1.25, 0.25]}  # may be 1 s: not too much
    results = {rank: {"clocks": {}, "reduce": {**figures, "seconds": 0.001 * (rank + 1)}} for rank in range(4)}
    results[0]["clocks"] = clocks
    summary.take_measured(results, 1.0)
    assert summary.problems == {}
    # The slowest rank counts: 4 ms; 2(n-1)/n = 1.5 for four ranks.
    assert summary._reduce["algorithm_gb_s"] == pytest.approx(6.5536) and summary._reduce["bus_gb_s"] == pytest.approx(
        9.8304
    )
    table = summary._table()
    assert "26,214,400 bytes of float16 over nccl, 4 ranks, sums right: 4.000 ms" in table
    assert "at most 1250.000 ms apart (± 250.000 ms, n2)" in table
    summary.take_measured(results, 0.999)
    (words,) = summary.problems
    assert words.startswith("the clock of n2 is 1.250 s (± 0.250 s) behind that of n1, --max-clock-skew allows 0.999 s")


def test_ranks_in_words():
    assert [team.ranks(r) for r in ([3], [0, 1], range(4), [7, 0, 1, 2, 5, 6])] == [
        "rank 3",
        "ranks 0, 1",
        "ranks 0-3",
        "ranks 0-2, 5, 6, 7".replace("5, 6, 7", "5-7"),
    ]
    names = summary_of([f"n{i // 2}" for i in range(40)], [])._names(range(1, 40))
    assert names.startswith("rank 1 on n0, ranks 2, 3 on n1, ") and names.endswith("and on 12 more nodes")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """All the worlds, run at once: exit codes and the folder of what was said."""
    folder = tmp_path_factory.mktemp("worlds")
    shared, own = make_node(folder / "shared"), make_node(folder / "own", files=2)
    manifest.write(shared / "data", folder / "m.csv")
    stuck = [[node, str(make_node(folder / f"stuck_{node}"))] for node in ("n1", "n2")]
    base = ["--device", "cpu", "--bandwidth-mib", "0.5", "--timeout"]
    paths = ["--data", "data", "--output", "out", "--verify", "full", "--manifest", str(folder / "m.csv")]
    good, other = str(shared), str(own)
    says = [["n1", good], ["n1", good], ["n2", good], ["n2", good]]

    def world(places: list[list[str]], *options: str, timeout: int = 60, codes: dict[int, str] | None = None) -> list:
        return [[*p, (codes or {}).get(r, ""), [*base, str(timeout), *options]] for r, p in enumerate(places)]

    files = ["--json", str(folder / "f.json"), "--system-json", str(folder / "s.json"), "--ranks-per-node", "2"]
    pair = [["n1", good], ["n2", good]]
    late = (
        "import time\nfrom types import SimpleNamespace\nteam.time = SimpleNamespace(**{n: getattr(time, n) for n in "
    )
    late += "('monotonic', 'sleep')}, time=lambda: time.time() + 5)"
    zero = "old = checks._sum\ndef bad(tensor, *rest):\n    tensor.zero_()\n    old(tensor, *rest)\nchecks._sum = bad"
    settings = {
        "good": world(says, *paths, *files),
        "apart": world([["n1", good], ["n2", other]], *paths, "--ranks-per-node", "2", codes={1: late}),
        "clock": world(pair, codes={1: late}),
        "sum": world([*says[:3], ["n3", good]], codes={3: zero}),
        "missing": world([["n1", good], ["n2", good], ["", ""]], timeout=3),
        "no_rank0": world([["", ""], ["n2", good]], timeout=3),
        "dies": world(pair, timeout=3, codes={1: "job.look = lambda *_: os._exit(9)"}),
        "dies_later": world(pair, timeout=5, codes={1: "checks.all_reduce = lambda *_: os._exit(9)"}),
        "hangs": world(pair, *paths, timeout=3, codes={1: HANG + "checks._check_readable = hang"}),
        "rank0_dies": world(pair, timeout=3, codes={0: "job.look = lambda *_: os._exit(9)"}),
        "rank0_hangs": world(stuck, *paths, timeout=2, codes={
            0: HANG + "checks._check_readable = hang", 1: HANG}),
    }  # fmt: skip
    (folder / "worlds.json").write_text(json.dumps(settings))
    program = [sys.executable, "-m", "tests.tools.preflight_worlds", str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())

    def tell(name: str) -> tuple[list, list[str]]:
        count = len(settings[name])
        texts = [[folder / f"{name}.{rank}.{end}" for end in ("out", "err")] for rank in range(count)]
        return codes[name], ["".join(p.read_text() for p in pair if p.exists()) for pair in texts]

    return SimpleNamespace(tell=tell, folder=folder)


def test_two_nodes_in_order(worlds):
    codes, texts = worlds.tell("good")
    assert codes == [0] * 4, texts
    assert texts[1:] == [""] * 3
    for words in (
        "nodes       2: n1, n2",
        "ranks       4, 2 a node",
        "ms apart (± ",
        "files and bytes as ",
        "sums right",
    ):
        assert words in texts[0]
    figures = json.loads((worlds.folder / "f.json").read_text())
    assert figures["problems"] == figures["warnings"] == []
    assert figures["all_reduce"]["bytes"] == 2**19 and figures["all_reduce"]["ranks"] == 4
    speed = figures["all_reduce"]
    assert speed["bus_gb_s"] == pytest.approx(1.5 * speed["algorithm_gb_s"])
    node = figures["nodes"]["n2"]
    assert node["ranks"] == [2, 3] and abs(node["clock_ahead_s"]) <= node["clock_uncertainty_s"]
    assert json.loads((worlds.folder / "s.json").read_text())["number_of_nodes"] == "2"
    assert list((worlds.folder / "shared/out").iterdir()) == []


def test_nodes_that_see_other_folders(worlds):
    codes, texts = worlds.tell("apart")
    assert codes == [2, 2] and texts[1] == ""
    lines = texts[0].splitlines()
    assert "found 5 problems" in lines[0]
    for words in (
        "  rank 1 on n2: --output out is not the one of n1",
        "  rank 1 on n2: --data data, folder train: expected 3 files, 27 bytes, found 2 files, 18 bytes",
        "  rank 0 on n1: 1 rank on n1, --ranks-per-node wants 2",
        "  rank 1 on n2: 1 rank on n2, --ranks-per-node wants 2",
        "  rank 1 on n2: the clock of n2 is 5.0",
    ):
        assert sum(line.startswith(words) for line in lines) == 1, (words, texts[0])
    assert list((worlds.folder / "own/out").iterdir()) == []


def test_clocks_out_of_step(worlds):
    codes, texts = worlds.tell("clock")
    assert codes == [2, 2] and "found 1 problem;" in texts[0]
    assert "rank 1 on n2: the clock of n2 is 5.0" in texts[0] and "ahead of that of n1" in texts[0]


def test_a_wrong_sum_names_the_ranks(worlds):
    codes, texts = worlds.tell("sum")
    assert codes == [2] * 4 and "found 1 problem;" in texts[0]
    assert "ranks 0, 1 on n1, rank 2 on n2, rank 3 on n3: the all-reduce over gloo gave a wrong sum" in texts[0]
    assert "which lack what rank 3 sent" in texts[0]


def test_ranks_that_do_not_come(worlds):
    codes, texts = worlds.tell("missing")
    assert codes == [2, 2, None] and texts[1] == ""
    assert "error: 1 of 3 ranks did not come to 127.0.0.1:" in texts[0] and len(texts[0].splitlines()) == 1
    assert "within 3 s: rank 2; there are ranks 0, 1 on n1, n2. " in texts[0]
    codes, texts = worlds.tell("no_rank0")
    assert codes == [None, 2]
    assert "error: rank 1 of 2 on n2 can't meet the others at 127.0.0.1:" in texts[1]
    assert "was rank 0 started there" in texts[1]


@pytest.mark.parametrize(
    ("name", "codes", "doing"),
    [
        ("dies", [2, 9], "joining"),
        ("dies_later", [2, 9], "an all-reduce of 0.5 MiB"),
        ("hangs", [2, 2], "reading --data data"),
    ],
)
def test_ranks_that_stop(worlds, name, codes, doing):
    found, texts = worlds.tell(name)
    assert found == codes, texts
    assert "  rank 1 on n2: no answer for " in texts[0] and f"last seen {doing}: " in texts[0]
    if name == "hangs":
        assert "rank 1 on n2 stands still for 7 s (reading --data data)" in texts[1]


def test_rank_0_that_stops(worlds):
    codes, texts = worlds.tell("rank0_dies")
    assert codes == [9, 2] and "error: rank 1 on n2: rank 0 " in texts[1] and "is gone; its" in texts[1]
    codes, texts = worlds.tell("rank0_hangs")
    assert codes == [2, 2]
    assert "rank 0 on n1: rank 0 on n1 stands still for 6 s (reading --data data)" in texts[0]
    assert "rank 1 on n2" in texts[1] and "Traceback" not in texts[1]


def test_torchrun_starts_it(tmp_path):
    make_node(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tools/preflight.py"), "--device", "cpu", "--ranks-per-node", "2", "--bandwidth-mib", "1"]
    done = subprocess.run(
        [*command, "--data", "data", "--output", "out"], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "1,048,576 bytes of float32 over gloo, 2 ranks, sums right" in done.stdout


def test_bad_launcher_variables():
    with pytest.raises(UserError, match="WORLD_SIZE missing"):
        team.join(1, {"RANK": "0", "LOCAL_RANK": "0"})


def test_misspelt_variables_of_the_launchers(alone, monkeypatch):
    known = preflight.launcher_variables()
    assert {"CLEAR_CACHES", "DATADIR", "LOGDIR", "VERIFY_MOUNTS", "MLPERF_RULESET"} <= known
    assert not {name for name in known if name.startswith(("SLURM", "BASH", "OMPI"))}
    for name in ("SLURM_JOB_UID", "SLURM_JOB_NODES", "OMPI_COMM_WORLD_NODE_RANK", "VIRTUAL_ENV_PROMPT"):
        monkeypatch.setenv(name, "1")  # others' variables, near those that the scripts read
    assert alone()[0] == 0
    monkeypatch.setenv("CLEAR_CACHE", "0")
    code, _, err = alone()
    assert code == 2 and "CLEAR_CACHE='0' is not known: did you mean CLEAR_CACHES?" in err
