"""`ServerSettings`: what an operator can set about sessions, from environment variables.

The model below is the only place where a setting, its default and its meaning are written down;
`docs/configuration.md` is made from it:

    python -m deltamem_vllm.api.settings docs/configuration.md
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from deltamem_vllm.errors import SettingsError
from deltamem_vllm.sessions.limits import MAX_REPLY
from deltamem_vllm.sessions.store import StoreOptions

ENV_PREFIX: Final = "DELTAMEM_"

NO_STORE: Final = "none"
"""The store's URL of a server that has ephemeral memory only."""

STORE_SCHEMES: Final = ("sqlite", "redis", "rediss", "unix")

OTHER_VARIABLES: Final = frozenset({"DELTAMEM_ALLOW_UNTESTED_VLLM", "DELTAMEM_ALLOW_UNTESTED_RAY"})
"""Variables of our prefix that other parts of the package read."""

MAX_SECRET: Final = 64
"""Bytes that BLAKE2b takes as its key."""

TABLE_BEGIN: Final = "<!-- settings: begin -->"
TABLE_END: Final = "<!-- settings: end -->"

_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""An HTTP header's name (RFC 9110, section 5.6.2)."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServerSettings(BaseSettings):
    """Read from the environment: the field `store` from `DELTAMEM_STORE`, and so on.

    Raises:
        SettingsError: a value is not valid; the message names the variable.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    store: str = NO_STORE
    """Where sessions are kept: `sqlite:///path/to/file.db` (one machine), `redis://host:port/0`
    (several machines), or `none` for ephemeral memory only."""

    versions_kept: int = Field(default=4, ge=1, le=1000)
    """Versions of a session that can still be read, rolled back to or forked from."""

    reply_seconds: Seconds = 86400.0
    """How long the reply of a named turn is kept, so that a retry gets it again."""

    tenant_sessions: int | None = Field(default=None, ge=1)
    """Sessions that one tenant may have."""

    tenant_bytes: int | None = Field(default=None, ge=1)
    """Bytes of states, all versions kept, that one tenant may have."""

    max_sessions: int | None = Field(default=None, ge=1)
    """Sessions in the store; a sweep removes the longest unused ones above it."""

    lease_seconds: Seconds = 30.0
    """How long a session stays locked after the server that ran its turn died."""

    max_wait_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long a turn waits for the turns before it on its session, unless the request says."""

    max_queue: int = Field(default=32, ge=0)
    """Turns that may wait on one session; one more is answered 429."""

    max_queue_total: int = Field(default=1024, ge=0)
    """Turns that may wait on all sessions of a server process; one more is answered 429."""

    segment_tokens: int = Field(default=8192, ge=1)
    """Tokens of one segment of an ingest; a new session keeps the number it began with."""

    max_reply_bytes: int = Field(default=4 << 20, ge=0, le=MAX_REPLY)
    """Largest reply of a named turn that is kept; a larger one is given once and not again."""

    max_ingest_bytes: int = Field(default=64 << 20, ge=1)
    """Largest body of an ingest or an import; a larger one is answered 413."""

    sweep_seconds: Seconds = 60.0
    """How often expired sessions, replies and ingests are removed."""

    usage_log: bool = False
    """Write one line of JSON per request with a memory to the log: see [metrics.md](metrics.md)."""

    tenant_keys_file: Path | None = None
    """JSON object from API key to tenant. A key may be given as `sha256:` and the 64 hexadecimal
    digits of its digest; several keys may name one tenant; the tenant `*` marks a gateway's key,
    see below. The file is read again when it changes."""

    tenant_header: str | None = None
    """Header in which a trusted gateway names the tenant, such as `X-Tenant`. Set it only where
    clients cannot reach the server past the gateway, or together with a gateway's key."""

    hash_secret: SecretStr = SecretStr("")
    """Keys the hashes of written messages, up to 64 bytes: without it, whoever can read the store
    can find out whether a message that he guesses was written. All servers of a store need the
    same; after a change, histories written before count as other ones."""

    fingerprint_alias: str | None = Field(default=None, min_length=1, max_length=256)
    """Stands for the digests of weights, config and quantisation: servers with the same alias share
    sessions, for instance a quantised and an unquantised one. You vouch that their states mean the
    same."""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)  # type: ignore[arg-type]  # fields, and settings of pydantic
        except ValidationError as error:
            problems = "; ".join(_problem(dict(item)) for item in error.errors())
            raise SettingsError(f"the server's settings are not valid: {problems}") from None

    @field_validator("store")
    @classmethod
    def _known_store(cls, url: str) -> str:
        scheme, separator, _ = url.partition("://")
        if url != NO_STORE and not (separator and scheme in STORE_SCHEMES):
            raise ValueError(
                f"expected sqlite:///path/to/file.db, redis://host:port/0 or {NO_STORE}"
            )
        return url

    @field_validator("hash_secret")
    @classmethod
    def _key_size(cls, secret: SecretStr) -> SecretStr:
        if len(secret.get_secret_value().encode()) > MAX_SECRET:
            raise ValueError(f"expected at most {MAX_SECRET} bytes")
        return secret

    @field_validator("tenant_header")
    @classmethod
    def _header_name(cls, name: str | None) -> str | None:
        if name is not None and not _TOKEN.fullmatch(name):
            raise ValueError("expected the name of an HTTP header, such as X-Tenant")
        if name is not None and name.lower() == "authorization":
            raise ValueError("the API key is in there; give a header of its own")
        return name

    @property
    def keeps_sessions(self) -> bool:
        """Whether there is a store."""
        return self.store != NO_STORE

    def store_options(self) -> StoreOptions:
        """What of these settings the store itself acts on."""
        return StoreOptions(
            versions_kept=self.versions_kept,
            reply_seconds=self.reply_seconds,
            tenant_sessions=self.tenant_sessions,
            tenant_bytes=self.tenant_bytes,
            max_sessions=self.max_sessions,
        )

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of this process.

        Raises:
            SettingsError: a value is not valid, or a variable of our prefix is no setting.
        """
        unknown = unknown_variables(os.environ)
        if unknown:
            raise SettingsError(
                f"{', '.join(unknown)}: no such setting. The settings are "
                f"{', '.join(variable(name) for name in cls.model_fields)}."
            )
        return cls()


def variable(field: str) -> str:
    """The environment variable of a field."""
    return f"{ENV_PREFIX}{field.upper()}"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables of our prefix that mean nothing: a typing error, most likely."""
    known = {variable(field) for field in ServerSettings.model_fields} | OTHER_VARIABLES
    return sorted(
        name
        for name in environment
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    )


def without_password(url: str) -> str:
    """A store's URL for messages and logs."""
    url = re.sub(r"^([^/]*//)[^/?]*@", r"\1***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def settings_table() -> str:
    """All settings as a Markdown table: variable, default, meaning."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in ServerSettings.model_fields.items():
        assert field.description is not None
        meaning = " ".join(field.description.split()).replace("|", "\\|")
        lines.append(f"| `{variable(name)}` | {_shown(field.default)} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """A document with the table between its markers made anew.

    Raises:
        ValueError: it has no markers.
    """
    head, begin, rest = document.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not (begin and end):
        raise ValueError(f"expected a line {TABLE_BEGIN} and a line {TABLE_END}")
    return f"{head}{begin}\n{settings_table()}{end}{tail}"


def _shown(default: object) -> str:
    match default:
        case None | SecretStr():
            return "-"
        case float():
            return f"`{default:g}`"
        case _:
            return f"`{default}`"


def _problem(item: Mapping[str, object]) -> str:
    location = item["loc"]
    assert isinstance(location, tuple)
    name = variable(str(location[0])) if location else "settings"
    given = without_password(str(item["input"]))
    if location == ("hash_secret",):
        given = "***"
    return f"{name} = {given!r}: {item['msg']}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        file = Path(argument)
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
