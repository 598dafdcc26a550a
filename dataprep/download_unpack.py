"""Archives unpacked without trust in their members, and without half a folder under its final name.

A member with an absolute path, with `..`, a link that leads out of the folder or a device refuses the whole archive
before anything of it is written. Everything is unpacked into a hidden folder beside the target and moved from there.
"""

import errno
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from detcore import UserError

CHUNK = 1 << 20
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError,
    RuntimeError, ValueError, OverflowError,
)  # fmt: skip
"""What the readers raise for archives that are damaged, encrypted or packed in a way that they do not know."""
_OF_ARCHIVE = (None, errno.EINVAL, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def unpack(archive: Path, target: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Path]:
    """Unpack a zip or tar file into the folder `target`, replacing files of the same name; returns the top-level paths.

    progress(done, total) counts members. Raises UserError for an unsafe, damaged or unknown archive.
    """
    hidden = target / f".{archive.name}.unpacking"
    try:
        target.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
        hidden.mkdir()
        try:
            if tarfile.is_tarfile(archive):  # first: a tar file whose last member is a zip file looks like one, too
                _untar(archive, hidden, progress)
            elif zipfile.is_zipfile(archive):
                _unzip(archive, hidden, progress)
            else:
                raise UserError(f"{archive} is neither a zip nor a tar file; remove it and fetch it again")
            top = sorted(hidden.iterdir())
            for path in top:
                _move(path, target / path.name)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except _DAMAGE as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); remove it and fetch it again") from error
    except OSError as error:
        # None: of gzip and bz2. Names that are files and folders at once, or too long, are the archive's own fault.
        within = error.filename2 is None and Path(error.filename or hidden).is_relative_to(hidden)
        if within and error.errno in _OF_ARCHIVE:
            raise UserError(f"{archive} cannot be unpacked ({error}); remove it and fetch it again") from error
        raise UserError(
            f"{error.filename or target}: {error.strerror or error}, while unpacking {archive}; free space or mend the "
            "folder, then run the same command again"
        ) from error
    return [target / path.name for path in top]


def _checked(archive: Path, name: str) -> PurePosixPath:
    """The member's path, if it stays below the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise UserError(f"{archive}: the member {name!r} would be written outside the folder; nothing was unpacked")
    return path


def _unzip(archive: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _checked(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive}: the member {member.filename!r} is a link or device; nothing was unpacked")
        for done, member in enumerate(members, 1):
            path = folder / _checked(archive, member.filename)
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, open(path, "wb") as out:  # checks the member's CRC at its end
                    shutil.copyfileobj(source, out, CHUNK)
            progress(done, len(members))


def _untar(archive: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    with tarfile.open(archive) as file:
        members = file.getmembers()
        for member in members:
            _checked(archive, member.name)
            if member.issym() or member.islnk():
                _check_link(archive, member)
            elif not (member.isfile() or member.isdir()):
                raise UserError(f"{archive}: the member {member.name!r} is a device; nothing was unpacked")
        # A file that is reached through a link of the archive could still lie elsewhere: links come last.
        links = {_checked(archive, member.name) for member in members if member.issym()}
        for member in members:
            if links & set(_checked(archive, member.name).parents):
                raise UserError(f"{archive}: the member {member.name!r} lies behind a link; nothing was unpacked")
        for done, member in enumerate(sorted(members, key=lambda m: m.issym() + m.islnk()), 1):
            path = folder / _checked(archive, member.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.isdir():
                path.mkdir(exist_ok=True)
            elif member.issym():
                path.unlink(missing_ok=True)
                path.symlink_to(member.linkname)
            else:
                _write_member(archive, file, member, path)
            progress(done, len(members))
    for link in links:  # when all are there: where one leads can depend on another
        if not (folder / link).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{archive}: the link {str(link)!r} leads out of the folder; nothing was unpacked")


def _write_member(archive: Path, file: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """A file, or a hard link, of which tarfile gives the content."""
    try:
        source = file.extractfile(member)
    except KeyError:
        source = None
    if source is None:
        raise UserError(
            f"{archive}: the link {member.name!r} is to {member.linkname!r}, which is no file of the archive; nothing "
            "was unpacked"
        )
    path.unlink(missing_ok=True)  # a link of that name would be written through
    with source, open(path, "wb") as out:
        shutil.copyfileobj(source, out, CHUNK)


def _check_link(archive: Path, member: tarfile.TarInfo) -> None:
    """Refuses a link whose goal is outside. A hard link's goal is named from the top, a symbolic one's from its own."""
    start = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
    goal = os.path.normpath(start / member.linkname)
    if os.path.isabs(goal) or goal.split("/")[0] == "..":
        raise UserError(
            f"{archive}: the link {member.name!r} leads out of the folder, to {member.linkname!r}; nothing was unpacked"
        )


def _move(source: Path, target: Path) -> None:
    """Move a file or folder to its final place; folders that are there already are joined file by file."""
    if source.is_dir() and not source.is_symlink() and target.is_dir():
        for path in sorted(source.iterdir()):
            _move(path, target / path.name)
    else:
        os.replace(source, target)
