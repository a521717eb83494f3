"""What an operator can set, how mistakes are told, and that the documentation says the same."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from deltamem_vllm.api.settings import (
    ENV_PREFIX,
    ServerSettings,
    settings_table,
    variable,
    with_table,
    without_password,
)
from deltamem_vllm.errors import SettingsError
from deltamem_vllm.sessions.store import StoreOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "store": ("redis://cache:6379/2", "redis://cache:6379/2"),
        "versions_kept": ("7", 7),
        "reply_seconds": ("60.5", 60.5),
        "tenant_sessions": ("10", 10),
        "tenant_bytes": ("1000000", 1_000_000),
        "max_sessions": ("500", 500),
        "lease_seconds": ("5", 5.0),
        "max_wait_seconds": ("0", 0.0),
        "max_queue": ("0", 0),
        "max_queue_total": ("9", 9),
        "segment_tokens": ("256", 256),
        "max_reply_bytes": ("0", 0),
        "max_ingest_bytes": ("1024", 1024),
        "sweep_seconds": ("1", 1.0),
        "usage_log": ("1", True),
        "hash_secret": ("s3cret", SecretStr("s3cret")),
        "tenant_keys_file": ("/etc/keys.json", Path("/etc/keys.json")),
        "tenant_header": ("X-Tenant", "X-Tenant"),
        "fingerprint_alias": ("qwen3 4b", "qwen3 4b"),
    }
    assert set(given) == set(ServerSettings.model_fields), "a setting is missing here"
    for name, (text, _) in given.items():
        monkeypatch.setenv(variable(name), text)
    settings = ServerSettings.from_environment()
    assert settings.model_dump() == {name: value for name, (_, value) in given.items()}
    assert settings.store_options() == StoreOptions(
        versions_kept=7,
        reply_seconds=60.5,
        tenant_sessions=10,
        tenant_bytes=1_000_000,
        max_sessions=500,
    )


def test_without_variables_there_is_no_store_and_the_store_has_its_own_defaults() -> None:
    settings = ServerSettings.from_environment()
    assert not settings.keeps_sessions
    assert settings.store_options() == StoreOptions()


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_TENANT_SESSIONS", "")
    assert ServerSettings.from_environment().tenant_sessions is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", "sessions.db"),
        ("store", "mysql://host/db"),
        ("versions_kept", "0"),
        ("reply_seconds", "nan"),
        ("lease_seconds", "inf"),
        ("lease_seconds", "0"),
        ("max_queue", "-1"),
        ("max_queue", "many"),
        ("segment_tokens", "0"),
        ("max_reply_bytes", str(1 << 40)),
        ("tenant_header", "X Tenant"),
        ("tenant_header", "Authorization"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable(name), value)
    with pytest.raises(SettingsError, match=f"{variable(name)} = {value!r}"):
        ServerSettings.from_environment()


def test_a_variable_that_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_MAX_QUEU", "3")
    with pytest.raises(SettingsError, match=r"DELTAMEM_MAX_QUEU: .*DELTAMEM_MAX_QUEUE"):
        ServerSettings.from_environment()


def test_variables_of_other_parts_are_no_typing_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_ALLOW_UNTESTED_VLLM", "1")
    ServerSettings.from_environment()


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_STORE", "reddis://me:geheim@host/0")
    with pytest.raises(SettingsError) as caught:
        ServerSettings.from_environment()
    assert "geheim" not in str(caught.value)
    assert without_password("redis://me:a@b@host/0") == "redis://***@host/0"
    assert without_password("unix:///s?password=a@b&db=1") == "unix:///s?password=***&db=1"
    assert without_password("sqlite:///var/lib/a@b.db") == "sqlite:///var/lib/a@b.db"


def test_every_setting_is_explained() -> None:
    for name, field in ServerSettings.model_fields.items():
        assert field.description and field.description.rstrip().endswith("."), name


def test_the_documentation_lists_the_settings_as_they_are() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(document) == document, (
        "docs/configuration.md is stale: run "
        "python -m deltamem_vllm.api.settings docs/configuration.md"
    )
    assert settings_table().count(f"`{ENV_PREFIX}") >= len(ServerSettings.model_fields)


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="settings: begin"):
        with_table("# Configuration\n")


def test_a_secret_that_is_too_long_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DELTAMEM_HASH_SECRET", "s3cret" * 11)
    with pytest.raises(SettingsError, match=r"DELTAMEM_HASH_SECRET.*at most 64 bytes") as refusal:
        ServerSettings()
    assert "s3cret" not in str(refusal.value)
