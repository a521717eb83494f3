"""Content that is gone for good once its row is deleted.

SQLite's `secure_delete` overwrites a deleted row, but not the copies that stay behind in a page
when the tree is balanced and its rows move to a neighbour. Only the part of a row in the leaf moves
like that; the rest lies in overflow pages, which stay where they are and are overwritten when they
are freed. So the part that may lie in a leaf is masked by a random key at the row's end, which
always lies in an overflow page: without it, what stays behind is noise.
"""

import hashlib
import secrets
from typing import Final, NamedTuple

from deltamem_vllm.sessions.sqlite_schema import PAGE_SIZE

_KEY_BYTES: Final = 32


class Shreddable(NamedTuple):
    """Two columns of a row; `key` must be the row's last."""

    content: bytes
    key: bytes
    """Of at least 32 bytes, of which the last 32 count: it also fills small rows up, so that they
    have an overflow page."""

    @classmethod
    def of(cls, plain: bytes) -> "Shreddable":
        """Mask `plain`."""
        key = secrets.token_bytes(_KEY_BYTES)
        return cls(_mask(plain, key), bytes(max(0, PAGE_SIZE - len(plain))) + key)


def revealed(content: bytes, key: bytes | None) -> bytes:
    """What was masked; rows of schema version 1 have no key, and are plain."""
    return content if key is None else _mask(content, key[-_KEY_BYTES:])


def _mask(content: bytes, key: bytes) -> bytes:
    """XOR what may lie in a leaf, which is less than a page, with a stream made of the key."""
    size = min(len(content), PAGE_SIZE)
    stream = hashlib.shake_256(key).digest(size)
    head = int.from_bytes(content[:size], "little") ^ int.from_bytes(stream, "little")
    return head.to_bytes(size, "little") + content[size:]
