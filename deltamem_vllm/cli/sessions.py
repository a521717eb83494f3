"""`deltamem sessions ...`: look at, copy, move and remove sessions in a store.

Works beside a running server, on the same store. Set the same `DELTAMEM_` variables as the server
has: how many versions are kept, for instance, is decided by whoever makes the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from deltamem_vllm.cli.common import console
from deltamem_vllm.cli.model import (
    AdapterOption,
    LoraOption,
    ModelOption,
    OverridesOption,
    QuantizationOption,
    TemplateOption,
    TokenizerOption,
    model_of,
)
from deltamem_vllm.errors import SessionError, SessionNotFoundError, StoreError

if TYPE_CHECKING:
    from deltamem_vllm.sessions import SessionInfo, SessionKey, SessionRecord, SessionStore

SHOWN_DIGITS: Final = 12
"""Of a fingerprint, in tables; enough for `--fingerprint`."""

sessions_app = typer.Typer(
    no_args_is_help=True, help="List, inspect, copy and remove the sessions of a store."
)

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="The store's URL. Default: DELTAMEM_STORE, or this user's file."),
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose sessions.")]
FingerprintOption = Annotated[
    str,
    typer.Option("--fingerprint", help="Only sessions of this model: the fingerprint's beginning."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
NameArgument = Annotated[str, typer.Argument(metavar="SESSION", help="The session's name.")]
VersionOption = Annotated[
    int | None, typer.Option("--version", help="One of its kept versions; default: the current.")
]


@sessions_app.command("ls")
def list_(
    prefix: Annotated[str, typer.Argument(help="Only names that begin so.")] = "",
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
    as_json: JsonOption = False,
) -> None:
    """List a tenant's sessions."""
    with _opened(store) as opened:
        found = list(_sessions(opened, tenant, prefix, fingerprint))
    if as_json:
        _print_json([_info_facts(info) for info in found])
        return
    table = Table("session", "fingerprint", "version", "tokens", "bytes", "updated", "expires", "")
    for info in found:
        table.add_row(
            escape(info.key.name),
            info.key.fingerprint[:SHOWN_DIGITS],
            str(info.version),
            f"{info.tokens_written:,}",
            f"{info.bytes:,}",
            _time(info.updated_at),
            "" if info.expires_at is None else _time(info.expires_at),
            "in a turn" if info.leased else "",
        )
    console().print(table)


@sessions_app.command("show")
def show(
    name: NameArgument,
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show one session and the versions of it that are kept."""
    with _opened(store) as opened:
        info = _one(opened, tenant, name, fingerprint)
        versions = opened.versions(info.key)
    if as_json:
        facts = _info_facts(info)
        _print_json({**facts, "versions": [_version_facts(record) for record in versions]})
        return
    for fact, value in _info_facts(info).items():
        typer.echo(f"{fact:<16}{_readable(fact, value)}")
    table = Table("version", "grew out of", "committed", "tokens", "pending", "messages")
    for record in versions:
        table.add_row(
            str(record.version),
            str(record.parent_version or "-"),
            _time(record.created_at),
            f"{record.content.tokens_written:,}",
            str(len(record.content.pending_token_ids)),
            str(len(record.content.message_chain)),
        )
    console().print(table)


@sessions_app.command("rm")
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SESSION]...", help="The sessions' names.")
    ] = None,
    whole_tenant: Annotated[
        bool, typer.Option("--whole-tenant", help="All of the tenant's, of every model.")
    ] = False,
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
) -> None:
    """Delete sessions for good, with their versions and kept replies."""
    if whole_tenant == bool(names) or (whole_tenant and fingerprint):
        raise SessionError("give either names of sessions, or --whole-tenant alone.")
    with _opened(store) as opened:
        if whole_tenant:
            typer.echo(f"deleted {opened.delete_tenant(tenant):,} sessions of tenant {tenant}")
            return
        # All are found before the first is deleted: a misspelt name removes nothing.
        keys = [_one(opened, tenant, name, fingerprint).key for name in dict.fromkeys(names or ())]
        for key in keys:
            opened.delete(key)
            typer.echo(f"deleted {key.name}")


@sessions_app.command("fork")
def fork(
    name: NameArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The copy's name.")],
    version: VersionOption = None,
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
) -> None:
    """Copy a session under another name; the copy begins at version 1."""
    with _opened(store) as opened:
        info = _one(opened, tenant, name, fingerprint)
        record = opened.fork(info.key, new, version)
    typer.echo(f"{new} is at version {record.version}")


@sessions_app.command("rollback")
def rollback(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="A kept version.")],
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
) -> None:
    """Make an older version the current one, as a new version."""
    with _opened(store) as opened:
        info = _one(opened, tenant, name, fingerprint)
        record = opened.rollback(info.key, version)
    typer.echo(f"{name} is at version {record.version}, with the content of version {version}")


@sessions_app.command("export")
def export(
    name: NameArgument,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    model: ModelOption,
    adapter: AdapterOption = None,
    chat_template: TemplateOption = None,
    quantization: QuantizationOption = None,
    lora: LoraOption = None,
    tokenizer: TokenizerOption = None,
    hf_overrides: OverridesOption = None,
    version: VersionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    store: StoreOption = None,
    tenant: TenantOption = "public",
    fingerprint: FingerprintOption = "",
) -> None:
    """Write a session into a portable file: safetensors with its facts."""
    from deltamem_vllm.adapter.files import write_atomically
    from deltamem_vllm.portable import export_record

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: is there already; give another file, or --overwrite")
    with _opened(store) as opened:
        info = _one(opened, tenant, name, fingerprint)
        record = opened.get(info.key, version)
    parts, shape = model_of(
        model, adapter, chat_template, quantization, lora, tokenizer, hf_overrides
    )
    if parts.digest != info.key.fingerprint:
        raise SessionError(
            f"session {name!r} belongs to another model: its fingerprint is "
            f"{info.key.fingerprint[:SHOWN_DIGITS]}, that of {model} is "
            f"{parts.digest[:SHOWN_DIGITS]}. Give model, adapter, chat template, quantization, "
            "LoRA, tokenizer, overrides and DELTAMEM_FINGERPRINT_ALIAS as the server had them."
        )
    write_atomically(out, export_record(record, parts, shape))
    typer.echo(f"wrote version {record.version} of {name} to {out}")


@sessions_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `export`.")],
    name: NameArgument,
    model: ModelOption,
    adapter: AdapterOption = None,
    chat_template: TemplateOption = None,
    quantization: QuantizationOption = None,
    lora: LoraOption = None,
    tokenizer: TokenizerOption = None,
    hf_overrides: OverridesOption = None,
    ttl: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds until it expires, if untouched.")
    ] = None,
    store: StoreOption = None,
    tenant: TenantOption = "public",
) -> None:
    """Make a session of a file; it begins at version 1."""
    from deltamem_vllm.portable import import_content
    from deltamem_vllm.sessions import SessionKey
    from deltamem_vllm.state.snapshot_file import MAX_HEADER_BYTES

    parts, shape = model_of(
        model, adapter, chat_template, quantization, lora, tokenizer, hf_overrides
    )
    with file.open("rb") as opened_file:
        # One byte more than a snapshot may have is enough to refuse it.
        data = opened_file.read(MAX_HEADER_BYTES + shape.num_bytes + 9)
    content = import_content(data, parts, shape)
    with _opened(store, make=True) as opened:
        key = SessionKey(tenant, parts.digest, name)
        record = opened.create(key, content, ttl=ttl)
    typer.echo(f"{name} is at version {record.version}, with the content of {file}")


@sessions_app.command("backup")
def backup(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to make: a store itself.")],
    store: StoreOption = None,
) -> None:
    """Copy a whole SQLite store, of all tenants, while servers use it."""
    from deltamem_vllm.sessions.sqlite import SqliteStore

    with _opened(store) as opened:
        if not isinstance(opened, SqliteStore):
            raise StoreError(
                "only a SQLite store is copied so. Back up Redis by its own means: copy its "
                "append-only files or a snapshot (BGSAVE)."
            )
        made = opened.backup(out)
    typer.echo(f"wrote {made}; it is a store itself: sqlite://{made}")


@contextmanager
def _opened(url: str | None, *, make: bool = False) -> Iterator[SessionStore]:
    """The store; unless `make`, a file that is not there is not made."""
    from deltamem_vllm.api.settings import ServerSettings
    from deltamem_vllm.serve import default_store_url, make_folder
    from deltamem_vllm.sessions import open_store
    from deltamem_vllm.sessions.sqlite_file import path_of_url

    settings = ServerSettings.from_environment()
    if url is None:
        url = settings.store if settings.keeps_sessions else default_store_url()
    ServerSettings(store=url)  # whose error hides a password
    if make:
        make_folder(url)
    elif url.startswith("sqlite:"):
        file = path_of_url(url)
        if not file.exists():
            raise StoreError(f"{file}: there is no such store. Give its URL by --store.")
    with open_store(url, settings.store_options()) as store:
        yield store


def _sessions(
    store: SessionStore, tenant: str, prefix: str, fingerprint: str
) -> Iterator[SessionInfo]:
    """A tenant's sessions, page by page."""
    after = None
    while True:
        page = store.list_sessions(tenant, prefix=prefix, after=after, limit=1000)
        for info in page.sessions:
            if info.key.fingerprint.startswith(fingerprint):
                yield info
        after = page.next_after
        if after is None:
            return


def _one(store: SessionStore, tenant: str, name: str, fingerprint: str) -> SessionInfo:
    """The session of this name.

    Raises:
        SessionNotFoundError: there is none.
        SessionError: several models have one.
    """
    found = []
    # Names come in order, so the very name comes before all that only begin with it.
    for info in _sessions(store, tenant, name, fingerprint):
        if info.key.name != name:
            break
        found.append(info)
    if not found:
        of = f" of a model {fingerprint}..." if fingerprint else ""
        raise SessionNotFoundError(f"tenant {tenant!r} has no session {name!r}{of}.")
    if len(found) > 1:
        models = ", ".join(info.key.fingerprint[:SHOWN_DIGITS] for info in found)
        raise SessionError(
            f"several models have a session {name!r}: {models}. Give --fingerprint with the "
            "beginning of one."
        )
    return found[0]


def _info_facts(info: SessionInfo) -> dict[str, Any]:
    return {
        **_key_facts(info.key),
        "version": info.version,
        "incarnation": info.incarnation,
        "tokens_written": info.tokens_written,
        "bytes": info.bytes,
        "created_at": info.created_at,
        "updated_at": info.updated_at,
        "expires_at": info.expires_at,
        "leased": info.leased,
        "forked_from": None if info.forked_from is None else list(info.forked_from),
    }


def _key_facts(key: SessionKey) -> dict[str, str]:
    return {"session": key.name, "tenant": key.tenant, "fingerprint": key.fingerprint}


def _version_facts(record: SessionRecord) -> dict[str, Any]:
    content = record.content
    return {
        "version": record.version,
        "parent_version": record.parent_version,
        "created_at": record.created_at,
        "tokens_written": content.tokens_written,
        "pending_token_ids": list(content.pending_token_ids),
        "messages": len(content.message_chain),
        "metadata": dict(content.metadata),
    }


def _readable(fact: str, value: Any) -> str:
    if value is None:
        return "-"
    if fact.endswith("_at"):
        return _time(value)
    if fact == "forked_from":
        name, version = value
        return f"{name}, version {version}"
    return str(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
