"""The sizes of many objects from a bucket's own list, 1,000 an answer. Used by download.py."""

import sys
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote
from xml.etree import ElementTree

from dataprep.download_fetch import Client, Failed, Missing

WORTH_IT = 1000  # files; fewer are asked for one by one


def listed_sizes(client: Client, server: str, prefix: str, names: Collection[str]) -> dict[str, int]:
    """The sizes of those `names` that the bucket at `server` lists below `prefix` ("train/").

    Speaks S3's ListObjectsV2, which object stores and most mirrors of them understand. A server that does not gives {}.
    """
    wanted, sizes, lock = set(names), {}, threading.Lock()

    def walk(digit: str) -> None:
        token = ""
        while True:
            more = f"&continuation-token={quote(token, safe='')}" if token else ""
            answer = client.read(f"{server}/?list-type=2&prefix={quote(prefix + digit, safe='')}{more}")
            root = ElementTree.fromstring(answer)
            found = {
                entry.findtext("{*}Key", "").removeprefix(prefix): int(entry.findtext("{*}Size", "-1"))
                for entry in root.iterfind("{*}Contents")
            }
            with lock:
                sizes.update((name, size) for name, size in found.items() if name in wanted)
            token = root.findtext("{*}NextContinuationToken", "")
            if not token:
                return

    digits = sorted({name[0] for name in wanted})
    pool = ThreadPoolExecutor(16)
    try:
        list(pool.map(walk, digits))
    except (Missing, Failed, ElementTree.ParseError, ValueError) as error:
        print(f"note: {server} gives no list of its files ({error}); it is asked for each one", file=sys.stderr)
        return {}
    except BaseException:  # Ctrl-C: the threads should not finish their lists first
        client.stop.set()
        raise
    finally:
        pool.shutdown()
    return sizes
