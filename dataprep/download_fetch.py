"""One file over HTTP: whole and right under its final name, or a clear reason why not. Used by download.py.

While it arrives it is called NAME.part; where it may be continued by a later run although no hash is known for it, what
the server calls this version of it (its ETag) lies beside it as NAME.part.etag.
"""

import hashlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from dataprep.download_headers import content_length, jpeg_problem, network_reason, retry_after, server_md5
from detcore import UserError

try:
    import urllib3
except ImportError:  # a login node may have Python and nothing else; download.py says what to install
    urllib3 = None

CHUNK = 1 << 18
LARGE = 8 << 20  # bytes; larger files are worth an ETag file, and an fsync before they get their name
SLOWEST = 1024  # bytes/s over RetryPolicy.stall seconds; below, the connection counts as stalled
DAMAGED_LIMIT = 3  # how often a file may arrive with wrong bytes
LONGEST_RETRY_AFTER = 900.0  # seconds; a server that asks for more is asked again after these


class Missing(Exception):
    """The server says that it has no such file (404, 410)."""


class Failed(Exception):
    """Given up, for the reason in the message."""


class Stopped(Exception):
    """Another thread or Ctrl-C ended the download."""


class _Retry(Exception):
    """May work the next time. after: seconds that the server asked for. now: without any wait."""

    def __init__(self, reason: str, after: float | None = None, now: bool = False) -> None:
        super().__init__(reason)
        self.after, self.now = after, now


class _Damaged(Exception):
    """The whole file arrived, and is not the one that was promised."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file to fetch. size: bytes, None if unknown. hashes: (algorithm, beginning of the hex digest).

    image: a JPEG, whose markers are compared; its size, if known, is of the server's own list, else a published one.
    """

    url: str
    path: Path
    size: int | None = None
    hashes: tuple[tuple[str, str], ...] = ()
    image: bool = False


@dataclass(frozen=True)
class RetryPolicy:
    """attempts: without a new byte between them. Times are seconds; delay doubles from attempt to attempt."""

    attempts: int = 8
    delay: float = 1.0
    longest: float = 60.0
    connect: float = 20.0
    stall: float = 60.0


class _Part:
    """The beginning of a file that is on disk already: its length, hashes and the version it belongs to."""

    def __init__(self, item: Item) -> None:
        self.path = item.path.with_name(item.path.name + ".part")
        self.note = item.path.with_name(item.path.name + ".part.etag")
        self._names = {"md5", *(name for name, _ in item.hashes)}
        self.reset()
        known = self.note.read_text(encoding="latin-1").strip() if self.note.is_file() else ""
        if self.path.is_file() and (known or item.hashes):  # else nothing shows whether a continuation fits
            self.validator = known
            with open(self.path, "rb") as file:
                while chunk := file.read(CHUNK):
                    self.add(chunk)

    def reset(self) -> None:
        self.length, self.validator = 0, ""
        self.hashes = {name: hashlib.new(name, usedforsecurity=False) for name in self._names}

    def add(self, chunk: bytes) -> None:
        self.length += len(chunk)
        for value in self.hashes.values():
            value.update(chunk)

    def remove(self) -> None:
        self.reset()
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


class Client:
    """Connections that are kept open and shared by all threads. `stop` ends every wait and every transfer.

    Proxies are those of the environment (https_proxy, no_proxy, ...), certificates those of the system (SSL_CERT_FILE).
    """

    def __init__(self, connections: int, policy: RetryPolicy, stop: threading.Event | None = None) -> None:
        if urllib3 is None:
            raise UserError(f"{sys.executable} has no urllib3, which downloads need: pip install 'urllib3>=2.2,<3'")
        self.policy, self.stop = policy, stop or threading.Event()
        self.retries, self.last_reason = 0, ""  # why something was tried again, newest
        self.without_checksum = 0  # images that came without any checksum
        self._connections = connections
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._not_before = 0.0  # all threads wait for it after a Retry-After
        self._timeout = urllib3.Timeout(connect=policy.connect, read=policy.stall)
        self._redirects = urllib3.Retry(connect=0, read=0, redirect=5, status=0, other=0, total=None)

    def fetch(self, item: Item, report: Callable[[int], None] = lambda count: None) -> tuple[int, int]:
        """Fetch one file; returns its size and how many bytes came over the network.

        report(bytes) is called for each chunk. Raises Missing, Failed or Stopped; UserError where the disk is full,
        the folder cannot be written, or the server has another file than the published one.
        """
        received = 0

        def count(number: int) -> None:
            nonlocal received
            received += number
            report(number)

        try:
            item.path.parent.mkdir(parents=True, exist_ok=True)
            part = _Part(item)
            return self._persist(item, lambda: self._transfer(item, part, count), part, lambda: received), received
        except OSError as error:  # urllib3 wraps those of the network
            raise UserError(disk_message(error, item.path)) from error

    def size_of(self, url: str) -> int | None:
        """The size that the server states, by a HEAD request; None if it states none. Raises as `fetch` does."""

        def ask() -> int | None:
            response = self._open("HEAD", url, {})
            response.release_conn()
            self._check_status(response.status, response, url)
            return content_length(response.headers)

        return self._persist(Item(url, Path()), ask, None, lambda: 0)

    def read(self, url: str) -> bytes:
        """A small answer, whole. Raises as `fetch` does."""

        def ask() -> bytes:
            response = self._open("GET", url, {})
            try:
                self._check_status(response.status, response, url)
                return response.read()
            except urllib3.exceptions.HTTPError as error:
                raise self._retry(error) from error
            finally:
                response.release_conn()

        return self._persist(Item(url, Path()), ask, None, lambda: 0)

    def _persist(self, item: Item, action: Callable, part: _Part | None, received: Callable[[], int]):
        failures = damaged = before = 0
        while True:
            try:
                self._wait(self._not_before - time.monotonic())
                return action()
            except _Damaged as error:
                if part:
                    part.remove()
                reason = f"damaged, {error}"
                damaged += 1
                if damaged == DAMAGED_LIMIT:
                    raise Failed(f"{item.url} arrived damaged {damaged} times ({error}) and was removed") from error
                wait = self._backoff(damaged)
            except _Retry as error:
                failures = 1 if received() > before else failures + 1
                before, reason = received(), str(error)
                if failures >= self.policy.attempts:
                    raise Failed(f"{item.url} could not be fetched: {error}") from error
                wait = 0.0 if error.now else self._backoff(failures)
                if error.after is not None:
                    wait = max(wait, min(error.after, LONGEST_RETRY_AFTER))
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            host = urlsplit(item.url).hostname or ""
            self.last_reason = reason if host in reason else f"{reason} ({host})"
            self.retries += 1
            self._wait(wait)

    def _backoff(self, failures: int) -> float:
        """Half of it is drawn, so that many threads do not come back at the same moment."""
        full = min(self.policy.delay * 2 ** (failures - 1), self.policy.longest)
        return full * random.uniform(0.5, 1.0)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise Stopped

    def _manager(self, url: str) -> "urllib3.PoolManager":
        """The pool for this address, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = "" if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, "")
        with self._lock:
            if proxy not in self._managers:
                options = {"maxsize": self._connections, "block": True, "timeout": self._timeout}
                if proxy:
                    address = proxy if "://" in proxy else f"http://{proxy}"
                    parts = urlsplit(address)
                    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
                    headers = urllib3.make_headers(proxy_basic_auth=login)
                    self._managers[proxy] = urllib3.ProxyManager(address, proxy_headers=headers, **options)
                else:
                    self._managers[proxy] = urllib3.PoolManager(**options)
            return self._managers[proxy]

    def _open(self, method: str, url: str, headers: dict[str, str]) -> "urllib3.BaseHTTPResponse":
        headers = {"User-Agent": "detcore-download/1", "Accept-Encoding": "identity", **headers}
        try:
            return self._manager(url).request(
                method, url, headers=headers, preload_content=False, decode_content=False, retries=self._redirects
            )
        except urllib3.exceptions.LocationValueError as error:
            raise Failed(f"{url} is no address: {error}") from error
        except urllib3.exceptions.HTTPError as error:
            raise self._retry(error) from error

    def _retry(self, error: Exception) -> _Retry:
        return _Retry(network_reason(error, self.policy.stall))

    def _check_status(self, status: int, response: "urllib3.BaseHTTPResponse", url: str) -> None:
        """Raises for every status that brings no file."""
        if status in (404, 410):
            raise Missing(f"{url}: {status} {response.reason or ''}".strip())
        if status in (408, 425, 429) or status >= 500:
            raise _Retry(f"the server answered {status}", after=retry_after(response.headers.get("Retry-After")))
        if status not in (200, 206, 416):
            raise Failed(f"{url} could not be fetched: the server answered {status} {response.reason or ''}".strip())

    def _transfer(self, item: Item, part: _Part, report: Callable[[int], None]) -> int:
        """One request. Returns the size of the file, which then has its final name."""
        headers = {}
        if part.length:
            headers["Range"] = f"bytes={part.length}-"
            if part.validator:
                headers["If-Range"] = part.validator
        response = self._open("GET", item.url, headers)
        whole = False
        try:
            self._check_status(response.status, response, item.url)
            if response.status == 416:  # nothing beyond the part: it is whole, or of another version
                if item.hashes and _problem(item, part, {}) is None:
                    return _finish(item, part)
                part.remove()
                raise _Retry("the server cannot continue the part that is here", now=True)
            total = _agree(item, part, response)
            self._receive(part, response, total, report)
            whole = True
        finally:
            if not whole:  # what is left in the connection belongs to this answer
                response.close()
            response.release_conn()
        if problem := _problem(item, part, response.headers):
            raise _Damaged(problem)
        if item.image and not item.hashes and not server_md5(response.headers, guess=True):
            with self._lock:
                self.without_checksum += 1
        return _finish(item, part)

    def _receive(
        self, part: _Part, response: "urllib3.BaseHTTPResponse", total: int | None, report: Callable[[int], None]
    ) -> None:
        mark, at_mark = time.monotonic(), part.length
        if part.validator and (total or 0) > LARGE:
            part.note.write_text(part.validator, encoding="latin-1")
        # Unbuffered: what was counted and hashed is in the file, also when the process is killed.
        with open(part.path, "r+b" if part.length else "wb", buffering=0) as file:
            file.truncate(part.length)
            file.seek(part.length)
            while True:
                try:
                    chunk = response.read1(CHUNK)
                except urllib3.exceptions.HTTPError as error:
                    raise self._retry(error) from error
                if not chunk:
                    break
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
                part.add(chunk)
                report(len(chunk))
                if self.stop.is_set():
                    raise Stopped
                now = time.monotonic()
                if now - mark > self.policy.stall:
                    if part.length - at_mark < SLOWEST * (now - mark):
                        raise _Retry(f"slower than {SLOWEST} bytes/s")
                    mark, at_mark = now, part.length
        if total is not None and part.length < total:
            raise _Retry(f"the connection ended after {part.length:,} of {total:,} bytes")


def _agree(item: Item, part: _Part, response: "urllib3.BaseHTTPResponse") -> int | None:
    """What the answer's headers promise: the file's whole size. Starts over where the server does."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _Damaged(f"the server sent it compressed as {headers['Content-Encoding']}, unasked")
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        fits = found and int(found[1]) == part.length and (not part.validator or part.validator in (etag, validator))
        if not fits:
            part.remove()
            raise _Retry("the server continued another part or version than the one here", now=True)
        total = int(found[3]) if found[3] != "*" else int(found[2]) + 1
    else:
        part.reset()
        part.note.unlink(missing_ok=True)
        total = content_length(response.headers)
    part.validator = validator
    if item.size is not None and total is not None and total != item.size:
        if item.image:  # the server contradicts its list; it may be a moment's trouble
            raise _Damaged(f"wrong size: {total:,} bytes at the server, {item.size:,} in its list")
        raise UserError(
            f"{item.url}: the server's file is another one than published ({total:,} bytes at the server, "
            f"{item.size:,} published); --trust-server takes it, for a mirror with files of its own"
        )
    return total


def _problem(item: Item, part: _Part, headers) -> str | None:
    """What is wrong with a part that should be the whole file: size, published hashes, the server's md5, markers."""
    if item.size is not None and part.length != item.size:
        return f"wrong size: {part.length:,} bytes, {item.size:,} expected"
    for name, begin in item.hashes:
        found = part.hashes[name].hexdigest()
        if not found.startswith(begin):
            return f"wrong hash: its {name} begins with {found[:8]}, expected {begin[:8]}"
    promised = server_md5(headers, guess=not item.hashes)
    if promised and promised != part.hashes["md5"].hexdigest():
        return f"wrong bytes: its md5 is {part.hashes['md5'].hexdigest()}, the server states {promised}"
    # A published image may lack its end marker: where a checksum was right, that is the file as it is published.
    return jpeg_problem(part.path, end=not (promised or item.hashes)) if item.image else None


def _finish(item: Item, part: _Part) -> int:
    if part.length > LARGE:
        with open(part.path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(part.path, item.path)
    part.note.unlink(missing_ok=True)
    return part.length


def is_right(item: Item) -> bool:
    """Whether the file is there with its size and hashes; without either, whether it is there."""
    if not item.path.is_file() or item.size not in (None, item.path.stat().st_size):
        return False
    for name, begin in item.hashes:
        with open(item.path, "rb") as file:
            digest = hashlib.file_digest(file, lambda name=name: hashlib.new(name, usedforsecurity=False))
        if not digest.hexdigest().startswith(begin):
            return False
    return True


def disk_message(error: OSError, path: Path) -> str:
    """What a person reads when a file cannot be written."""
    return (
        f"{error.filename or path}: {error.strerror or error}; free space or mend the folder, then run the same "
        "command again: it goes on where it stopped"
    )
