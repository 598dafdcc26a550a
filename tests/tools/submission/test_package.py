"""package: what the official checkers accept comes out, whole; anything else leaves nothing behind."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from detcore import UserError
from tests.tools.submission import made
from tools.submission import NOT_CHECKED, OK, REFUSED, code, package, readme, rulesets, verify
from tools.submission.logs import read_log
from tools.submission.tree import Result

EXPECTED = [*(f"us/results/box/retinanet/result_{i}.txt" for i in range(5)), "us/systems/box.json"]
SCRIPTS = ("README.md", "box_pytorch.json", "init_datasets.sh", "run_and_time.sh", "setup.sh")


@pytest.fixture
def job(tmp_path):
    """job({i: options}, ...): the trials of a job with stamp s, and its system description with `fields`."""

    def write(changes=None, fields=None, **options):
        for i, path in enumerate(made.write_result(tmp_path / "made", changes, **options)):
            (tmp_path / f"s_{i + 1}").mkdir(exist_ok=True)
            path.rename(tmp_path / f"s_{i + 1}" / path.name)
        (tmp_path / "s_system.json").write_text(json.dumps(made.description(**(fields or {}))))
        return [tmp_path / f"s_{i + 1}" / f"result_{i}.txt" for i in range(5)]

    return write


@pytest.fixture
def clone(tmp_path):
    """A repository with a few files, one commit, and files that no submission may hold."""
    place = tmp_path / "clone"
    place.mkdir()
    for name, text in (("README.md", "code"), ("run.sub", "#!/bin/bash\n"), (".hidden", ""), ("my file.py", ""),
                       ("results/x.txt", ""), ("pack/a.py", "x = 1\n")):  # fmt: skip
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    (place / "run.sub").chmod(0o755)
    (place / "pack/sound.py").symlink_to("a.py")
    (place / "broken").symlink_to("/none")
    git(place, "init", "-q")
    git(place, "add", "-A")
    git(place, "commit", "-qm", "all")
    return place


def git(place, *words):
    who = {f"GIT_{one}_{kind}": "a@b" for one in ("AUTHOR", "COMMITTER") for kind in ("NAME", "EMAIL")}
    return subprocess.run(["git", "-C", place, *words], check=True, capture_output=True, env=os.environ | who).stdout


@pytest.fixture
def pack(tmp_path, capsys):
    """pack(...) -> (exit code or the error's text, what was printed)."""

    def call(*words, **options):
        flags = {
            "--logdir": tmp_path,
            "--stamp": "s",
            "--out": tmp_path / "out",
            "--org": "us",
            "--system": "box",
        } | options
        flat = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        capsys.readouterr()
        try:
            ended = package.main([*flat, *map(str, words), *([] if "--code" in flags else ["--no-code"])])
        except UserError as error:
            ended = str(error)
        streams = capsys.readouterr()
        return ended, streams.out + streams.err

    return call


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_five_good_logs(pack, job, tmp_path):
    given = job()
    ended, said = pack()
    assert ended == OK and "olympic mean: 34.200 minutes" in said and "The code belongs into" in said
    assert tree(tmp_path / "out") == EXPECTED
    for i, path in enumerate(given):
        assert (tmp_path / "out" / EXPECTED[i]).read_bytes() == path.read_bytes()


def test_logs_named_one_by_one_keep_their_order(pack, job, tmp_path):
    given = job()[::-1]
    alone = {"--logdir": None, "--stamp": None}
    assert "--system-json is missing" in pack(*given, **alone)[0]
    ended, _ = pack(*given, **alone, **{"--system-json": tmp_path / "s_system.json"})
    assert ended == OK and (tmp_path / "out" / EXPECTED[0]).read_bytes() == given[0].read_bytes()
    assert "either five logs" in pack(*given)[0] and "either five logs" in pack(**alone)[0]
    assert "no such log: " in pack(tmp_path / "none", **alone)[0]


def test_not_five(pack, job, tmp_path):
    paths = job()
    paths[4].unlink()
    ended, _ = pack()
    assert "4 logs" in ended and "exactly 5" in ended and not (tmp_path / "out").exists()


def test_the_whole_package_of_an_open_result(pack, job, clone, tmp_path, capsys):
    """From five small logs to a tree that `verify` accepts, with code, READMEs and scripts."""
    job(division="open", batch=8, curve=(0.1, 0.15, 0.2, 0.21), samples=(1000, 200), fields={"division": "open"})
    commit = git(clone, "rev-parse", "HEAD").decode().strip()
    ended, said = pack(**{"--code": clone})
    assert ended == OK, said
    place = "us/benchmarks/retinanet/"
    files = [
        f"{place}implementations/pytorch/code/{name}" for name in ("README.md", "pack/a.py", "pack/sound.py", "run.sub")
    ]
    files += [f"{place}implementations/pytorch/README.md", *(f"{place}box/{name}" for name in SCRIPTS)]
    assert tree(tmp_path / "out") == sorted([*EXPECTED, *files])
    assert "files left out of the code: .hidden (its name begins with a dot or has a blank)" in said
    text = (tmp_path / "out" / place / "implementations/pytorch/README.md").read_text()
    assert commit in text and "mAP" in text and "$" not in text.replace("$DGXNNODES", "").replace("$WALLTIME", "")
    for word in ("Problem", "Directions", "Data set", "Model", "Quality"):
        assert f". {word}\n" in text
    about = json.loads((tmp_path / "out" / place / "box/box_pytorch.json").read_text())
    assert about["commit"] == commit and about["hyperparameters"]["global_batch_size"] == 8
    assert (tmp_path / "out" / place / "implementations/pytorch/code/run.sub").stat().st_mode & 0o111
    for name in SCRIPTS[2:]:
        subprocess.run(["bash", "-n", tmp_path / "out" / place / "box" / name], check=True)
    assert verify.main([str(tmp_path / "out")]) == OK and "accepted" in capsys.readouterr().out


def test_systems_and_benchmarks_share_a_tree(pack, job, clone, tmp_path):
    job()
    assert pack(**{"--code": clone})[0] == OK
    assert pack(**{"--code": clone, "--system": "second"})[0] == OK
    job(benchmark="ssd")
    old = {"--code": clone, "--system": "old", "--ruleset": "4.1.0"}
    assert pack(**old)[0] == OK
    found = tree(tmp_path / "out")
    assert {"us/results/second/retinanet/result_0.txt", "us/results/old/ssd/result_0.txt"} <= set(found)
    assert len([name for name in found if name.endswith("implementations/pytorch/README.md")]) == 2
    git(clone, "commit", "-qm", "next", "--allow-empty")
    job()
    ended, _ = pack(**{"--code": clone, "--system": "third"})
    assert "implementations/pytorch exists already; --force replaces it" in ended
    assert pack(**{"--code": clone, "--system": "third", "--implementation": "new"})[0] == OK


def test_the_commit_is_that_of_the_runs(pack, job, clone, tmp_path):
    job()
    (clone / "README.md").write_text("changed")
    (tmp_path / "s_1.log").write_text(f":::GITCOMMITID {'f' * 40} x\n")
    ended, said = pack(**{"--code": clone})
    assert ended == OK and "1 files differ from commit" in said and f"the runs were made by commit {'f' * 40}" in said
    assert (tmp_path / "out/us/benchmarks/retinanet/implementations/pytorch/code/README.md").read_text() == "code"
    assert "git rev-parse fails" in pack(**{"--code": clone, "--commit": "none"})[0]
    (tmp_path / "s_1/.git").write_text("gitdir: nowhere\n")
    assert "git rev-parse fails" in pack(**{"--code": tmp_path / "s_1"})[0]
    assert code.logged_commit(tmp_path / "nothing") == ""


def test_refused_logs_are_all_named(pack, job, tmp_path):
    paths = job({0: {"seed": 1037}, 1: {"division": "open"}, 3: {"init_s": 2000}, 4: {"killed_after": 1}})
    ended, said = pack()
    assert ended == REFUSED and "nothing was written" in said and tree(tmp_path / "out") == []
    assert "it has seed 1037, as has" in said and "the runs differ in submission_division" in said
    assert "33 min of initialisation" in said and "run_stop is missing" in said
    assert str(tmp_path / "out") not in said  # the temporary folder is nobody's business
    paths[2].write_text("hello\n")
    assert "holds no MLPerf event" in pack()[1]


def test_a_resumed_run_counts_as_the_slowest(pack, job, tmp_path):
    paths = job()
    paths[1].write_text(made.text(made.events(seed=5, status="aborted")) + paths[1].read_text())
    ended, said = pack()
    assert (
        ended == OK and "the run was resumed, so its log has 2 parts" in said and "result_1.txt does not count" in said
    )


def test_every_problem_is_named_at_once(pack, job, tmp_path):
    stack = {"driver": "FILL IN: its version"}
    job(fields={"cooling": "FILL IN: air or liquid", "accelerators_per_node": 8, "hw_notes": None, "division": "open",
                "other_software_stack": stack})  # fmt: skip
    ended, said = pack(**{"--benchmark": "ssd"})
    assert ended in (REFUSED, NOT_CHECKED) and tree(tmp_path / "out") == []
    for words in (
        "cooling is still to fill in: air or liquid", "other_software_stack is still to fill in: its version",
        'text: "8"', "hw_notes is missing", "division is 'open', the logs' 'closed'",
        "--benchmark is 'ssd', but the logs say",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("content, words", [
    ("[]", "no JSON object"), ("{", "no JSON ("), ("[" * 100_000, "no JSON ("), (None, "No such file"),
])  # fmt: skip
def test_what_is_no_description(pack, job, tmp_path, content, words):
    job()
    (tmp_path / "s_system.json").unlink()
    if content is not None:
        (tmp_path / "s_system.json").write_text(content)
    assert words in pack()[0]


def test_refused_descriptions(pack, job):
    for fields, words in (({"status": "Sold"}, "Sold"), ({"host_processor_model_name": 7}, "NOT CHECKED")):
        job(fields=fields)
        ended, said = pack()
        assert ended in (REFUSED, NOT_CHECKED) and words in said


@pytest.mark.parametrize("options", [
    {"--folder": "a b"}, {"--org": "..."}, {"--system": ".x"}, {"--system": "../x"}, {"--ruleset": "9"},
    {"--implementation": "a/b"},
])  # fmt: skip
def test_refused_names(pack, job, options):
    job()
    value = next(iter(options.values()))
    assert isinstance(pack(**options)[0], str) and value in pack(**options)[0]


def mask_rcnn(job):
    curve = [{"BBOX": 0.3 + 0.006 * i, "SEGM": 0.26 + 0.006 * i} for i in range(1, 17)]
    job(benchmark="maskrcnn", hyper=made.MASKRCNN, batch=96, epochs=14, curve=curve, samples=(117266, 5000))


def check_words(place, words):
    """The five parts of a README, with these words, and the scripts of a system that repeat its commands."""
    text = (place / "implementations/pytorch/README.md").read_text()
    parts = [line for line in text.splitlines() if line.startswith("# ")]
    assert parts == ["# 1. Problem", "# 2. Directions", "# 3. Data set", "# 4. Model", "# 5. Quality"]
    assert all(word in text for word in words) and "$" not in text.replace("$DGXNNODES", "").replace("$WALLTIME", "")
    init, run = ((place / "box" / name).read_text() for name in ("init_datasets.sh", "run_and_time.sh"))
    assert "download_coco2017.sh -d" in init and f"torch-home {words[-1]}" in init and "/coco BACKBONE_DIR=" in run
    fetched = [line for line in init.splitlines() if line.startswith("code/public-scripts/download")]
    assert len(fetched) == 2 and all(line.partition(" -d ")[0] in text for line in fetched)


def test_mask_rcnn_has_its_own_readme(pack, job, clone, tmp_path):
    mask_rcnn(job)
    ended, said = pack(**{"--code": clone, "--ruleset": "3.1.0"})
    assert ended == OK, said
    words = ["Mask R-CNN R50-FPN on COCO 2017", "BBOX 0.377, SEGM 0.339", "MSRA/R-50"]
    check_words(tmp_path / "out/us/benchmarks/maskrcnn", words)


def test_efficientdet_has_one_too_though_no_ruleset_takes_it(pack, job, tmp_path):
    hyper = {"opt_name": "momentum", "opt_base_learning_rate": 0.01, "opt_weight_decay": 4e-5,
             "opt_learning_rate_warmup_epochs": 5}  # fmt: skip
    paths = job(benchmark="efficientdet", division="open", samples=(117266, 5000), hyper=hyper,
                fields={"division": "open"})  # fmt: skip
    ended, said = pack()
    assert ended == REFUSED and "no benchmark efficientdet; nor has another" in said and tree(tmp_path / "out") == []
    staged = Result(tmp_path / "x/us", "box", "efficientdet")
    staged.description.parent.mkdir(parents=True)
    staged.description.write_text((tmp_path / "s_system.json").read_text())
    args = SimpleNamespace(ruleset="5.1.0", org="us", system="box", implementation="pytorch", data_dir="/data")
    place, about = staged.org / "benchmarks/efficientdet", rulesets.facts("efficientdet", "5.1.0")
    (place / "implementations/pytorch").mkdir(parents=True)
    readme.write_implementation(place / "implementations/pytorch", staged, args, "c0ffee", about)
    readme.write_system(place / "box", staged, [read_log(path) for path in paths], args, "c0ffee")
    words = ["EfficientDet-D0 on COCO 2017", "No MLPerf ruleset", "c0ffee", "mAP 0.34", "efficientnet_b0_rwightman"]
    check_words(place, words)


def test_every_benchmark_has_a_readme_and_scripts_that_exist():
    folders = {path.parent.parent.name for path in rulesets.ROOT.glob("*/recipes/*.sh")}
    assert {path.stem for path in readme.TEMPLATES.glob("*.md")} == set(readme.DATA) == folders
    assert all((rulesets.ROOT / "public-scripts" / script).is_file() for script, _, _ in readme.DATA.values())


def test_a_missing_data_set_is_named(pack, job, clone, tmp_path, monkeypatch):
    monkeypatch.delitem(readme.DATA, "maskrcnn")
    mask_rcnn(job)
    ended, _ = pack(**{"--code": clone, "--ruleset": "3.1.0"})
    assert "readme.py does not say where the data set and the weights of maskrcnn" in ended
    assert tree(tmp_path / "out") == []


def test_a_missing_template_is_named(pack, job, clone, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "TEMPLATES", rulesets.ROOT / "tools/submission/none")
    mask_rcnn(job)
    ended, _ = pack(**{"--code": clone, "--ruleset": "3.1.0"})
    assert "there is no README template of maskrcnn" in ended and tree(tmp_path / "out") == []
    assert pack(**{"--ruleset": "3.1.0"})[0] == OK


def test_an_earlier_package_is_replaced_by_force_only(pack, job, tmp_path):
    job()
    assert pack()[0] == OK and pack()[0] == OK  # the same once more
    job(minutes=20)
    before = (tmp_path / "out" / EXPECTED[0]).read_bytes()
    ended, _ = pack()
    assert "results/box/retinanet exists already; --force" in ended
    assert (tmp_path / "out" / EXPECTED[0]).read_bytes() == before
    assert pack("--force")[0] == OK and tree(tmp_path / "out") == EXPECTED
    assert (tmp_path / "out" / EXPECTED[0]).read_bytes() != before


def test_nothing_half_written_stays(pack, job, tmp_path, monkeypatch):
    """The last move fails: what had been moved goes back."""
    job()
    assert pack()[0] == OK
    before = {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")}
    job(minutes=20, fields={"cooling": "air"})
    real = os.rename

    def rename(source, target, *rest, **more):
        if str(target).endswith("systems/box.json") and "replaced" not in str(source):
            raise OSError(28, "No space left on device")
        return real(source, target, *rest, **more)

    monkeypatch.setattr(package.os, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        pack("--force")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")} == before
