"""Where a Redis store is: its URL and our options in it, apart from what redis-py makes of it."""

import math
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from deltamem_vllm.errors import StoreError

SCHEMES: Final = ("redis", "rediss", "unix")

_CLIENT_OPTIONS: Final = frozenset(
    {"db", "username", "password", "client_name", "max_connections"}
    | {f"ssl_{name}" for name in ("ca_certs", "ca_path", "certfile", "keyfile", "password")}
    | {"ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version", "ssl_ciphers"}
)
"""What redis-py takes from a URL and a store may leave to it."""


@dataclass(frozen=True)
class RedisLocation:
    """A store's address, taken apart."""

    client_url: str = field(repr=False)
    """For redis-py; may hold a password."""

    shown: str
    """For messages; never holds one."""

    prefix: str
    """Before all keys of the store, with a hash tag: one Redis may hold several stores."""

    timeout: float
    """Seconds that one answer may take."""

    waitaof: bool
    """Make each write durable by WAITAOF, not by appendfsync always."""

    trust_durability: bool
    """Take the provider's word where the server hides its settings."""


def parse_redis_url(url: str) -> RedisLocation:
    """Take a URL apart.

    Raises:
        StoreError: it is malformed, or an option is unknown; values are not shown.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in SCHEMES:
        raise StoreError("a Redis store is redis://, rediss:// or unix://, not what was given.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise StoreError(
            f"the {scheme}:// URL of the store is malformed: give it as {scheme}://host:port/0."
        ) from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    location = RedisLocation(
        client_url="",
        shown=_shown(scheme, parts.hostname, port, parts.path, options),
        prefix="{" + _prefix(options.pop("prefix", "deltamem")) + "}:",
        timeout=_seconds(options.pop("timeout", "5")),
        waitaof=_switch("waitaof", options.pop("waitaof", "0")),
        trust_durability=_switch("trust_durability", options.pop("trust_durability", "0")),
    )
    if scheme != "rediss" and (tls := [name for name in options if name.startswith("ssl_")]):
        raise StoreError(f"{location.shown}: {tls[0]} belongs to rediss:// URLs.")
    if unknown := sorted(set(options) - _CLIENT_OPTIONS):
        raise StoreError(
            f"{location.shown}: unknown option {unknown[0]!r}; the store takes prefix, timeout, "
            f"waitaof, trust_durability, and for redis-py {', '.join(sorted(_CLIENT_OPTIONS))}."
        )
    client_url = f"{scheme}://{parts.netloc}{parts.path}?{urlencode(options)}"
    return RedisLocation(**{**vars(location), "client_url": client_url})


def _shown(
    scheme: str, host: str | None, port: int | None, path: str, options: dict[str, str]
) -> str:
    if scheme == "unix":
        return f"unix://{path}"
    database = path.strip("/") or options.get("db", "0")
    where = f"{scheme}://{host or 'localhost'}:{port or 6379}"
    if not database.isdecimal():
        raise StoreError(f"{where}: the database after the port is a number such as 0.")
    return f"{where}/{database}"


def _prefix(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= 64 or set(text) & set("{}"):
        raise StoreError(
            f"prefix={text!r}: the prefix of a store's keys is 1 to 64 characters that print, "
            "without braces."
        )
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise StoreError(f"timeout={text!r}: give the seconds that one answer may take, as 5.")
    return seconds


def _switch(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise StoreError(f"{name}={text!r}: give 1 or 0.")
    return text == "1"
