"""Whose sessions a request may use: keys, gateways, rotation, and files that go wrong."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.api.tenants import TenantResolver
from deltamem_vllm.errors import SettingsError, UnauthorizedError


def resolver(**settings: Any) -> TenantResolver:
    return TenantResolver(ServerSettings(**settings))


def bearer(key: str, **others: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **others}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    write(path, {"sk-ada": "ada", "sk-bob": "bob"})
    return path


@pytest.fixture
def gateway_file(keys_file: Path) -> Path:
    write(keys_file, {"sk-ada": "ada", "sk-gateway": "*"})
    return keys_file


def write(path: Path, content: object) -> None:
    """Replace the file in one step, as an operator should."""
    text = content if isinstance(content, str) else json.dumps(content)
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_without_keys_and_header_everybody_is_public() -> None:
    tenants = resolver()
    assert tenants.tenant({}) == "public"
    assert tenants.tenant(bearer("sk-ada", **{"X-Tenant": "ada"})) == "public"


def test_a_key_names_its_tenant(keys_file: Path) -> None:
    tenants = resolver(tenant_keys_file=keys_file)
    assert tenants.tenant(bearer("sk-ada")) == "ada"
    assert tenants.tenant({"authorization": "bearer  sk-bob "}) == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic sk-ada"},
        {"Authorization": "sk-ada"},
        {"Authorization": "Bearer sk-ad"},
        {"Authorization": "Bearer sk-ada sk-ada"},
        {"Authorization": "Bearer SK-ADA"},
        {"Authorization": "Bearer \udcff"},
    ],
)
def test_without_a_known_key_a_request_is_unauthorized(
    headers: dict[str, str], keys_file: Path
) -> None:
    with pytest.raises(UnauthorizedError):
        resolver(tenant_keys_file=keys_file).tenant(headers)


def test_two_keys_in_one_request_are_unauthorized(keys_file: Path) -> None:
    twice = Headers(raw=[(b"authorization", b"Bearer sk-ada"), (b"authorization", b"Bearer sk-b")])
    with pytest.raises(UnauthorizedError):
        resolver(tenant_keys_file=keys_file).tenant(twice)


def test_a_key_may_be_given_by_its_digest_which_is_no_key_itself(keys_file: Path) -> None:
    digest = hashlib.sha256(b"sk-secret").hexdigest()
    write(keys_file, {f"sha256:{digest}": "ada"})
    tenants = resolver(tenant_keys_file=keys_file)
    assert tenants.tenant(bearer("sk-secret")) == "ada"
    for no_key in (digest, f"sha256:{digest}"):
        with pytest.raises(UnauthorizedError):
            tenants.tenant(bearer(no_key))


def test_a_header_is_not_trusted_unless_configured(keys_file: Path) -> None:
    tenants = resolver(tenant_keys_file=keys_file)
    assert tenants.tenant(bearer("sk-ada", **{"X-Tenant": "bob"})) == "ada"


def test_a_configured_header_names_the_tenant_and_must() -> None:
    tenants = resolver(tenant_header="X-Tenant")
    assert tenants.tenant({"x-tenant": "ada"}) == "ada"
    twice = Headers(raw=[(b"x-tenant", b"ada"), (b"x-tenant", b"bob")])
    for headers in ({}, {"X-Tenant": ""}, {"X-Tenant": "*"}, {"X-Tenant": "a\nb"}, twice):
        with pytest.raises(UnauthorizedError, match="X-Tenant"):
            tenants.tenant(headers)


def test_only_a_gateways_key_may_speak_for_others(gateway_file: Path) -> None:
    tenants = resolver(tenant_keys_file=gateway_file, tenant_header="X-Tenant")
    assert tenants.tenant(bearer("sk-ada")) == "ada"
    assert tenants.tenant(bearer("sk-ada", **{"X-Tenant": "ada"})) == "ada"
    with pytest.raises(UnauthorizedError, match="another tenant"):
        tenants.tenant(bearer("sk-ada", **{"X-Tenant": "bob"}))
    assert tenants.tenant(bearer("sk-gateway", **{"X-Tenant": "carol"})) == "carol"
    with pytest.raises(UnauthorizedError, match="names no tenant"):
        tenants.tenant(bearer("sk-gateway"))
    with pytest.raises(UnauthorizedError):
        tenants.tenant({"X-Tenant": "ada"})


def test_a_gateways_key_without_a_header_to_trust_is_refused(gateway_file: Path) -> None:
    with pytest.raises(SettingsError, match="DELTAMEM_TENANT_HEADER"):
        resolver(tenant_keys_file=gateway_file)


def test_a_key_of_other_letters_than_ascii_fits_as_its_bytes_are_sent(keys_file: Path) -> None:
    write(keys_file, {"schlüssel": "ada"})
    sent = Headers(raw=[(b"authorization", b"Bearer " + "schlüssel".encode())])
    assert resolver(tenant_keys_file=keys_file).tenant(sent) == "ada"


def test_rotating_a_key_loses_nothing(keys_file: Path) -> None:
    tenants = resolver(tenant_keys_file=keys_file)
    write(keys_file, {"sk-ada": "ada", "sk-ada-new": "ada"})
    assert tenants.tenant(bearer("sk-ada")) == tenants.tenant(bearer("sk-ada-new")) == "ada"
    with pytest.raises(UnauthorizedError):
        tenants.tenant(bearer("sk-bob"))
    write(keys_file, {"sk-ada-new": "ada"})
    assert tenants.tenant(bearer("sk-ada-new")) == "ada"
    with pytest.raises(UnauthorizedError):
        tenants.tenant(bearer("sk-ada"))


def test_while_the_file_is_damaged_or_gone_the_last_keys_stay(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tenants = resolver(tenant_keys_file=keys_file)
    for damage in (lambda: write(keys_file, "{"), keys_file.unlink):
        caplog.clear()
        damage()
        for _ in range(3):
            assert tenants.tenant(bearer("sk-ada")) == "ada"
            with pytest.raises(UnauthorizedError):
                tenants.tenant(bearer("sk-new"))
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1, "said once, not once per request"
    write(keys_file, {"sk-new": "ada"})
    assert tenants.tenant(bearer("sk-new")) == "ada"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"sk-secret": 3}', "entry 1: its tenant is no string"),
        ('{"sk-secret": {"a": "b"}}', "entry 1: its tenant is no string"),
        ('{"sk-secret": ""}', "entry 1: .*empty"),
        ('{"sk-secret": "a\\u0007"}', "do not print"),
        ('{" ": "a"}', "the key is empty"),
        ('{"sha256:abc": "a"}', "64 hexadecimal digits"),
        ('{"sk-secret": "a", "sk-secret": "b"}', "entry 2: .*another tenant"),
    ],
)
def test_a_file_that_is_not_valid_is_refused_at_the_start_without_showing_keys(
    content: str, reason: str, keys_file: Path
) -> None:
    write(keys_file, content)
    with pytest.raises(SettingsError, match=reason) as caught:
        resolver(tenant_keys_file=keys_file)
    assert "DELTAMEM_TENANT_KEYS_FILE" in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        resolver(tenant_keys_file=tmp_path / "absent.json")
