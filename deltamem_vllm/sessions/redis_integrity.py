"""Goes through everything that a Redis store holds and compares what must agree."""

from typing import Final

from deltamem_vllm.errors import StoreError, StoreUnavailableError
from deltamem_vllm.sessions import codec
from deltamem_vllm.sessions.redis_server import RedisServer

_ATTEMPTS: Final = 5

_TOTALS: Final = (
    "sessions",
    "versions",
    "bytes",
    "by_use",
    "by_expiry",
    "by_lease",
    "by_reply",
    "by_job",
)


def check_integrity(server: RedisServer) -> None:
    """Check each session in one atomic step, and totals if nothing was written meanwhile.

    Raises:
        StoreError: names the first disagreement.
        StoreUnavailableError: the server does not answer, or others kept writing.
    """
    for _ in range(_ATTEMPTS):
        _, clock, *totals = server.call("check_totals", {})
        counted = _count(server)
        if server.call("check_totals", {})[1] != clock:
            continue
        for name, said, found in zip(_TOTALS, totals, counted, strict=True):
            if said != found:
                raise StoreError(
                    f"{server.where} is damaged: {name} says {said}, but its sessions make "
                    f"{found}. Restore a backup."
                )
        return
    raise StoreUnavailableError(
        f"{server.where}: others kept writing, so the totals could not be compared. Check again "
        "when the store is quiet."
    )


def _count(server: RedisServer) -> tuple[int, ...]:
    keys = set(server.scan())
    ids = {
        key.partition(b":")[2]
        for key in keys
        if key.startswith((b"session:", b"jobs:", b"replies:"))
    }
    rows = [row for session_id in sorted(ids) if (row := _check(server, session_id))]
    sums = [sum(column) for column in zip(*rows, strict=True)] or [0] * 7
    sessions, versions, size, expiring, leased, replies, jobs = sums
    return sessions, versions, size, sessions, expiring, leased, replies, jobs


def _check(server: RedisServer, session_id: bytes) -> tuple[int, ...]:
    verdict, *details = server.call("check_session", {}, session_id)
    shown = " / ".join(session_id.decode().split("\0"))
    if verdict != b"ok":
        raise StoreError(f"{server.where} is damaged: {shown} {details[0].decode()}.")
    counts, blobs = details[:7], details[7:]
    contents, jobs = blobs[: counts[1]], blobs[counts[1] :]
    try:
        for blob in contents:
            codec.decode_content(blob)
        for blob in jobs:
            codec.decode_job(blob)
    except StoreError as error:
        raise StoreError(f"{server.where}: {shown}: {error}") from None
    return tuple(counts)
