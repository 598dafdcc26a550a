"""The downloads as a person calls them, from a server that misbehaves: whole in the end, or what is missing is told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dataprep import download, download_fetch, download_many
from dataprep.download_sets import METADATA
from detcore import UserError
from tests.dataprep.download_server import Server, command, run, running

SCRIPTS = Path(__file__).resolve().parents[2] / "public-scripts"
CLASSES = "/m/01,Zebra\n/m/02,Apple\n/m/03,Unlisted thing\n"
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


@pytest.fixture
def server():
    with running() as server:
        yield server


def images(count: int) -> dict[str, bytes]:
    """Names of images and their content, of one class or the other; every seventh has an unlisted class only."""
    return {
        f"{0xFEDC000000000000 + 977 * k:016x}": b"\xff\xd8\xff" + bytes([k % 251]) * (k * 37 % 5000) + b"\xff\xd9"
        for k in range(count)
    }


def publish(server: Server, train: int = 40, validation: int = 9) -> dict[str, dict[str, bytes]]:
    """An OpenImages of small files. Returns by split what should be below DIR/<split>/data."""
    wanted = {}
    for split, count in (("train", train), ("validation", validation)):
        pictures, rows = images(count), [HEADER]
        for k, name in enumerate(pictures):
            mids = ["/m/03"] if k % 7 == 0 else ["/m/03", f"/m/0{1 + k % 2}"] * (1 + k % 3)
            rows += [f"{name},xclick,{mid},1,0.1,0.5,0.1,0.5,0,0,0,0,0" for mid in mids]
        bodies = ("\ufeff" + CLASSES, "{}", "ImageID,Subset\n", "\r\n".join(rows))
        for (_, path, _), body in zip(METADATA[split], bodies, strict=True):
            server.files[f"/meta/{path}"] = body.encode()
        server.files |= {f"/images/{split}/{name}.jpg": body for name, body in pictures.items()}
        wanted[split] = {f"{name}.jpg": body for k, (name, body) in enumerate(pictures.items()) if k % 7}
    return wanted


def openimages(server: Server, folder: Path, *words: str) -> subprocess.CompletedProcess:
    return run(server, "openimages", "-d", folder, "--no-convert", "--classes", class_file(folder), *words)


def class_file(folder: Path) -> Path:
    path = folder.with_name("classes.txt")
    path.write_text("Zebra\n/m/02\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != download_many.JOURNAL}


def check(folder: Path, wanted: dict[str, dict[str, bytes]]) -> None:
    for split, pictures in wanted.items():
        assert contents(folder / split / "data") == pictures
        assert {p.name for p in (folder / split / "metadata").iterdir()} == {
            "classes.csv", "hierarchy.json", "image_ids.csv"
        }  # fmt: skip
    assert not [path for path in folder.rglob("*") if ".part" in path.name or "missing" in path.name]


@pytest.mark.parametrize(("seed", "etags"), [(1, True), (2, True), (3, "nginx")])
def test_whole_and_right_in_spite_of_everything(server, tmp_path, seed, etags):
    wanted = publish(server)
    server.etags = etags
    server.store = etags is True
    server.make_trouble(seed)
    if not server.store:  # then nothing tells whether a CSV is right
        server.faults = {path: faults for path, faults in server.faults.items() if "/images/" in path}
    done = openimages(server, tmp_path / "set")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "set", wanted)
    assert re.search(r"train/data: 34 files fetched", done.stdout)
    assert re.search(r"train images: 34 of 34 files, .* retries", done.stderr)


def test_a_second_run_asks_for_no_image(server, tmp_path):
    wanted = publish(server)
    assert openimages(server, tmp_path / "set").returncode == 0
    server.log.clear()
    done = openimages(server, tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert server.got("/images/") == server.got("/images/", "HEAD") == server.got("/meta/") == []
    assert "34 were there" in done.stdout
    check(tmp_path / "set", wanted)


def test_published_sizes_are_held_against_the_server(server, tmp_path):
    publish(server)
    words = [word for word in command(server, "openimages", "-d", tmp_path / "set") if word != "--trust-server"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"no_proxy": "*"}, timeout=60)
    assert done.returncode == 2
    assert "another one than published" in done.stderr and "--trust-server takes it" in done.stderr
    assert done.stderr.count("error") == 1 and len(server.got("/meta/")) <= 8
    assert not list((tmp_path / "set").rglob("*.csv"))


def test_files_of_another_program_are_kept_if_their_size_is_right(server, tmp_path):
    wanted = publish(server)
    data = tmp_path / "set" / "train" / "data"
    data.mkdir(parents=True)
    whole, cut, *_ = wanted["train"]
    (data / whole).write_bytes(wanted["train"][whole])
    (data / cut).write_bytes(wanted["train"][cut][:-1])
    assert openimages(server, tmp_path / "set").returncode == 0
    check(tmp_path / "set", wanted)
    assert server.got(f"train/{whole}") == [] and len(server.got(f"train/{whole}", "HEAD")) == 1
    assert len(server.got(f"train/{cut}")) == 1


@pytest.mark.parametrize("lists", [7, 0], ids=["list", "no list"])
def test_many_files_of_another_program_cost_a_list(server, tmp_path, monkeypatch, lists):
    wanted = publish(server)
    server.bucket, server.lists = "/images", lists
    data = tmp_path / "set" / "train" / "data"
    data.mkdir(parents=True)
    for name, body in wanted["train"].items():
        (data / name).write_bytes(body)
    cut = next(iter(wanted["train"]))
    (data / cut).write_bytes(wanted["train"][cut][:-1])
    monkeypatch.setattr(download, "WORTH_IT", 30)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = command(server, "openimages", "-d", tmp_path / "set", "--no-convert", "--split", "train")
    assert download.main([*words[2:], "--classes", str(class_file(tmp_path / "set"))]) == 0
    check(tmp_path / "set", {"train": wanted["train"]})
    assert [Path(name).name for name in server.got("/images/train/")] == [cut]
    assert len(server.got("/images/train/", "HEAD")) == (0 if lists else len(wanted["train"]))
    assert len(server.got("/images/?", "LIST")) == (6 if lists else 0)


def test_what_the_server_lacks_is_named(server, tmp_path):
    wanted = publish(server)
    lost = f"/images/train/{list(wanted['train'])[3]}"
    body = server.files.pop(lost)
    done = openimages(server, tmp_path / "set")
    assert done.returncode == 2
    assert f"{lost}: 404" in done.stderr and "1 files are not on the server" in done.stderr
    report = tmp_path / "set" / "train" / "missing-images.jsonl"
    assert [json.loads(line)["file"] for line in report.read_text().splitlines()] == [Path(lost).name]
    assert "Traceback" not in done.stderr

    assert openimages(server, tmp_path / "set", "--allow-missing").returncode == 0
    assert report.exists()
    server.files[lost] = body
    assert openimages(server, tmp_path / "set").returncode == 0
    check(tmp_path / "set", wanted)


def test_what_would_not_arrive_is_named(server, tmp_path):
    wanted = publish(server)
    bad = f"/images/validation/{next(iter(wanted['validation']))}"
    server.faults[bad] = [{"wrong": 1}] * 3
    done = openimages(server, tmp_path / "set", "--split", "validation", "--allow-missing")
    assert done.returncode == 2
    assert "arrived damaged 3 times" in done.stderr and "1 could not be fetched" in done.stderr
    assert set(contents(tmp_path / "set" / "validation" / "data")) == set(wanted["validation"]) - {Path(bad).name}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_and_run_again(server, tmp_path, signal_number):
    wanted = publish(server, train=120)
    reached, enough = threading.Event(), 30
    names = list(wanted["train"])
    for name in names[enough:]:  # from here on every answer stops half way
        server.faults[f"/images/train/{name}"] = [{"drop": 3, "hang": 1}]
    words = command(server, "openimages", "-d", tmp_path / "set", "--no-convert", "--split", "train")
    words += ["--classes", str(class_file(tmp_path / "set"))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"no_proxy": "127.0.0.1"})
    watcher = threading.Thread(target=wait_for, args=(lambda: len(server.got("/images/")) >= enough + 8, reached))
    watcher.start()
    assert reached.wait(60)
    watcher.join()
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal_number), error
    there = contents(tmp_path / "set" / "train" / "data")
    assert all(wanted["train"][name] == body for name, body in there.items() if name.endswith(".jpg"))

    server.log.clear()
    server.faults.clear()
    done = openimages(server, tmp_path / "set", "--split", "train")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "set", {"train": wanted["train"]})
    assert sorted(map(os.path.basename, server.got("/images/"))) == sorted(names[enough:])


def wait_for(condition, reached: threading.Event) -> None:
    while not condition() and not reached.wait(0.01):
        continue
    reached.set()


def test_a_full_disk_and_more_room(server, tmp_path):
    """In a mount of its own: half of the data set fits; after that there is room."""
    wanted = publish(server, train=200)
    folder = tmp_path / "disk"
    folder.mkdir()
    words = command(server, "openimages", "-d", folder / "set", "--no-convert", "--split", "train")
    words += ["--classes", str(class_file(tmp_path / "set"))]
    script = (
        'mount -t tmpfs -o size=200k none "$0" || exit 77; "$@"; echo "code $?"; '
        'mount -o remount,size=9m "$0"; "$@" && cp -r "$0/set" "$0/../copy"'
    )
    wrapper = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "bash", "-c", script, str(folder), *words]
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    done = subprocess.run(wrapper, capture_output=True, text=True, env=os.environ | {"no_proxy": "*"}, timeout=100)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no right to mount a small disk")
    assert done.returncode == 0, done.stderr
    assert "code 2" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "No space left on device; free space" in errors[0]
    check(tmp_path / "copy", {"train": wanted["train"]})


def test_a_server_that_went_away_ends_the_run(server, tmp_path):
    publish(server, train=200)
    for path in server.files:
        if "/images/" in path:
            server.faults[path] = [{"status": 500}] * 9
    done = openimages(server, tmp_path / "set", "--attempts", "2")
    assert done.returncode == 2
    assert "files in a row could not be fetched" in done.stderr and "Traceback" not in done.stderr
    assert len(server.got("/images/train/")) < 150


def test_two_downloads_at_once_are_refused(tmp_path):
    with download_many.Journal(tmp_path), pytest.raises(UserError, match="another download is writing there"):
        download_many.Journal(tmp_path)


def test_the_journal_of_a_killed_process(tmp_path):
    with download_many.Journal(tmp_path) as journal:
        journal.add("a.jpg", 7)
        journal.add("b c.jpg", 8)
    with open(journal.path, "a") as file:
        file.write("12 half")
    with download_many.Journal(tmp_path) as journal:
        assert journal.sizes == {"a.jpg": 7, "b c.jpg": 8}
        journal.add("d.jpg", 9)
    with download_many.Journal(tmp_path) as journal:
        assert journal.sizes["d.jpg"] == 9


class Called:
    """Stands in for subprocess.run and records module and arguments."""

    def __init__(self, returncode: int = 0) -> None:
        self.words, self.returncode = [], returncode

    def __call__(self, words, check, env):
        assert words[:3] == [sys.executable, "-P", "-m"] and env["PYTHONPATH"].startswith(str(SCRIPTS.parent))
        self.words.append([words[3].removeprefix("dataprep."), *words[4:]])
        return subprocess.CompletedProcess(words, self.returncode)


def test_conversion_and_verification_follow(server, tmp_path, monkeypatch):
    publish(server)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    called = Called()
    monkeypatch.setattr(download.subprocess, "run", called)
    classes = str(class_file(tmp_path / "set"))
    words = command(server, "openimages", "-d", tmp_path / "set", "--classes", classes)[2:]
    assert download.main(words) == 0
    folder = str(tmp_path / "set")
    pairs = [
        ["verify", "--annotations", f"{folder}/{split}/labels/openimages-classes.json",
         "--images", f"{folder}/{split}/data", "--partial"]
        for split in ("train", "validation")
    ]  # fmt: skip
    assert called.words == [
        ["openimages", folder, "--split", "train", "--classes", classes],
        ["openimages", folder, "--split", "validation", "--classes", classes],
        *pairs,
    ]
    called.returncode = 2
    with pytest.raises(UserError, match=r"openimages_to_coco\.py ended with exit code 2"):
        download.main(words)


@pytest.mark.parametrize(
    ("words", "verified"),
    [
        ([], ["SET", "--write-manifest"]),
        (["--split", "validation"], ["SET", "--split", "val"]),
        (["--classes", "all", "--allow-missing"], ["SET", "--partial"]),
        (["--no-verify"], None),
    ],
)
def test_what_is_verified(tmp_path, monkeypatch, words, verified):
    called = Called()
    monkeypatch.setattr(download.subprocess, "run", called)
    assert download.main(["openimages", "-d", str(tmp_path), "--with-fiftyone", *words]) == 0
    words = [word.replace("SET", str(tmp_path)) for word in verified or []]
    assert called.words[1:] == ([["verify", *words]] if verified else [])


def test_default_folder_is_the_container_s_mount(tmp_path, monkeypatch, capsys):
    for name in ("DATASET_PATH", "BACKBONE_DIR", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "MOUNT", tmp_path / "ssd_dataset")
    called = Called()
    monkeypatch.setattr(download.subprocess, "run", called)
    with pytest.raises(UserError, match="name the folder with -d"):
        download.main(["openimages", "--with-fiftyone"])
    (tmp_path / "ssd_dataset").mkdir()
    assert download.main(["openimages", "--with-fiftyone", "--no-verify"]) == 0
    assert "goes away with the container" in capsys.readouterr().err
    assert called.words[0][:3] == [
        "openimages_fiftyone", "--dataset-dir", str(tmp_path / "ssd_dataset" / "open-images-v6")
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["openimages_mlperf", "coco2017", "coco2014", "backbone"])
def test_the_shell_scripts(name):
    script = SCRIPTS / f"download_{name}.sh"
    done = subprocess.run([script, "-h"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0 and f"usage: download_{name}.sh [-h]" in done.stdout
    assert "*_URL variables" in " ".join(done.stdout.split())
    done = subprocess.run([script, "--unheard-of"], capture_output=True, text=True)
    assert done.returncode == 2 and "--unheard-of" in done.stderr
    assert f"usage: download_{name}.sh" in done.stderr


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(download_fetch, "urllib3", None)
    with pytest.raises(UserError, match="pip install 'urllib3"):
        download.main(["backbone", "-d", str(tmp_path)])


def test_wrong_bytes_of_the_right_length_without_checksums(server, tmp_path):
    wanted = publish(server)
    server.store, server.etags = False, "nginx"
    once, always = (f"/images/train/{name}" for name in list(wanted["train"])[:2])
    server.faults |= {once: [{"wrong": 1}], always: [{"wrong": 1}] * 3}
    done = openimages(server, tmp_path / "set", "--split", "train", "--allow-missing")
    assert done.returncode == 2 and "no JPEG" in done.stderr and "covers only files" in done.stderr
    note = "this server stated no checksums: sizes and JPEG markers were compared (33 images)"
    assert done.stderr.count("stated no checksums") == 1 and note in done.stderr
    data = tmp_path / "set" / "train" / "data"
    assert contents(data) == {k: v for k, v in wanted["train"].items() if not always.endswith(k)}
    assert Path(always).name not in (data / download_many.JOURNAL).read_text()
    done = openimages(server, tmp_path / "set")
    assert done.returncode == 0 and done.stderr.count("stated no checksums") == 1
    check(tmp_path / "set", wanted)
    assert "stated no checksums" not in openimages(server, tmp_path / "set").stderr


def test_a_part_is_called_one(server, tmp_path, monkeypatch, capsys):
    wanted = publish(server)
    for name in list(wanted["train"])[:8]:
        del server.files[f"/images/train/{name}"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "MLPERF_CLASSES", class_file(tmp_path / "set"))
    monkeypatch.setattr(download.subprocess, "run", Called())
    words = command(server, "openimages", "-d", tmp_path / "set", "--allow-missing")[2:]
    assert download.main(words) == 0
    told = capsys.readouterr()
    total = sum(map(len, wanted.values()))
    last = f"a part: {total - 8} of {total} images; not the MLPerf data set"
    assert told.out.splitlines()[-1] == f"{tmp_path / 'set'}: {last}"
    assert f"and 3 more in {tmp_path / 'set' / 'train' / 'missing-images.jsonl'}" in told.err
    with pytest.raises(UserError, match="or go on without them: --allow-missing"):
        download.main([word for word in words if word != "--allow-missing"])


def test_patience_with_images_is_shorter_unless_it_is_given():
    parse = download._parser().parse_args
    stall = [download._client(parse(["openimages", *words]), 20.0).policy.stall for words in ([], ["--stall", "90"])]
    assert stall == [20, 90] and download._client(parse(["coco2017"])).policy.stall == 60


def test_the_progress_line_has_the_newest_reason(server, tmp_path):
    server.files["/a.bin"] = b"a"
    server.faults["/a.bin"] = [{"status": 500}, {"silent": 1}]
    done = run(server, "file", f"{server.url}/a.bin", "-d", tmp_path, "--stall", "0.3")
    assert done.returncode == 0 and "2 retries (last: no data for 0.3 s from 127.0.0.1)" in done.stderr
