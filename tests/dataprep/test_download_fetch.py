"""One file from a server that breaks every promise: it arrives whole and right, or the reason is told."""

import errno
import hashlib
import itertools
import os
import threading
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dataprep import download_fetch, download_headers
from dataprep.download_fetch import Client, Failed, Item, Missing, RetryPolicy, Stopped
from detcore import UserError
from tests.dataprep.download_server import running

CONTENT = bytes(range(256)) * 400
OTHER = bytes(reversed(CONTENT))
PATH = "/folder/file.bin"


class Clock(threading.Event):
    """An Event whose waits are noted and take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return self.is_set()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running() as server:
        server.files[PATH] = CONTENT
        yield server


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(clock):
    return Client(4, RetryPolicy(attempts=4, stall=20), clock)


def item(server, folder, **known):
    return Item(server.url + PATH, folder / "file.bin", **known)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("etags", [True, False])
def test_arrives(server, client, tmp_path, etags):
    server.etags = etags
    heard = []
    assert client.fetch(item(server, tmp_path / "new"), heard.append) == (len(CONTENT), len(CONTENT))
    assert contents(tmp_path / "new") == {"file.bin": CONTENT}
    assert sum(heard) == len(CONTENT) and client.retries == 0


def test_empty_file(server, client, tmp_path):
    server.files[PATH] = b""
    assert client.fetch(item(server, tmp_path)) == (0, 0)
    assert contents(tmp_path) == {"file.bin": b""}


def test_dropped_connections_are_continued(server, client, tmp_path):
    server.faults[PATH] = [{"drop": 1000}, {"drop": 1}, {"drop": 0}, {"drop": 50000}]
    assert client.fetch(item(server, tmp_path)) == (len(CONTENT), len(CONTENT))
    assert contents(tmp_path) == {"file.bin": CONTENT}
    tag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert [(r, c) for _, _, r, c in server.log] == [
        (None, None), ("bytes=1000-", tag), ("bytes=1001-", tag), ("bytes=1001-", tag), ("bytes=51001-", tag)
    ]  # fmt: skip


def test_progress_renews_the_attempts(server, client, tmp_path):
    server.faults[PATH] = [{"drop": 1000}] * 20
    assert client.fetch(item(server, tmp_path))[0] == len(CONTENT)
    assert contents(tmp_path) == {"file.bin": CONTENT}


def test_a_server_without_validators_starts_over(server, client, tmp_path):
    server.etags = False
    server.faults[PATH] = [{"drop": 1000}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}


@pytest.mark.parametrize("fault", [{"lie": 70000}, {"lie": 0}, {"wrong": 1}, {"encoding": "gzip"}], ids=str)
def test_wrong_bytes_are_fetched_again(server, client, tmp_path, fault):
    server.faults[PATH] = [fault, {"drop": 10}, fault]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "wrong bytes"),
        ({"size": len(CONTENT) + 1, "image": True}, "wrong size: 102,400 bytes at the server, 102,401 in its list"),
        ({"hashes": (("sha256", "01234567"),)}, "wrong hash"),
    ],
)
def test_wrong_bytes_are_refused_in_the_end(server, client, tmp_path, known, words):
    server.faults[PATH] = [{} if known else {"wrong": 1}] * 9
    with pytest.raises(Failed, match=words):
        client.fetch(item(server, tmp_path, **known))
    assert contents(tmp_path) == {}
    assert len(server.log) == download_fetch.DAMAGED_LIMIT


def test_an_etag_that_is_no_md5_is_not_taken_for_one(server, client, tmp_path):
    server.store, server.etags = False, "nginx"
    server.faults[PATH] = [{"wrong": 1}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path)["file.bin"] != CONTENT


def test_google_states_md5_in_a_header_of_its_own():
    digest = hashlib.md5(b"hello")
    text = b64encode(digest.digest()).decode()
    assert download_headers.server_md5({"x-goog-hash": f"crc32c=mnG7TA==, md5={text}"}) == digest.hexdigest()
    assert download_headers.server_md5({"Content-MD5": text}) == digest.hexdigest()
    assert download_headers.server_md5({"Content-MD5": text, "Content-Range": "bytes 1-2/3"}) is None
    key = {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}
    assert download_headers.server_md5(key) is None
    assert download_headers.server_md5({"ETag": f'"{"0" * 32}-7"', "x-amz-id": ""}) is None


@pytest.mark.parametrize("status", [404, 410])
def test_missing_is_no_reason_to_insist(server, client, tmp_path, status):
    server.faults[PATH] = [{"status": status}]
    with pytest.raises(Missing, match=f"file.bin: {status}"):
        client.fetch(item(server, tmp_path))
    assert len(server.log) == 1


@pytest.mark.parametrize("status", [400, 401, 403])
def test_refusals_are_final(server, client, tmp_path, status):
    server.faults[PATH] = [{"status": status}]
    with pytest.raises(Failed, match=f"could not be fetched: the server answered {status}"):
        client.fetch(item(server, tmp_path))
    assert len(server.log) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_respected(server, client, clock, tmp_path, status):
    server.faults[PATH] = [{"status": status, "headers": {"Retry-After": "77"}}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}
    assert clock.waits[0] == 77
    other = item(server, tmp_path / "other")
    client.fetch(other)
    assert 70 < clock.waits[-1] <= 77, "the other threads wait as well"


def test_retry_after_may_be_a_date(monkeypatch):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(download_headers.time, "time", now.timestamp)
    assert download_headers.retry_after(format_datetime(now + timedelta(seconds=30))) == 30
    assert download_headers.retry_after(format_datetime(now - timedelta(seconds=30))) == 0
    assert download_headers.retry_after("soon") is None


def test_an_absurd_retry_after_is_capped(server, client, clock, tmp_path):
    server.faults[PATH] = [{"status": 429, "headers": {"Retry-After": "99999999"}}]
    client.fetch(item(server, tmp_path))
    assert clock.waits[0] == download_fetch.LONGEST_RETRY_AFTER


def test_500_is_retried_with_growing_capped_waits(server, clock, tmp_path):
    client = Client(1, RetryPolicy(attempts=9, delay=1, longest=10), clock)
    server.faults[PATH] = [{"status": 500}] * 9
    with pytest.raises(Failed, match="the server answered 500"):
        client.fetch(item(server, tmp_path))
    full = [1, 2, 4, 8, 10, 10, 10, 10]
    assert len(clock.waits) == len(full)
    assert all(top / 2 <= wait <= top for top, wait in zip(full, clock.waits, strict=True))


def test_range_ignored(server, client, tmp_path):
    server.faults[PATH] = [{"drop": 60000}, {"ignore_range": 1, "drop": 10}, {"ignore_range": 1}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}


@pytest.mark.parametrize("obeys", [True, False], ids=["if-range", "if-range ignored"])
def test_another_version_midway(server, client, tmp_path, obeys):
    server.store, server.etags = False, "nginx"  # only the ETag's change can tell, no md5
    server.faults[PATH] = [{"drop": 60000}, {"new": OTHER} if obeys else {"new": OTHER, "ignore_if_range": 1}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": OTHER}


def test_a_stalled_connection_is_given_up(server, clock, tmp_path):
    server.faults[PATH] = [{"drop": 100, "hang": 1}]
    Client(1, RetryPolicy(stall=0.2), clock).fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}
    assert server.log[1][2] == "bytes=100-"
    client = Client(1, RetryPolicy(stall=0.2), clock)
    server.faults[PATH] = [{"silent": 1}]
    client.fetch(item(server, tmp_path))
    assert client.last_reason == "no data for 0.2 s from 127.0.0.1"


def test_a_trickle_is_a_stall(server, clock, tmp_path, monkeypatch):
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(download_fetch.time, "monotonic", lambda: next(hours))

    class Trickle:
        def read1(self, size):
            return b"x"

    client, wanted = Client(1, RetryPolicy(attempts=1), clock), item(server, tmp_path)
    part = download_fetch._Part(wanted)
    with pytest.raises(Failed, match="slower than 1024 bytes/s"):
        client._persist(wanted, lambda: client._receive(part, Trickle(), 9, lambda count: None), None, lambda: 0)


def test_nobody_there(clock, tmp_path):
    client = Client(1, RetryPolicy(attempts=2), clock)
    with pytest.raises(Failed, match="Connection refused"):
        client.fetch(Item("http://127.0.0.1:1/x", tmp_path / "x"))
    with pytest.raises(Failed, match="is no address"):
        client.fetch(Item("http://", tmp_path / "x"))


def test_a_later_run_continues_with_hash_or_etag(server, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(download_fetch, "LARGE", 1000)
    for known in ({}, {"hashes": (("sha256", hashlib.sha256(CONTENT).hexdigest()[:8]),)}):
        folder = tmp_path / str(len(known))
        server.faults[PATH] = [{"drop": 60000}, {"status": 500}]
        with pytest.raises(Failed):
            Client(1, RetryPolicy(attempts=1), clock).fetch(item(server, folder, **known))
        assert contents(folder)["file.bin.part"] == CONTENT[:60000]
        server.log.clear()
        server.faults.clear()
        Client(1, RetryPolicy(), clock).fetch(item(server, folder, **known))
        assert server.log[0][2] == "bytes=60000-"
        assert contents(folder) == {"file.bin": CONTENT}


def test_a_part_that_nothing_is_known_of_is_not_continued(server, client, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"rubbish")
    server.store = False
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}


def test_stop(server, client, tmp_path):
    with pytest.raises(Stopped):
        client.fetch(item(server, tmp_path), lambda count: client.stop.set())
    assert "file.bin" not in contents(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_errors_are_about_the_disk(server, client, tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number), str(tmp_path / "file.bin.part"))

    monkeypatch.setattr(download_fetch._Part, "add", refuse)
    with pytest.raises(UserError, match=r"file\.bin\.part: .*free space or mend the folder"):
        client.fetch(item(server, tmp_path))


def test_proxies_of_the_environment(server, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:secret@"))
    monkeypatch.setenv("no_proxy", "")
    address = "http://elsewhere.invalid/file.bin"
    server.files[address] = CONTENT
    Client(1, RetryPolicy(attempts=1), clock).fetch(Item(address, tmp_path / "file.bin"))
    assert contents(tmp_path) == {"file.bin": CONTENT}


def test_size_by_head(server, client):
    assert client.size_of(server.url + PATH) == len(CONTENT)
    with pytest.raises(Missing):
        client.size_of(server.url + "/absent")
    assert server.got(method="GET") == []


JPEG = b"\xff\xd8\xff" + b"picture" * 50 + b"\xff\xd9"
NO_END, NO_BEGIN = JPEG[:-2] + b"..", b"<html>" + JPEG[6:]


@pytest.mark.parametrize(
    ("body", "words"),
    [(NO_END, "its end marker ff d9 is missing"), (NO_BEGIN, "it begins with 3c 68 74, not"), (b"", "with nothing")],
)
@pytest.mark.parametrize("etags", [False, "nginx"])
def test_an_image_is_known_by_its_markers(server, client, tmp_path, body, words, etags):
    server.store, server.etags, server.files[PATH] = False, etags, body
    server.faults[PATH] = [{}, {"new": JPEG}]
    client.fetch(item(server, tmp_path, image=True, size=len(JPEG) if body else None))
    assert contents(tmp_path) == {"file.bin": JPEG} and client.without_checksum == 1
    assert words in client.last_reason
    server.files[PATH] = body
    with pytest.raises(Failed, match=f"arrived damaged 3 times .*{words}"):
        client.fetch(item(server, tmp_path / "other", image=True))
    assert contents(tmp_path / "other") == {} and client.without_checksum == 1


@pytest.mark.parametrize("more", [b"", bytes(60), b"camera"])
def test_a_few_bytes_may_follow_the_end_marker(server, client, tmp_path, more):
    server.etags, server.files[PATH] = False, JPEG + more
    client.fetch(item(server, tmp_path, image=True))
    assert contents(tmp_path) == {"file.bin": JPEG + more}


@pytest.mark.parametrize("store", [True, False])
def test_a_right_checksum_excuses_a_missing_end_marker(server, client, tmp_path, store):
    server.store, server.files[PATH] = store, NO_END
    client.fetch(item(server, tmp_path, image=True))
    assert contents(tmp_path) == {"file.bin": NO_END} and client.without_checksum == 0


def test_an_etag_that_looks_like_md5_is_compared(server, client, tmp_path):
    server.store = False
    server.faults[PATH] = [{"wrong": 1}]
    client.fetch(item(server, tmp_path))
    assert contents(tmp_path) == {"file.bin": CONTENT}
    assert "wrong bytes" in client.last_reason
    # Published hashes say more than a guess.
    wrong = bytes(255 - value for value in CONTENT)
    server.faults[PATH] = [{"wrong": 1}]
    client.fetch(item(server, tmp_path, hashes=(("sha256", hashlib.sha256(wrong).hexdigest()),)))
    assert contents(tmp_path) == {"file.bin": wrong}
    assert download_headers.server_md5({"ETag": f'W/"{"0" * 32}"'}, guess=True) is None


def test_another_file_than_published_is_not_fetched(server, client, tmp_path):
    words = "another one than published \\(102,400 bytes at the server, 7 published\\); --trust-server takes it"
    with pytest.raises(UserError, match=words):
        client.fetch(item(server, tmp_path, size=7))
    assert len(server.log) == 1 and contents(tmp_path) == {}
