"""The code of a submission: what git has at a commit, without what MLPerf's repository checker refuses."""

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

from detcore import UserError

LARGEST = 50 * 2**20  # bytes of a file, by mlperf-logging's repository checker
LEFT_OUT = ("results",)  # records of this repository, not of the submission
_COMMIT = re.compile(r"^:::GITCOMMITID (\S+)", re.MULTILINE)


def commit_of(checkout: Path, name: str = "HEAD") -> str:
    """The full hash of a commit. Raises UserError where there is no git, no clone or no such commit."""
    return _git(checkout, "rev-parse", "--verify", f"{name}^{{commit}}").decode().strip()


def changed(checkout: Path) -> list[str]:
    """Files that differ from the commit, or are not in it and not ignored."""
    return [line[3:] for line in _git(checkout, "status", "--porcelain").decode(errors="replace").splitlines()]


def export(checkout: Path, commit: str, target: Path) -> list[str]:
    """Writes the files of a commit below `target`, a new folder; returns what was left out, with the reason.

    Links are written as the files that they name. Raises UserError where git fails.
    """
    target.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(_git(checkout, "archive", "--format=tar", commit))) as archive:
        return _unpack(archive, target)


def _unpack(archive: tarfile.TarFile, target: Path) -> list[str]:
    left_out = []
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if not parts or member.isdir() or member.type == tarfile.XGLTYPE:
            continue
        reason = _refused(parts, member)
        data = None if reason else archive.extractfile(member) if not member.issym() else _linked(archive, member)
        if reason or data is None:
            left_out.append(f"{member.name} ({reason or 'a link that leads nowhere'})")
            continue
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.read())
        path.chmod(0o755 if member.mode & 0o100 else 0o644)
    return left_out


def _refused(parts: tuple[str, ...], member: tarfile.TarInfo) -> str:
    if any(part.startswith(".") or " " in part for part in parts):
        return "its name begins with a dot or has a blank"
    if parts[0] in LEFT_OUT:
        return "no code"
    return "larger than 50 MiB" if member.size > LARGEST else ""


def _linked(archive: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader | None:
    name = os.path.normpath(PurePosixPath(member.name).parent / member.linkname)
    try:
        found = archive.getmember(name)
    except KeyError:
        return None
    return archive.extractfile(found) if found.isfile() else None


def logged_commit(log: Path) -> str:
    """The commit that run.sub wrote into a trial's log, <stamp>_<k>.log; empty where there is none."""
    if not log.is_file():
        return ""
    match = _COMMIT.search(log.read_text(encoding="latin-1"))
    return match[1] if match and match[1] != "unknown" else ""


def _git(checkout: Path, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"git can't be called ({error.strerror}); install it, or add --no-code") from error
    if done.returncode:
        why = (done.stderr.decode(errors="replace").strip().splitlines() or [str(done.returncode)])[-1]
        raise UserError(
            f"{checkout}: git {words[0]} fails ({why}); --code names a clone, --no-code packages without the code"
        )
    return done.stdout
