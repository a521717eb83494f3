"""Whether a Redis server keeps what it acknowledges; asked on every new connection.

A connection is also new after a fail-over or a restart with other settings, so nothing needs to
be remembered of the server before.
"""

from collections.abc import Callable
from typing import Any, Final

import redis

from deltamem_vllm.errors import StoreError, StoreUnavailableError
from deltamem_vllm.sessions.redis_url import RedisLocation

Ask = Callable[..., Any]
"""Sends one command on one connection and returns the raw answer."""

_OLDEST: Final = (7, 0)
"""Scripts that declare whether they write, and may delete when memory is full, came with it."""

_OLDEST_WAITAOF: Final = (7, 2)

_HIDDEN: Final = (
    "hides its settings (CONFIG is refused), so nobody can see whether acknowledged turns "
    "survive. Allow CONFIG GET to this user, or, if the provider promises durable writes, add "
    "trust_durability=1 to the URL."
)


def check_server(ask: Ask, location: RedisLocation) -> list[str]:
    """Refuse a server that could drop acknowledged writes or divide the store's keys.

    Returns:
        Facts for a person.

    Raises:
        StoreError: says what to set.
        StoreUnavailableError: it is a replica.
        redis.RedisError: the server did not answer.
    """
    where = location.shown
    info = _info(ask, where)
    version = info.get("redis_version", "0")
    _check_version(where, version, _OLDEST, "the store's scripts")
    if info.get("cluster_enabled", "0") != "0":
        raise StoreError(
            f"{where} is a node of a Redis Cluster. All keys of a store are in one hash slot, so "
            "a cluster would not spread them, and this client follows no redirections. Give the "
            "store a server with cluster-enabled no (with replicas, if you like)."
        )
    if info.get("role", "master") != "master":
        # It may be one only until a fail-over is through.
        raise StoreUnavailableError(
            f"{where} is a replica, which takes no writes. Give the primary's address; INFO "
            f"replication names it: {info.get('master_host', '?')}:{info.get('master_port', '?')}."
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreError(
            f"{where} has maxmemory-policy {policy}, which drops sessions when memory is full. "
            "Set maxmemory-policy noeviction."
        )
    facts = [
        f"Redis {version} at {where}, run id {info.get('run_id', 'hidden')}",
        _check_durability(ask, location, version),
        f"{info.get('used_memory_human', '?')} of memory used, "
        f"maxmemory {info.get('maxmemory_human', '?')}, policy {policy}",
    ]
    _check_last_writes(where, info)
    return facts


def _info(ask: Ask, where: str) -> dict[str, str]:
    try:
        answer = ask("INFO")
    except redis.exceptions.NoPermissionError as error:
        raise StoreError(
            f"{where} does not let this user ask INFO, which tells whether it is a primary: "
            "ACL SETUSER with +info."
        ) from error
    lines = bytes(answer).decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _check_version(where: str, version: str, oldest: tuple[int, int], what: str) -> None:
    numbers = [int(part) if part.isdecimal() else 0 for part in version.split(".")]
    if tuple(numbers[:2]) < oldest:
        raise StoreError(
            f"{where} is Redis {version}; {what} need {oldest[0]}.{oldest[1]} or newer."
        )


def _check_durability(ask: Ask, location: RedisLocation, version: str) -> str:
    where = location.shown
    if location.waitaof:
        _check_version(where, version, _OLDEST_WAITAOF, "waitaof=1 and the command WAITAOF")
    settings = _settings(ask)
    if settings is None:
        if not location.trust_durability:
            raise StoreError(f"{where} {_HIDDEN}")
        return "durability is trusted (trust_durability=1): the server hides its settings"
    if settings.get("appendonly") != "yes":
        raise StoreError(
            f"{where} has appendonly {settings.get('appendonly')}: a restart would lose "
            "acknowledged turns. Set appendonly yes and appendfsync always."
        )
    fsync = settings.get("appendfsync")
    if location.waitaof:
        if fsync == "no":
            raise StoreError(
                f"{where} has appendfsync no: WAITAOF would wait for the operating system's "
                "whim. Set appendfsync everysec or always."
            )
        return f"appendonly yes, appendfsync {fsync}, and WAITAOF after each write"
    if fsync != "always":
        raise StoreError(
            f"{where} has appendfsync {fsync}: a power cut would lose acknowledged turns. Set "
            "appendfsync always, or add waitaof=1 to the URL (Redis 7.2 or newer)."
        )
    if settings.get("no-appendfsync-on-rewrite") == "yes":
        raise StoreError(
            f"{where} has no-appendfsync-on-rewrite yes, which suspends fsync while the log is "
            "rewritten. Set no-appendfsync-on-rewrite no."
        )
    return "appendonly yes, appendfsync always"


def _settings(ask: Ask) -> dict[str, str] | None:
    """The settings that matter; None where the server hides them."""
    try:
        answer = ask("CONFIG", "GET", "*append*")
    except redis.ResponseError:
        return None
    texts = [bytes(text).decode() for text in answer]
    return dict(zip(texts[::2], texts[1::2], strict=True)) or None


def _check_last_writes(where: str, info: dict[str, str]) -> None:
    for name, what in (
        ("aof_last_write_status", "its log"),
        ("aof_last_bgrewrite_status", "a rewritten log"),
    ):
        if info.get(name, "ok") != "ok":
            raise StoreError(
                f"{where} could not write {what} ({name}: {info[name]}). Look at its disk."
            )
