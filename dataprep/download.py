"""Fetches data sets and weights: many connections, resumed, retried, every file checked, nothing half under its name.

    download.py openimages [-d DIR]     the MLPerf subset of OpenImages-v6, converted and verified
    download.py coco2017 [-d DIR]       images and annotations of COCO 2017; coco2014 likewise
    download.py backbone [-d DIR] [NAME...]    ImageNet weights
    download.py file URL... [-d DIR]    anything else, unpacked with --unpack

The same command again goes on where the last one stopped. download_*.sh call this with an interpreter they find.
Proxies and certificates are those of the environment: https_proxy, no_proxy, SSL_CERT_FILE.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dataprep.data_sets import MLPERF_CLASSES
from dataprep.download_fetch import Client, Item, RetryPolicy, is_right
from dataprep.download_listing import WORTH_IT, listed_sizes
from dataprep.download_many import Journal, Summary, fetch_all, human, require_all
from dataprep.download_sets import (
    BACKBONES,
    COCO,
    MEAN_IMAGE,
    METADATA,
    OPENIMAGES_IMAGES,
    OPENIMAGES_METADATA,
    WEIGHTS,
    Archive,
    class_mids,
    coco_archives,
    image_ids,
    weights_item,
)
from dataprep.download_unpack import unpack
from dataprep.interpreter import command, environment
from detcore import UserError
from detcore.cli import OK, run_main
from detcore.training.progress import duration

MOUNT = Path("/workspace/ssd_dataset")  # where a container of this project finds the user's disk
# Names of the commands that follow a download, as users know them.
SCRIPTS = {
    "openimages": "openimages_to_coco.py",
    "openimages_fiftyone": "openimages_with_fiftyone.py",
    "verify": "verify_dataset.py",
}
STALL, STALL_OF_IMAGES = 60.0, 20.0  # seconds without data; an archive's server may have to look for it


def main(argv: list[str]) -> int:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # argparse itself would show the usage without the command
        args.parsers[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return {
        "openimages": openimages, "coco2014": coco, "coco2017": coco, "backbone": backbone, "file": files
    }[args.command](args)  # fmt: skip


def openimages(args: argparse.Namespace) -> int:
    """Metadata, then the images of each split, then the two programs that convert and verify."""
    folder = _folder(args.dir, os.environ.get("DATASET_PATH"), "open-images-v6")
    splits = ["train", "validation"] if args.split == "all" else [args.split]
    names = _class_names(args.classes)
    if args.with_fiftyone:
        _with_fiftyone(folder, splits, names, args)
        _verify(folder, splits, args)
        return OK
    _metadata(folder, splits, _client(args), args)
    client = _client(args, STALL_OF_IMAGES)
    try:
        counts = [_images(folder, split, names, client, args) for split in splits]
        for split in splits if args.convert else ():
            _run("openimages", folder, "--split", split, "--classes", args.classes)
        if args.convert:
            _verify(folder, splits, args)
    finally:
        if client.without_checksum:
            what = "this server stated no checksums: sizes and JPEG markers were compared"
            print(f"note: {what} ({client.without_checksum:,} images)", file=sys.stderr, flush=True)
    got, wanted = (sum(column) for column in zip(*counts, strict=True))
    if got < wanted:
        note = "; not the MLPerf data set" if args.classes == "mlperf" else ""
        print(f"{folder}: a part: {got:,} of {wanted:,} images{note}", flush=True)
    return OK


def _metadata(folder: Path, splits: list[str], client: Client, args: argparse.Namespace) -> None:
    items = [
        Item(f"{args.metadata_url}/{path}", folder / split / name, None if args.trust_server else size)
        for split in splits
        for name, path, size in METADATA[split]
    ]
    result = fetch_all(items, client, total=len(items), connections=args.connections, what="metadata")
    require_all(result, folder / "missing-metadata.jsonl")
    if result.present == len(items):
        print(f"{folder}: the metadata is already there")


def _images(
    folder: Path, split: str, names: list[str] | None, client: Client, args: argparse.Namespace
) -> tuple[int, int]:
    """Fetch the images of one split; how many of them are there, of how many."""
    boxes = folder / split / "labels" / "detections.csv"
    print(f"{split}: selecting images in {boxes}", flush=True)
    mids = None if names is None else class_mids(folder / split / "metadata" / "classes.csv", names)
    ids = image_ids(boxes, mids)
    data = folder / split / "data"
    if not ids:
        raise UserError(f"{boxes} holds no box of the wanted classes; correct --classes")
    with Journal(data) as journal:
        known = _sizes_of_others(data, split, ids, journal, client, args)
        items = (
            Item(f"{args.images_url}/{split}/{name}.jpg", data / f"{name}.jpg", known.get(f"{name}.jpg"), image=True)
            for name in ids
        )
        absent = sum(f"{name}.jpg" not in journal.sizes for name in ids)
        _warn_if_full(data, absent * MEAN_IMAGE)
        result = fetch_all(
            items, client, total=len(ids), connections=args.connections, what=f"{split} images", journal=journal
        )
    _print_summary(data, result)
    require_all(result, folder / split / "missing-images.jsonl", allow_missing=args.allow_missing)
    return result.present + result.fetched, len(ids)


def _sizes_of_others(
    data: Path, split: str, ids: list[str], journal: Journal, client: Client, args: argparse.Namespace
) -> dict[str, int]:
    """The right sizes of files that another program brought, if they are many: else the server is asked for each."""
    with os.scandir(data) as entries:
        there = {entry.name for entry in entries if entry.name not in journal.sizes}
    others = {f"{name}.jpg" for name in ids} & there
    if len(others) < WORTH_IT:
        return {}
    print(f"{split}: {len(others):,} images are there already; asking the server for its list", flush=True)
    return listed_sizes(client, args.images_url, f"{split}/", others)


def _verify(folder: Path, splits: list[str], args: argparse.Namespace) -> None:
    """What was written; a data set with all of its published images gets its manifest too."""
    partial = ["--partial"] if args.allow_missing or args.trust_server else []
    if not args.verify:
        return
    if args.classes not in ("mlperf", "all"):
        file = f"openimages-{Path(args.classes).stem}.json"
        for split in splits:
            pair = ("--annotations", folder / split / "labels" / file, "--images", folder / split / "data")
            _run("verify", *pair, *partial)
    elif len(splits) == 2:
        _run("verify", folder, *(partial or ["--write-manifest"]))
    else:
        _run("verify", folder, "--split", "val" if splits == ["validation"] else "train", *partial)


def _with_fiftyone(folder: Path, splits: list[str], names: list[str] | None, args: argparse.Namespace) -> None:
    file = "openimages-mlperf.json" if args.classes == "mlperf" else "openimages.json"
    classes = ["--classes", *names] if names else []
    _run("openimages_fiftyone", "--dataset-dir", folder, "--output-labels", file, "--splits", *splits, *classes)


def coco(args: argparse.Namespace) -> int:
    """The archives, checked, unpacked and (unless they are to be kept) removed."""
    year = int(args.command[-4:])
    target = _folder(args.output or args.dir, None, args.command)
    downloads = args.dir or target
    client = _client(args)
    todo = [a for a in coco_archives(year) if not a.complete(target, strict=not args.trust_server)]
    _warn_if_full(target, 2 * sum(archive.size for archive in todo))
    for archive in todo:
        _coco_part(archive, downloads / Path(archive.path).name, target, client, args)
    for archive in coco_archives(year):
        print(f"{target / archive.folder}: {'unpacked' if archive in todo else 'already there'}")
    return OK


def _coco_part(archive: Archive, path: Path, target: Path, client: Client, args: argparse.Namespace) -> None:
    url = f"{args.url}/{archive.path}"
    item = Item(url, path) if args.trust_server else Item(url, path, archive.size, (("md5", archive.md5),))
    _fetch([item], client, args)
    print(f"unpacking {path} to {target}", flush=True)
    unpack(path, target)
    if not archive.complete(target, strict=not args.trust_server):
        raise UserError(f"{target / archive.folder} is not complete after unpacking {path}; remove both and run again")
    if not args.keep_archives:
        os.sync()  # a power cut must not take the files and the archive
        path.unlink()


def backbone(args: argparse.Namespace) -> int:
    folder = _folder(args.dir, os.environ.get("BACKBONE_DIR") or os.environ.get("TORCH_HOME"), "torch-home")
    names = list(WEIGHTS) if args.names == ["all"] else args.names or ["resnext50_32x4d"]
    _fetch([weights_item(name, args.url, folder / "hub" / "checkpoints") for name in names], _client(args), args)
    return OK


def files(args: argparse.Namespace) -> int:
    folder = Path(args.dir or ".")
    hashes = (("sha256", args.sha256.lower()),) if args.sha256 else ()
    items = []
    for url in args.urls:
        name = Path(unquote(urlsplit(url).path)).name
        if name in ("", ".", "..") or urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url} does not name a file; give an address such as https://server/folder/file.zip")
        items.append(Item(url, folder / name, None, hashes))
    if hashes and len(items) > 1:
        raise UserError(f"--sha256 fits one file, not {len(items)}; fetch them one by one")
    _fetch(items, _client(args), args)
    for item in items if args.unpack else ():
        print(*unpack(item.path, folder), sep="\n")
    return OK


def _fetch(items: list[Item], client: Client, args: argparse.Namespace) -> None:
    """A few files with known hashes or none: those that are there and right stay, the others are fetched."""
    todo = []
    for item in items:
        if item.hashes and is_right(item):
            print(f"{item.path}: already there")
        else:
            item.path.unlink(missing_ok=True) if item.hashes else None
            print(f"{item.url} -> {item.path}", flush=True)
            todo.append(item)
    if not todo:
        return
    result = fetch_all(todo, client, total=len(todo), connections=args.connections, what="download")
    problems = [reason for _, reason in result.missing + result.failed]
    if problems:
        raise UserError(f"{'; '.join(problems)}. Run again to go on, or choose another server")


def _client(args: argparse.Namespace, stall: float = STALL) -> Client:
    policy = RetryPolicy(attempts=args.attempts, delay=args.retry_delay, stall=args.stall or stall)
    return Client(args.connections, policy)


def _class_names(choice: str) -> list[str] | None:
    """The class names of --classes; None for all."""
    if choice == "all":
        return None
    path = MLPERF_CLASSES if choice == "mlperf" else Path(choice)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {choice} cannot be read ({error}); it is mlperf, all or a file of names") from error
    if not names:
        raise UserError(f"--classes {choice} holds no names; one class a line")
    return names


def _folder(chosen: Path | None, variable: str | None, default: str) -> Path:
    """The folder that was named, else the default one below MOUNT, where a container has the user's disk."""
    if chosen or variable:
        return Path(chosen or variable)
    if not MOUNT.is_dir():
        raise UserError(f"there is no {MOUNT} here (it is a container's mount); name the folder with -d DIR")
    if not os.path.ismount(MOUNT):
        print(f"warning: {MOUNT} is no mount: what is written there goes away with the container", file=sys.stderr)
    return MOUNT / default


def _warn_if_full(folder: Path, needed: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        print(f"warning: about {human(needed)} will be needed, {existing} has {human(free)} left", file=sys.stderr)


def _run(module: str, *arguments: object) -> None:
    """Run another command of this package. It has printed its own message where it fails."""
    done = subprocess.run(command(f"dataprep.{module}", *arguments), check=False, env=environment())
    if done.returncode:
        raise UserError(f"{SCRIPTS[module]} ended with exit code {done.returncode}; its message stands above")


def _print_summary(folder: Path, result: Summary) -> None:
    print(
        f"{folder}: {result.fetched:,} files fetched ({human(result.bytes)} in {duration(result.seconds)}), "
        f"{result.present:,} were there, {len(result.missing):,} not on the server, {len(result.failed):,} failed",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="download.py", description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.set_defaults(parsers=commands.choices)
    # The shell scripts say by which name they were called.
    style |= {"parents": [_common()], "prog": os.environ.get("DOWNLOAD_CALLED_AS") or None}

    add = commands.add_parser("openimages", help="the MLPerf subset of OpenImages-v6", **style).add_argument
    text = f"the data set; default: $DATASET_PATH, else {MOUNT}/open-images-v6"
    add("-d", "--dir", "--dataset-path", type=Path, metavar="DIR", help=text)
    add("--split", choices=["train", "validation", "all"], default="all", help="what to fetch; default: all")
    text = "only images with a box of these classes; FILE: one name or MID a line; default: mlperf"
    add("--classes", default="mlperf", metavar="mlperf|all|FILE", help=text)
    text = "go on although the server says that it has not (404) some images: a part of the data set"
    add("--allow-missing", action="store_true", help=text)
    add("--no-convert", dest="convert", action="store_false", help="only fetch")
    add("--no-verify", dest="verify", action="store_false", help="no verify_dataset.py at the end")
    text = "the original way: fiftyone downloads and exports; needs fiftyone and many hours"
    add("--with-fiftyone", action="store_true", help=text)
    _url(add, "--metadata-url", "OPENIMAGES_METADATA_URL", OPENIMAGES_METADATA, "the CSV files")
    _url(add, "--images-url", "OPENIMAGES_IMAGES_URL", OPENIMAGES_IMAGES, "the images")

    for year in (2017, 2014):
        add = commands.add_parser(f"coco{year}", help=f"COCO {year}", **style).add_argument
        text = f"the data set, or only its archives if -o is given; default: {MOUNT}/coco{year}"
        add("-d", "--dir", "--download-path", type=Path, metavar="DIR", help=text)
        add("-o", "--output", "--output-path", type=Path, metavar="DIR", help="the data set")
        add("--keep-archives", action="store_true", help="leave the zip files after unpacking")
        _url(add, "--url", "COCO_URL", COCO, "COCO's files")

    add = commands.add_parser("backbone", help="ImageNet weights", **style).add_argument
    text = f"default: $BACKBONE_DIR, else $TORCH_HOME, else {MOUNT}/torch-home"
    text = f"the weights go to DIR/hub/checkpoints (training: TORCH_HOME=DIR); {text}"
    add("-d", "--dir", type=Path, metavar="DIR", help=text)
    text = (
        f"{', '.join(WEIGHTS)}, all, another file of that server, or weights of Detectron: MSRA/R-50, MSRA/R-101, "
        "MSRA/R-50-GN, MSRA/R-101-GN, FAIR/20171220/X-101-32x8d, Caffe2Detectron/COCO/...; default: resnext50_32x4d"
    )
    add("names", nargs="*", metavar="NAME", help=text)
    _url(add, "--url", "BACKBONE_URL", BACKBONES, "the weights")

    add = commands.add_parser("file", help="files by address", **style).add_argument
    add("urls", nargs="+", metavar="URL")
    add("-d", "--dir", type=Path, metavar="DIR", help="where to; default: here")
    add("--sha256", metavar="HEX", help="the hash of the one file, or the beginning of it")
    add("--unpack", action="store_true", help="unpack zip and tar files in DIR")
    return parser


def _url(add: Callable, option: str, variable: str, default: str, what: str) -> None:
    text = f"the server of {what}, for a mirror; default: ${variable}, else {default}"
    default = (os.environ.get(variable) or default).rstrip("/")
    add(option, default=default, metavar="URL", type=lambda text: text.rstrip("/"), help=text)


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument_group("how to fetch").add_argument
    text = "files at the same time; default: 64"
    add("--connections", type=_number(int, 1, 1024), default=64, metavar="N", help=text)
    text = "tries a file without a new byte; default: 8"
    add("--attempts", type=_number(int, 1, 1000), default=8, metavar="N", help=text)
    text = "seconds before the second try, doubled up to 60; the server's Retry-After wins; default: 1"
    add("--retry-delay", type=_number(float, 0, 3600), default=1.0, metavar="S", help=text)
    text = "seconds without data until a connection is given up; "
    text += f"default: {STALL_OF_IMAGES:g} for images, {STALL:g} for archives"
    add("--stall", type=_number(float, 0.1, 3600), metavar="S", help=text)
    text = "do not compare with published sizes and hashes: for a mirror (--*url or the *_URL variables named here)"
    text += " with other or fewer files"
    add("--trust-server", action="store_true", help=text)
    return common


def _number(kind: type, low: float, high: float):
    def convert(text: str):
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} lies outside {low}..{high}")
        return value

    convert.__name__ = kind.__name__
    return convert


if __name__ == "__main__":
    sys.exit(run_main(main))
