"""What the headers of an HTTP answer and the markers of a JPEG say, read with care; used by download_fetch.py."""

import os
import re
import time
from base64 import b64decode
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

END_WITHIN = 64  # bytes; some cameras and programs write a few more after the JPEG's end marker


def server_md5(headers: Mapping[str, str], guess: bool = False) -> str | None:
    """The md5 that an object store states for a whole file; an ETag is one where it has that form and no other key.

    guess: take an ETag of that form for an md5 from any server. Those of nginx and Apache have another form.
    """
    stated = re.findall(r"md5=([\w+/=]+)", headers.get("x-goog-hash", ""))
    if "Content-Range" not in headers:  # of a range, Content-MD5 is the range's own
        stated.append(headers.get("Content-MD5", ""))
    for text in stated:
        with suppress(ValueError):
            if len(raw := b64decode(text, validate=True)) == 16:
                return raw.hex()
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    own_key = "kms" in headers.get("x-amz-server-side-encryption", "") or any(
        name.lower().startswith("x-amz-server-side-encryption-customer") for name in headers
    )
    store = any(name.lower().startswith(("x-amz-", "x-goog-")) for name in headers)
    return etag[1] if etag and (store or guess) and not own_key else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """The size that an answer states, if it does."""
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdecimal() else None


def retry_after(text: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def jpeg_problem(path: Path, end: bool) -> str | None:
    """Why a file is no JPEG, by its first bytes and, where `end` is asked for, the marker that ends it."""
    with open(path, "rb") as file:
        begin = file.read(3)
        file.seek(max(0, os.fstat(file.fileno()).st_size - END_WITHIN))
        tail = file.read()
    if begin != b"\xff\xd8\xff":
        return f"no JPEG: it begins with {begin.hex(' ') or 'nothing'}, not with ff d8 ff"
    if end and b"\xff\xd9" not in tail:
        return "a cut or changed JPEG: its end marker ff d9 is missing"
    return None


def network_reason(error: Exception, stall: float) -> str:
    """An exception of urllib3 without its objects' addresses. stall: seconds after which a silent server is left."""
    reason = getattr(error, "reason", None) or error
    if type(reason).__name__ == "ReadTimeoutError":
        return f"no data for {stall:g} s from {getattr(reason.pool, 'host', 'the server')}"
    text = re.sub(r"<[^>]*>|HTTPS?Connection(Pool)?\([^)]*\)", "", str(reason)).strip(" :")
    return text or type(reason).__name__
