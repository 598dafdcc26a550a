"""tools/package_results.py: what the official checkers accept comes out, anything else leaves nothing behind."""

import json

import pytest

from detcore import UserError

OPTIONS = {"--org": "us", "--system": "box"}


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("package_results")


@pytest.fixture
def description(tool, tmp_path):
    fields = dict.fromkeys(tool.FIELDS, "x") | {"submitter": "us", "division": "closed"}
    fields |= {"status": "Available on-premise", "system_name": "box", "other_software_stack": {"torch": "2"}}
    path = tmp_path / "s_system.json"

    def write(**changes):
        path.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v is not None}))
        return path

    write()
    return write


@pytest.fixture
def logs(tmp_path, write_log):
    """logs({i: options}): five logs of a job with stamp s, log i changed."""

    def write(changes=None, count=5, **all_of_them):
        paths = []
        for i in range(count):
            options = {"seed": 10 + i, "minutes": 30 + i} | all_of_them | (changes or {}).get(i, {})
            paths.append(write_log(tmp_path / f"s_{i + 1}" / f"result_{i}.txt", **options))
        return paths

    return write


@pytest.fixture
def pack(tool, tmp_path, description, capsys):
    """pack(...) -> (exit code or the error's text, what was printed and complained)."""

    def call(*words, **options):
        flags = {"--logdir": tmp_path, "--stamp": "s", "--out": tmp_path / "out"} | OPTIONS | options
        flat = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        capsys.readouterr()
        try:
            code = tool.main([*flat, *map(str, words)])
        except UserError as error:
            code = str(error)
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return call


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


EXPECTED = [*(f"us/results/box/retinanet/result_{i}.txt" for i in range(5)), "us/systems/box.json"]


def test_five_good_logs(pack, logs, tmp_path):
    given = logs()
    code, said = pack()
    assert code == 0 and "olympic mean: 32.000 minutes" in said and "warning" not in said
    assert tree(tmp_path / "out") == EXPECTED
    for i, path in enumerate(given):
        assert (tmp_path / "out" / EXPECTED[i]).read_bytes() == path.read_bytes()


def test_logs_named_one_by_one_keep_their_order(pack, logs, tmp_path):
    given = logs()[::-1]
    alone = {"--logdir": None, "--stamp": None}
    assert "--system-json is missing" in pack(*given, **alone)[0]
    code, _ = pack(*given, **alone, **{"--system-json": tmp_path / "s_system.json"})
    assert code == 0 and (tmp_path / "out" / EXPECTED[0]).read_bytes() == given[0].read_bytes()
    assert "either five logs" in pack(*given)[0] and "either five logs" in pack(**alone)[0]
    assert "no such log: " in pack(tmp_path / "none", **alone)[0]


@pytest.mark.parametrize("count", [0, 4, 6])
def test_not_five(pack, logs, tmp_path, count):
    logs(count=count)
    code, _ = pack()
    assert f"{count} logs" in code and "exactly 5" in code and not (tmp_path / "out").exists()


MISSED = {"status": "aborted", "metric": 0.3}


def test_one_run_may_miss_the_target_but_not_two(pack, logs, tmp_path):
    logs({2: MISSED})
    code, said = pack()
    assert code == 0 and "trial 3 does not count and is taken as the slowest" in said
    assert "33.000" not in said and "olympic mean: 32.667 minutes" in said  # of 30 31 33 34: all but 30
    logs({2: MISSED, 4: MISSED})
    code, said = pack("--force")
    assert "nothing was written" in code and "more than one run did not reach the target" in said


def test_refused_logs_are_all_named(pack, logs, tmp_path):
    no_cache_clear = {"leave_out": ("cache_clear",)}
    paths = logs({0: {"seed": 11}, 1: no_cache_clear, 2: {"leave_out": ("seed",)}, 3: MISSED | no_cache_clear})
    code, said = pack()
    assert code.startswith("4 problems") and "nothing was written" in code and not (tmp_path / "out").exists()
    assert f"{paths[1]} has seed 11, as has {paths[0]}" in said and f"{paths[2]} logs no seed" in said
    assert said.count("'cache_clear' but found 0") == 2
    paths = logs({0: {"status": None}, 1: {"metric": 0.3}, 2: {"benchmark": "ssd"}})
    code, said = pack()
    assert code.startswith("4 problems") and "'run_stop' but found 0" in said and "no rules for ssd" in said
    assert f"{paths[1]}, ruleset 5.1.0: FAILED: Failed checks for eval_accuracy" in said


def test_logs_of_different_runs_are_refused(pack, logs):
    logs({1: {"gbs": 512}, 2: {"platform": "2xDGXH100"}, 3: {"division": "open"}})
    code, said = pack()
    assert code.startswith("3 problems") and "differ in global_batch_size: 256 in" in said
    assert "differ in submission_platform" in said and "differ in submission_division" in said


def test_a_resumed_run_is_refused(pack, logs, write_log, tmp_path):
    paths = logs({1: {"status": "aborted"}})
    write_log(paths[1], append=True)
    assert "the run was resumed" in pack()[1]


def test_every_problem_is_named_at_once(pack, logs, description, tmp_path):
    logs({1: {"seed": 10}}, org="them")
    description(cooling="FILL IN: air or liquid", accelerators_per_node=8, hw_notes=None, division="open",
                other_software_stack={"driver": "FILL IN: its version"}, status="Preview")  # fmt: skip
    code, said = pack(**{"--benchmark": "ssd"})
    assert code.startswith("9 problems")
    for words in (
        "cooling is still to fill in: air or liquid", "other_software_stack is still to fill in: its version",
        'text: "8"', "hw_notes is missing", "division is 'open', but 'closed' by the logs", "has seed 10",
        "--org is 'us', but the logs say submission_org 'them'", "--benchmark is 'ssd', but the logs say",
        "status is 'Preview', but 'Available on-premise'",
    ):  # fmt: skip
        assert words in said


def test_refused_descriptions(pack, logs, description, tmp_path):
    logs()
    description(status="Sold")
    assert "status is 'Sold'" in pack()[1]
    description(host_processor_model_name=7)
    assert "the official system description checker refuses it" in pack()[1]
    (tmp_path / "s_system.json").write_text("[]")
    assert "no JSON object" in pack()[0]
    (tmp_path / "s_system.json").write_text("{")
    assert "no JSON (" in pack()[0]
    (tmp_path / "s_system.json").unlink()
    assert "No such file" in pack()[0]


@pytest.mark.parametrize("options", [{"--org": "a b"}, {"--system": ".x"}, {"--system": "../x"}, {"--ruleset": "9"}])
def test_refused_names(pack, logs, options):
    logs()
    assert next(iter(options)) in pack(**options)[0]


def test_convergence_is_compared_with_the_reference(pack, logs, tmp_path):
    logs(epochs=3)
    code, _ = pack()
    assert "official package checker refuses" in code and "RCP" in code and tree(tmp_path / "out") == []
    logs(gbs=8192)
    assert "RCP" in pack()[0]
    code, _ = pack("--rcp-bypass")
    assert code == 0 and tree(tmp_path / "out") == EXPECTED


def test_open_division(pack, logs, description, tmp_path):
    logs(division="open", gbs=8, epochs=2, metric=0.2)
    description(division="open")
    assert pack()[0] == 0 and tree(tmp_path / "out") == EXPECTED


def test_an_earlier_package_is_replaced_by_force_only(pack, logs, tmp_path):
    logs()
    assert pack()[0] == 0
    (tmp_path / "out" / "us/results/box/retinanet/mine.txt").touch()
    logs(minutes=20)
    code, _ = pack()
    assert "us/results/box/retinanet" in code and "--force" in code
    assert "mine.txt" in " ".join(tree(tmp_path / "out"))
    assert pack("--force")[0] == 0 and tree(tmp_path / "out") == EXPECTED
    assert pack(**{"--system": "other"})[0] == 0 and len(tree(tmp_path / "out")) == 12


def test_a_package_checker_that_breaks_is_told(tool, pack, logs, tmp_path, monkeypatch):
    real = tool.official
    broken = (1, "Traceback (most recent call last):\nModuleNotFoundError: No module named 'scipy'\n")
    monkeypatch.setattr(tool, "official", lambda name, *w: broken if name == "package_checker" else real(name, *w))
    logs()
    code, said = pack()
    assert code == 0 and "broke down (ModuleNotFoundError: No module named 'scipy')" in said
    assert tree(tmp_path / "out") == EXPECTED
