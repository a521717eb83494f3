"""`deltamem sessions ...` on a real store: what it shows, what it changes, what it refuses."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from deltamem_vllm.adapter import load_adapter, save_adapter
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.cli import app
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.errors import SessionNotFoundError
from deltamem_vllm.sessions import SessionContent, SessionKey, SessionStore, open_store
from deltamem_vllm.state.fingerprint import fingerprint
from deltamem_vllm.state.snapshot import StateShape

ADAPTER = load_adapter(adapter_dir("tsw"))
SHAPE = StateShape.of(ADAPTER)
MODEL = ["--model", model_dir(), "--adapter", adapter_dir("tsw")]
OTHER_MODEL = "ab" * 32


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTAMEM_STORE", raising=False)


@pytest.fixture(scope="module")
def model_fingerprint() -> str:
    return fingerprint(model_dir(), ADAPTER, quantization=None, chat_template=None).digest


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/sessions.db"


@pytest.fixture
def store(url: str) -> Iterator[SessionStore]:
    with open_store(url) as opened:
        yield opened


def content(seed: int = 0) -> SessionContent:
    numbers = np.random.default_rng(seed).standard_normal(SHAPE.num_bytes // 4)
    return SessionContent(
        state=numbers.astype("<f4").tobytes(),
        tokens_written=1000 + seed,
        pending_token_ids=(7, 8),
        message_chain=(b"\1" * 32, b"\2" * 32),
        metadata={"segment_tokens": 8192},
    )


def filled(
    store: SessionStore, name: str, fingerprint: str, *, versions: int = 1, tenant: str = "public"
) -> SessionKey:
    """A session whose version v was made by `content(v)`."""
    key = SessionKey(tenant, fingerprint, name)
    for version in range(1, versions + 1):
        store.commit(store.acquire(key, "test", seconds=30), content(version))
    return key


def run(*arguments: object, url: str | None = None) -> Result:
    store = [] if url is None else ["--store", url]
    return CliRunner().invoke(app, ["sessions", *map(str, [*arguments, *store])])


def json_of(*arguments: object, url: str) -> Any:
    result = run(*arguments, "--json", url=url)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_readable_failure(result: Result, *reasons: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for reason in reasons:
        assert reason in result.stderr


def test_ls_lists_one_tenants_sessions(store: SessionStore, url: str) -> None:
    filled(store, "ada", OTHER_MODEL, versions=3)
    filled(store, "bob [x]", OTHER_MODEL)
    filled(store, "ada", OTHER_MODEL, tenant="another")
    table = succeeded(run("ls", url=url))
    assert table.count(OTHER_MODEL[:12]) == 2
    assert "bob [x]" in table and "1,003" in table
    listed = json_of("ls", url=url)
    assert [(item["session"], item["version"]) for item in listed] == [("ada", 3), ("bob [x]", 1)]
    assert {item["tenant"] for item in listed} == {"public"}
    assert [item["session"] for item in json_of("ls", "bo", url=url)] == ["bob [x]"]
    assert len(json_of("ls", "--tenant", "another", url=url)) == 1
    assert json_of("ls", "--fingerprint", "cd", url=url) == []


def test_ls_goes_through_all_pages(store: SessionStore, url: str) -> None:
    for number in range(1005):
        store.create(SessionKey("public", OTHER_MODEL, f"s{number:04}"), SessionContent(b"x"))
    listed = json_of("ls", url=url)
    assert [item["session"] for item in listed] == [f"s{number:04}" for number in range(1005)]


def test_show_tells_a_session_and_its_versions(store: SessionStore, url: str) -> None:
    key = filled(store, "ada", OTHER_MODEL, versions=2)
    store.fork(key, "ada two", 1)
    text = succeeded(run("show", "ada", url=url))
    assert OTHER_MODEL in text and "1,001" in text and "1,002" in text
    facts = json_of("show", "ada", url=url)
    assert [version["version"] for version in facts["versions"]] == [2, 1]
    newest = facts["versions"][0]
    assert newest["parent_version"] == 1
    assert newest["pending_token_ids"] == [7, 8]
    assert newest["messages"] == 2
    assert newest["metadata"] == {"segment_tokens": 8192}
    assert "ada, version 1" in succeeded(run("show", "ada two", url=url))


def test_a_name_of_several_models_needs_a_fingerprint(store: SessionStore, url: str) -> None:
    filled(store, "ada", "aa11" * 16)
    filled(store, "ada", "aa22" * 16, versions=2)
    filled(store, "ada lovelace", "aa33" * 16)
    assert_readable_failure(run("show", "ada", url=url), "aa11aa11aa11", "aa22aa22aa22")
    assert json_of("show", "ada", "--fingerprint", "aa2", url=url)["version"] == 2
    assert_readable_failure(run("show", "ada", "--fingerprint", "aa3", url=url), "no session 'ada'")


@pytest.mark.parametrize(
    "command",
    [
        ["show", "absent"],
        ["rm", "absent"],
        ["fork", "absent", "new"],
        ["rollback", "absent", "1"],
        ["export", "absent", "file", *MODEL],
    ],
)
def test_what_is_not_there_is_said_plainly(
    command: list[object], store: SessionStore, url: str
) -> None:
    filled(store, "absentee", OTHER_MODEL)
    assert_readable_failure(run(*command, url=url), "no session 'absent'")


def test_rm_deletes_what_is_named_or_nothing(store: SessionStore, url: str) -> None:
    keys = [filled(store, name, OTHER_MODEL) for name in ("a", "b", "c")]
    assert_readable_failure(run("rm", "a", "misspelt", url=url), "misspelt")
    assert store.get(keys[0]).version == 1
    assert succeeded(run("rm", "a", "b", "a", url=url)) == "deleted a\ndeleted b\n"
    for key in keys[:2]:
        with pytest.raises(SessionNotFoundError):
            store.get(key)
    assert store.get(keys[2]).version == 1


def test_rm_of_a_whole_tenant_spares_the_others(store: SessionStore, url: str) -> None:
    filled(store, "a", OTHER_MODEL)
    filled(store, "b", "cd" * 32)
    spared = filled(store, "a", OTHER_MODEL, tenant="another")
    for refused in (["rm"], ["rm", "a", "--whole-tenant"]):
        assert_readable_failure(run(*refused, url=url), "--whole-tenant")
    assert "deleted 2 sessions" in succeeded(run("rm", "--whole-tenant", url=url))
    assert json_of("ls", url=url) == []
    assert store.get(spared).version == 1


def test_fork_and_rollback(store: SessionStore, url: str) -> None:
    key = filled(store, "ada", OTHER_MODEL, versions=3)
    assert "ada two is at version 1" in succeeded(
        run("fork", "ada", "ada two", "--version", 2, url=url)
    )
    copy = store.get(key._replace(name="ada two"))
    assert copy.content == content(2) and copy.forked_from == ("ada", 2)
    assert "version 4" in succeeded(run("rollback", "ada", 1, url=url))
    assert store.get(key).content == content(1)
    assert_readable_failure(run("fork", "ada", "ada two", url=url), "ada two")
    assert_readable_failure(run("rollback", "ada", 99, url=url), "99")


def test_an_exported_session_comes_back_the_same(
    store: SessionStore, url: str, model_fingerprint: str, tmp_path: Path
) -> None:
    filled(store, "ada", model_fingerprint, versions=3)
    file = tmp_path / "ada.safetensors"
    said = succeeded(run("export", "ada", file, *MODEL, "--version", 2, url=url))
    assert "version 2" in said
    assert SHAPE.pack(safetensors.torch.load_file(file)) == content(2).state
    new = f"sqlite://{tmp_path}/new.db"
    assert "version 1" in succeeded(run("import", file, "ada again", *MODEL, url=new))
    with open_store(new) as other:
        record = other.get(SessionKey("public", model_fingerprint, "ada again"))
    assert record.content == unfolded(content(2))
    assert record.version == 1 and record.expires_at is None
    assert_readable_failure(run("import", file, "ada again", *MODEL, url=new), "ada again")
    succeeded(run("import", file, "mayfly", *MODEL, "--ttl", 60, "--tenant", "t", url=new))
    assert json_of("show", "mayfly", "--tenant", "t", url=new)["expires_at"] is not None


def test_export_replaces_a_file_only_when_asked(
    store: SessionStore, url: str, model_fingerprint: str, tmp_path: Path
) -> None:
    filled(store, "ada", model_fingerprint)
    file = tmp_path / "ada.safetensors"
    file.write_text("mine")
    assert_readable_failure(run("export", "ada", file, *MODEL, url=url), "--overwrite")
    assert file.read_text() == "mine"
    succeeded(run("export", "ada", file, *MODEL, "--overwrite", url=url))
    assert SHAPE.pack(safetensors.torch.load_file(file)) == content(1).state


def test_a_session_of_another_model_is_neither_exported_nor_imported(
    store: SessionStore, url: str, model_fingerprint: str, tmp_path: Path
) -> None:
    filled(store, "theirs", OTHER_MODEL)
    filled(store, "ours", model_fingerprint)
    file = tmp_path / "session.safetensors"
    assert_readable_failure(
        run("export", "theirs", file, *MODEL, url=url), OTHER_MODEL[:12], model_fingerprint[:12]
    )
    assert not file.exists()
    succeeded(run("export", "ours", file, *MODEL, url=url))
    other_adapter = dataclasses.replace(
        ADAPTER, tensors={name: tensor * 2 for name, tensor in ADAPTER.tensors.items()}
    )
    doubled = type(ADAPTER).from_tensors(other_adapter.config, other_adapter.tensors)
    folder = save_adapter(doubled, tmp_path / "doubled")
    other = ["--model", model_dir(), "--adapter", folder]
    assert_readable_failure(run("import", file, "x", *other, url=url), "adapter differ")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    assert_readable_failure(
        run("import", file, "x", *MODEL, "--chat-template", template, url=url),
        "chat_template differ",
    )
    assert [item["session"] for item in json_of("ls", url=url)] == ["ours", "theirs"]


def test_a_session_of_a_served_variant_is_exported_and_imported(
    store: SessionStore, url: str, tmp_path: Path
) -> None:
    """Of a LoRA, another tokenizer, and overrides, which a fingerprint has, too."""
    lora, tokenizer = tmp_path / "lora", shutil.copytree(model_dir(), tmp_path / "tokenizer")
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"r": 8}')
    safetensors.torch.save_file({"a": torch.ones(2)}, lora / "adapter_model.safetensors")
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "added": True}))
    served = fingerprint(
        model_dir(),
        ADAPTER,
        quantization=None,
        chat_template=None,
        lora=lora,
        overrides={"rope_theta": 5.0},
        tokenizer_dir=tokenizer,
    ).digest
    filled(store, "ada", served)
    out = tmp_path / "ada.safetensors"
    options = ["--lora", lora, "--tokenizer", tokenizer, "--hf-overrides", '{"rope_theta": 5.0}']
    for one in range(0, len(options), 2):
        others = options[:one] + options[one + 2 :]
        assert_readable_failure(
            run("export", "ada", out, *MODEL, *others, url=url), "another model"
        )
    succeeded(run("export", "ada", out, *MODEL, *options, url=url))
    succeeded(run("import", out, "ada again", *MODEL, *options, url=url))
    assert store.get(SessionKey("public", served, "ada again")).content == unfolded(content(1))
    assert_readable_failure(
        run("import", out, "x", *MODEL, "--hf-overrides", "[1]", url=url), "--hf-overrides"
    )


def test_a_damaged_file_is_refused(url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xff" * (64 << 20))
    assert_readable_failure(run("import", file, "x", *MODEL, url=url), "no snapshot of a session")
    assert_readable_failure(run("import", tmp_path / "absent", "x", *MODEL, url=url), "absent")


def test_an_alias_finds_the_sessions_of_another_checkpoint(
    store: SessionStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAMEM_FINGERPRINT_ALIAS", "demo")
    aliased = fingerprint(
        model_dir(), ADAPTER, quantization=None, chat_template=None, alias="demo"
    ).digest
    filled(store, "ada", aliased)
    changed = Path(shutil.copytree(model_dir(), tmp_path / "changed"))
    weights = safetensors.torch.load_file(changed / "model.safetensors")
    for tensor in weights.values():
        tensor.mul_(1.5)
    safetensors.torch.save_file(weights, changed / "model.safetensors", {"format": "pt"})
    model = ["--model", changed, "--adapter", adapter_dir("tsw")]
    succeeded(run("export", "ada", tmp_path / "file", *model, url=url))
    monkeypatch.delenv("DELTAMEM_FINGERPRINT_ALIAS")
    assert_readable_failure(
        run("export", "ada", tmp_path / "file2", *model, url=url), "DELTAMEM_FINGERPRINT_ALIAS"
    )


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    absent = tmp_path / "absent.db"
    assert_readable_failure(run("ls", url=f"sqlite://{absent}"), str(absent), "--store")
    assert not absent.exists()
    assert_readable_failure(run("ls"), str(tmp_path / "data" / "deltamem" / "sessions.db"))
    assert_readable_failure(run("ls", url="mysql://host/db"), "mysql://host/db")


def test_the_store_comes_from_the_environment(
    store: SessionStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(store, "ada", OTHER_MODEL)
    monkeypatch.setenv("DELTAMEM_STORE", url)
    assert "ada" in succeeded(run("ls"))


def test_the_default_store_is_made_by_an_import(
    store: SessionStore, url: str, model_fingerprint: str, tmp_path: Path
) -> None:
    filled(store, "ada", model_fingerprint)
    succeeded(run("export", "ada", tmp_path / "file", *MODEL, url=url))
    succeeded(run("import", tmp_path / "file", "ada", *MODEL))
    assert "ada" in succeeded(run("ls"))


def test_versions_are_kept_as_the_settings_say(
    url: str, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filled(store, "ada", OTHER_MODEL, versions=4)
    monkeypatch.setenv("DELTAMEM_VERSIONS_KEPT", "2")
    succeeded(run("rollback", "ada", 3, url=url))
    assert [record.version for record in store.versions(key)] == [5, 4]


def test_a_backup_is_a_store_of_that_moment(store: SessionStore, url: str, tmp_path: Path) -> None:
    key = filled(store, "ada", OTHER_MODEL, versions=2)
    copy = tmp_path / "copy.db"
    assert f"sqlite://{copy}" in succeeded(run("backup", copy, url=url))
    store.delete(key)
    assert json_of("ls", url=url) == []
    assert [item["version"] for item in json_of("ls", url=f"sqlite://{copy}")] == [2]
    assert_readable_failure(run("backup", copy, url=url), str(copy))
