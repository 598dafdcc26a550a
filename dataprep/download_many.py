"""Many files over many connections: what is there is left alone, what is missing is named. Used by download.py."""

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dataprep.download_fetch import Client, Failed, Item, Missing, Stopped, disk_message
from detcore import UserError
from detcore.training.progress import duration

JOURNAL = ".downloaded"
SHOWN = 5  # problems that are printed; all are in the file
MOST_404_IN_A_ROW = 1000  # files that the server does not have, without one that it has: a wrong address
LOG_EVERY = 30.0  # seconds between lines where there is no terminal
STOP_TIMEOUT = 3.0  # seconds that threads get to end after Ctrl-C; a stalled read would keep them longer


class Journal:
    """The files of a folder that arrived whole, with their sizes: an append-only file, one `size name` a line.

    A later run asks the disk only, not the server, whether such a file is there. Only one process may hold it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.sizes: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refuses is refused in flush, not again while closing.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by __exit__
            self._lock_file(folder)
            self._read()
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; choose another folder or mend its permissions") from error

    def _lock_file(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"{folder}: another download is writing there; wait for it or stop it") from error
        except OSError as error:  # a file system without locks
            print(f"note: {folder} offers no locks ({error.strerror}): start no second download there", file=sys.stderr)

    def _read(self) -> None:
        line = b"\n"
        with open(self.path, "rb") as file:
            for line in file:
                size, _, name = line.decode(errors="surrogateescape").rstrip("\n").partition(" ")
                if line.endswith(b"\n") and size.isdecimal():  # the last line of a killed process may be half a line
                    self.sizes[name] = int(size)
        if not line.endswith(b"\n"):
            self._waiting.append(b"\n")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.flush()
        except UserError:
            if kind is None:
                raise
        finally:
            self._file.close()

    def add(self, name: str, size: int) -> None:
        line = f"{size} {name}\n".encode(errors="surrogateescape")
        with self._lock:
            self._waiting.append(line)

    def flush(self) -> None:
        with self._lock:
            lines, self._waiting = self._waiting, []
        try:
            if lines:
                self._file.write(b"".join(lines))
        except OSError as error:
            raise UserError(disk_message(error, self.path)) from error


@dataclass
class Summary:
    """What a download came to. bytes: received over the network. missing, failed: (file name, reason)."""

    fetched: int = 0
    present: int = 0
    bytes: int = 0
    seconds: float = 0.0
    retries: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


class _Workers:
    """The threads that share one list of files. The first exception that is about no single file ends them all."""

    def __init__(self, items: Iterable[Item], client: Client, journal: Journal | None, connections: int) -> None:
        self._items, self._client, self._journal = iter(items), client, journal
        self.lock = threading.Lock()
        self.result = Summary()
        self.done = 0
        self.error: BaseException | None = None
        self._bad_in_a_row = self._failed_in_a_row = 0
        self._too_many_failures = max(20, 2 * connections)
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(connections)]

    def _work(self) -> None:
        try:
            while not self._client.stop.is_set():
                with self.lock:
                    item = next(self._items, None)
                if item is None:
                    return
                self._fetch_one(item)
        except Stopped:
            return
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self._client.stop.set()

    def _fetch_one(self, item: Item) -> None:
        try:
            size = self._size_if_there(item)
            present = size is not None
            if not present:
                size, _ = self._client.fetch(item, self._count_bytes)
        except Missing as error:
            return self._record_problem(item, self.result.missing, str(error))
        except Failed as error:
            return self._record_problem(item, self.result.failed, str(error))
        if self._journal and self._journal.sizes.get(item.path.name) != size:
            self._journal.add(item.path.name, size)
        with self.lock:
            self._bad_in_a_row = self._failed_in_a_row = 0
            self.done += 1
            self.result.present += present
            self.result.fetched += not present

    def _size_if_there(self, item: Item) -> int | None:
        """Its size if the whole file is there. One that no journal knows is compared with the server's size."""
        with suppress(FileNotFoundError):
            size = item.path.stat().st_size
            expected = self._journal.sizes.get(item.path.name) if self._journal else None
            if expected is None:
                expected = item.size if item.size is not None else self._client.size_of(item.url)
            return size if size == expected else None
        return None

    def _count_bytes(self, number: int) -> None:
        with self.lock:
            self.result.bytes += number

    def _record_problem(self, item: Item, where: list[tuple[str, str]], reason: str) -> None:
        with self.lock:
            where.append((item.path.name, reason))
            self.done += 1
            self._bad_in_a_row += 1
            self._failed_in_a_row = self._failed_in_a_row + 1 if where is self.result.failed else 0
            hopeless = self._failed_in_a_row >= self._too_many_failures or self._bad_in_a_row >= MOST_404_IN_A_ROW
        if hopeless:
            raise UserError(
                f"{max(self._failed_in_a_row, self._bad_in_a_row)} files in a row could not be fetched, the last one: "
                f"{reason}. Check the network and the address, then run the same command again: it goes on from here"
            )


def fetch_all(
    items: Iterable[Item], client: Client, *, total: int, connections: int, what: str, journal: Journal | None = None
) -> Summary:
    """Fetch `items` (an iterator is read as needed) and return what came of them; files that the server lacks or that
    would not arrive are in the summary, not exceptions.

    Raises UserError where going on is useless: disk full, server away. After Ctrl-C everything is left for a next run.
    """
    begin = time.monotonic()
    workers = _Workers(items, client, journal, max(1, min(connections, total)))
    progress = Progress(what, total)
    for thread in workers.threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in workers.threads):
            next((thread for thread in workers.threads if thread.is_alive()), workers.threads[0]).join(0.2)
            if journal:
                journal.flush()
            progress.show(workers, client)
    except BaseException:
        client.stop.set()
        until = time.monotonic() + STOP_TIMEOUT
        for thread in workers.threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
    finally:
        progress.end(workers, client)
    if workers.error:
        raise workers.error
    workers.result.seconds = time.monotonic() - begin
    workers.result.retries = client.retries
    return workers.result


class Progress:
    """Files, bytes, rate and the time left: one line that is rewritten on a terminal, else a line every LOG_EVERY s."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._begin = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, workers: _Workers, client: Client) -> None:
        now = time.monotonic()
        if now - self._shown >= (0.5 if self._terminal else LOG_EVERY):
            self._shown = now
            self._write(self._line(workers, client, now))

    def end(self, workers: _Workers, client: Client) -> None:
        self._write(self._line(workers, client, time.monotonic()), last=True)

    def _line(self, workers: _Workers, client: Client, now: float) -> str:
        with workers.lock:
            done, got = workers.done, workers.result
            fetched, received, bad = got.fetched, got.bytes, len(got.missing) + len(got.failed)
        seconds = max(now - self._begin, 1e-3)
        parts = [
            f"{self._what}: {done:,} of {self._total:,} files",
            f"{human(received)} at {human(received / seconds)}/s",
        ]
        if self._total > 1:
            parts.append(f"{fetched / seconds:.0f} files/s")
        if 0 < done < self._total:
            parts.append(f"ETA {duration(seconds / done * (self._total - done))}")
        if bad:
            parts.append(f"{bad:,} missing or failed")
        if client.retries:
            parts.append(f"{client.retries:,} retries (last: {client.last_reason})")
        return ", ".join(parts)

    def _write(self, text: str, last: bool = False) -> None:
        if self._terminal:
            text = "\r\x1b[K" + text[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]
        sys.stderr.write(text + ("\n" if last or not self._terminal else ""))
        sys.stderr.flush()


def require_all(result: Summary, report: Path, *, allow_missing: bool | None = None) -> None:
    """Name what did not arrive: a few on stderr, all in `report` (JSON lines), which goes away when nothing is missing.

    Raises UserError if there is any, unless `allow_missing` and it is only files that the server says it has not; None:
    nothing could go on without them.
    """
    problems = result.missing + result.failed
    if not problems:
        report.unlink(missing_ok=True)
        return
    write_whole(report, lambda file: file.writelines(json.dumps({"file": n, "why": w}) + "\n" for n, w in problems))
    for _, reason in problems[:SHOWN]:
        print(reason, file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN:,} more in {report}", file=sys.stderr)
    counts = f"{len(result.missing):,} files are not on the server, {len(result.failed):,} could not be fetched"
    if allow_missing and not result.failed:
        print(f"note: {counts}; all are listed in {report}", file=sys.stderr)
        return
    hint = "" if result.failed or allow_missing is None else ", or go on without them: --allow-missing"
    if allow_missing:
        hint = "; --allow-missing covers only files that the server says it has not (404)"
    raise UserError(f"{counts}; all are listed in {report}. Run the same command again to try once more{hint}")


def write_whole(path: Path, write: Callable) -> None:
    """A text file under its final name only when it is whole. `write` gets the open file."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        write(file)
    os.replace(part, path)


def human(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
