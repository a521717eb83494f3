"""Whose sessions a request may use: by its API key, or by a trusted gateway's header.

- neither keys file nor header configured: everybody is `public`;
- keys file alone: the tenant is the key's, and without a known key 401;
- header alone: the tenant is what the header says, and without it 401. Whoever reaches the server
  is trusted;
- both: the tenant is the key's, and 401 if the header names another. With a gateway's key (tenant
  `*`) the header names it, and 401 without it.

So a header never lifts a client above its own key: only a gateway's key may speak for others.
"""

import hashlib
import hmac
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.api.settings import ServerSettings, variable
from deltamem_vllm.errors import SessionError, SettingsError, UnauthorizedError
from deltamem_vllm.sessions import PUBLIC_TENANT
from deltamem_vllm.sessions.limits import check_name

logger = logging.getLogger(__name__)

ANY_TENANT: Final = "*"
"""Tenant of a gateway's key: the header says whom it speaks for."""

MAX_KEYS_FILE: Final = 16 << 20
"""Bytes."""

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")

Stamp = tuple[int, int, int]


class TenantResolver:
    """Finds the tenant of a request. May be used from any thread.

    The keys file is looked at before each request and read again when it changed. If it is damaged
    or gone by then, the keys read last stay valid: a slip of an editor locks nobody out, and lets
    nobody in.

    Args:
        settings: `tenant_keys_file` and `tenant_header` are used.

    Raises:
        SettingsError: the keys file cannot be read, or is not valid.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._header = settings.tenant_header
        self._path = settings.tenant_keys_file
        self._lock = threading.Lock()
        self._tenants: Mapping[bytes, str] = {}
        self._stamp: Stamp | None = None
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._tenants = self._read(self._path)

    def tenant(self, headers: Mapping[str, str]) -> str:
        """The tenant of a request with these headers, whatever the case of their names.

        Raises:
            UnauthorizedError: the request does not show whose sessions it may use.
        """
        named = self._named(headers)
        if self._path is None:
            if self._header is None:
                return PUBLIC_TENANT
            return self._required(named)
        tenant = self._tenant_of_key(headers)
        if tenant == ANY_TENANT:
            return self._required(named)
        if named not in (None, tenant):
            raise UnauthorizedError(
                f"the header {self._header} names another tenant than the API key does. Leave the "
                "header out, or use a gateway's key."
            )
        return tenant

    def _named(self, headers: Mapping[str, str]) -> str | None:
        """What the trusted header says; None if there is none, or if it is not trusted."""
        if self._header is None:
            return None
        values = _values(headers, self._header)
        if len(values) > 1:
            raise UnauthorizedError(f"the header {self._header} is there more than once.")
        return values[0] if values else None

    def _required(self, named: str | None) -> str:
        if named is None:
            raise UnauthorizedError(
                f"the request names no tenant: the gateway has to set the header {self._header}."
            )
        try:
            _check_tenant(named)
        except SessionError as error:
            raise UnauthorizedError(f"the header {self._header}: {error}") from None
        return named

    def _tenant_of_key(self, headers: Mapping[str, str]) -> str:
        values = _values(headers, "authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError(
                "sessions need an API key: send one header Authorization: Bearer KEY."
            )
        digest = hashlib.sha256(_sent(key.strip())).digest()
        found = None
        # Through all of them, however soon one fits: time must not tell which it was.
        for known, tenant in self._current().items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise UnauthorizedError("this API key is not known.")
        return found

    def _current(self) -> Mapping[bytes, str]:
        """Digest of a key -> tenant, as the file says now."""
        assert self._path is not None
        with self._lock:
            # Before reading: a file that changes meanwhile is read once more.
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._tenants = self._read(self._path)
                    logger.info("delta-mem: read %d API keys anew", len(self._tenants))
                except SettingsError as error:
                    logger.error("delta-mem: the API keys stay as they were: %s", error)
            return self._tenants

    def _read(self, path: Path) -> dict[bytes, str]:
        tenants = read_keys(path)
        if self._header is None and ANY_TENANT in tenants.values():
            raise SettingsError(
                f"{path} has a gateway's key (tenant {ANY_TENANT!r}), but "
                f"{variable('tenant_header')} does not say in which header a gateway names tenants."
            )
        return tenants


def read_keys(path: Path) -> dict[bytes, str]:
    """The keys of a file, by their sha256.

    Raises:
        SettingsError: the file cannot be read, or an entry is not valid. Keys are not shown.
    """
    where = f"{variable('tenant_keys_file')}: {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEYS_FILE + 1)
    except OSError as error:
        raise SettingsError(f"{where} cannot be read ({error.strerror}).") from None
    if len(content) > MAX_KEYS_FILE:
        raise SettingsError(f"{where} has more than {MAX_KEYS_FILE:,} bytes.")
    try:
        entries: Any = json.loads(content, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(entries, _Pairs):
        raise SettingsError(f'{where} is no JSON object such as {{"KEY": "tenant"}}.')
    tenants: dict[bytes, str] = {}
    for number, (key, tenant) in enumerate(entries, start=1):
        try:
            digest = _digest(key)
            if not isinstance(tenant, str):
                raise SettingsError("its tenant is no string.")
            if tenant != ANY_TENANT:
                _check_tenant(tenant)
        except (SettingsError, SessionError) as error:
            raise SettingsError(f"{where}, entry {number}: {error}") from None
        if tenants.setdefault(digest, tenant) != tenant:
            raise SettingsError(f"{where}, entry {number}: the key is there for another tenant.")
    return tenants


class _Pairs(list[tuple[str, Any]]):
    """A JSON object's entries; a dict would hide a key that is there twice."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__(pairs)


def _digest(key: str) -> bytes:
    if not key.startswith("sha256:"):
        if not key.strip():
            raise SettingsError("the key is empty.")
        return hashlib.sha256(key.encode()).digest()
    match = _DIGEST.fullmatch(key.lower())
    if match is None:
        raise SettingsError("expected 64 hexadecimal digits after sha256:.")
    return bytes.fromhex(match[1])


def _check_tenant(tenant: str) -> None:
    check_name("a tenant", tenant)
    if tenant == ANY_TENANT:
        raise SessionError(f"{ANY_TENANT!r} is no tenant's name.")


def _sent(key: str) -> bytes:
    """The bytes of a header's value, which servers decode as Latin-1 whatever the client meant."""
    return key.encode("latin-1", "backslashreplace")


def _values(headers: Mapping[str, str], name: str) -> list[str]:
    """All values of a header; servers keep repeated ones apart."""
    return [value for key, value in headers.items() if key.lower() == name.lower()]


def _stamp(path: Path) -> Stamp | None:
    """Changes when the file does; None without one."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
