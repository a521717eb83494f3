"""Records as bytes: one format byte, a checksum, then msgpack; the same on every store's disk."""

import struct
import zlib
from typing import Final, TypeVar

import msgspec

from deltamem_vllm.errors import StoreError
from deltamem_vllm.sessions.records import IngestJob, SessionContent

FORMAT: Final = 1
"""First byte of everything encoded. A later format must still read this one."""

_HEAD: Final = struct.Struct("<BI")

T = TypeVar("T")


def encode_content(content: SessionContent) -> bytes:
    """One version of a session, for `decode_content`."""
    return _seal(msgspec.msgpack.encode(content))


def decode_content(data: bytes) -> SessionContent:
    """The inverse of `encode_content`.

    Raises:
        StoreError: the bytes are damaged, or of a format that this version does not know.
    """
    return _decode(data, SessionContent)


def encode_job(job: IngestJob) -> bytes:
    """An ingest under way, for `decode_job`."""
    return _seal(msgspec.msgpack.encode(job))


def decode_job(data: bytes) -> IngestJob:
    """The inverse of `encode_job`.

    Raises:
        StoreError: as `decode_content`.
    """
    return _decode(data, IngestJob)


def _seal(body: bytes) -> bytes:
    return _HEAD.pack(FORMAT, zlib.crc32(body)) + body


def _decode(data: bytes, kind: type[T]) -> T:
    if len(data) < _HEAD.size:
        raise StoreError(f"the store holds a damaged record: it has only {len(data)} bytes.")
    number, checksum = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if number != FORMAT:
        raise StoreError(
            f"the store holds a record of format {number}; this version knows {FORMAT}. "
            "Open it with the deltamem-vllm that wrote it, or a newer one."
        )
    if zlib.crc32(body) != checksum:
        raise StoreError("the store holds a damaged record: its checksum does not fit.")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise StoreError(f"the store holds a damaged record: {error}.") from None
