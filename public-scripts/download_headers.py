"""What the headers of an HTTP answer say, read with care; used by download_fetch.py."""

import re
import time
from base64 import b64decode
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime


def server_md5(headers: Mapping[str, str]) -> str | None:
    """The md5 that an object store states for a whole file; an ETag is one where it has that form and no other key."""
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
    return etag[1] if etag and store and not own_key else None


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


def network_words(error: Exception) -> str:
    """An exception of urllib3 without its objects' addresses."""
    reason = getattr(error, "reason", None) or error
    text = re.sub(r"<[^>]*>|HTTPS?Connection(Pool)?\([^)]*\)", "", str(reason)).strip(" :")
    return text or type(reason).__name__
