"""sha256 of large files, remembered.

Weights are many GB, and a server should not read them twice at each start. A digest is remembered
under the file's device, inode, size and times, and a file of the Hugging Face cache carries its
own: the cache names large files by their sha256.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.adapter.files import write_atomically

logger = logging.getLogger(__name__)

REMEMBERED_BYTES: Final = 1 << 20
"""Smaller files are read each time, which costs less than a look into the cache."""

SETTLED_S: Final = 2.0
"""A file changed less than this ago might change again within the same tick of its times."""

MAX_ENTRIES: Final = 4096
THREADS: Final = 8
"""One thread reads and hashes about 0.5 to 2 GB/s; from here on the disk is the limit."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def cache_file() -> Path:
    """Where digests are remembered: `$XDG_CACHE_HOME/deltamem/digests.json`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "deltamem" / "digests.json"


def file_digests(paths: Iterable[Path]) -> list[str]:
    """sha256 (hex) of each file, in order; several files are read at once.

    Raises:
        OSError: a file cannot be read.
    """
    listed = list(paths)
    remembered = _load()
    before = dict(remembered)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda path: _digest(path, remembered), listed))
    if remembered != before:
        _save(remembered)
    return digests


def _digest(path: Path, remembered: dict[str, str]) -> str:
    real = path.resolve(strict=True)
    named = _named_digest(real)
    if named is not None:
        return named
    with real.open("rb") as file:
        key = _key(os.fstat(file.fileno()))
        digest = remembered.get(key)
        if digest is None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            status = os.fstat(file.fileno())
            settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
            if settled and status.st_size >= REMEMBERED_BYTES and _key(status) == key:
                remembered[key] = digest
    return digest


def _named_digest(real: Path) -> str | None:
    """The digest that the Hugging Face cache named a file by; small files have other names."""
    blobs = real.parent
    in_cache = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    return real.name if in_cache and _SHA256.fullmatch(real.name) else None


def _key(status: os.stat_result) -> str:
    # The change time cannot be set by hand, as copying tools do with the other.
    parts = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return ":".join(map(str, parts))


def _load() -> dict[str, str]:
    try:
        content: Any = json.loads(cache_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: digest
        for key, digest in content.items()
        if isinstance(digest, str) and _SHA256.fullmatch(digest)
    }


def _save(remembered: dict[str, str]) -> None:
    """Two processes may save at once; what one of them loses is only read again."""
    newest = dict(list({**_load(), **remembered}.items())[-MAX_ENTRIES:])
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(newest, indent=1).encode())
    except OSError as error:
        logger.info("delta-mem: %s cannot be written (%s); weights are read again", path, error)
