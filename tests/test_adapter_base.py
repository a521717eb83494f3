"""Adapters meet base models: sizes are compared, places are resolved, checkpoints are linked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deltamem_vllm.adapter import (
    CONFIG_NAME,
    LINKED_ADAPTER_DIR,
    REFERENCE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    BackboneShape,
    link_checkpoint,
    load_adapter,
    resolve_adapter_dir,
    resolve_base_dir,
    resolve_linked_adapter_dir,
    save_adapter,
)
from deltamem_vllm.errors import AdapterError, BackboneError

DATA = Path(__file__).parent / "parity" / "data"
TSW = DATA / "qwen3_tsw" / "adapter"
BASE = DATA / "qwen3_tsw" / "model"
SHAPE = BackboneShape.from_dir(BASE)
ARCHITECTURES = {"Qwen3ForCausalLM": "DeltaMemQwen3ForCausalLM", "X": "DeltaMemX"}


# Backbones


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"num_heads": 8},
        {"num_kv_heads": 4},
        {"num_layers": 2},
        {"num_layers": 4},
    ],
    ids=str,
)
def test_adapter_of_another_backbone_is_refused(change: dict[str, int]) -> None:
    other = BackboneShape(**{**vars(SHAPE), **change})
    with pytest.raises(BackboneError, match="does not fit the base model"):
        load_adapter(TSW, backbone=other)


def test_adapter_for_some_layers_fits_a_deeper_backbone_only_if_it_covers_them() -> None:
    scaled = load_adapter(DATA / "qwen3_scaled" / "adapter")
    scaled.check_backbone(BackboneShape(**{**vars(SHAPE), "num_layers": 9}))
    with pytest.raises(BackboneError, match="layers"):
        scaled.check_backbone(BackboneShape(**{**vars(SHAPE), "num_layers": 2}))


QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@pytest.mark.parametrize(
    ("change", "q_size", "kv_size"),
    [
        ({}, 4096, 1024),
        ({"head_dim": ...}, 4096, 1024),
        ({"head_dim": None}, 2560, 640),
        ({"head_dim": ..., "model_type": "llama"}, 2560, 640),
        ({"num_key_value_heads": None}, 4096, 4096),
        ({"num_key_value_heads": ...}, 4096, 4096),
    ],
    ids=str,
)
def test_backbone_sizes_come_from_config_json(
    change: dict[str, Any], q_size: int, kv_size: int
) -> None:
    config = {name: value for name, value in {**QWEN3_4B, **change}.items() if value is not ...}
    shape = BackboneShape.from_config_dict(config)
    assert (shape.hidden_size, shape.num_layers) == (2560, 36)
    assert (shape.q_size, shape.kv_size) == (q_size, kv_size)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "2560"},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0},
        {"num_key_value_heads": -1},
        {"head_dim": 0},
        {"model_type": None},
        {"head_dim": None, "num_attention_heads": 7},
    ],
    ids=str,
)
def test_unusable_backbone_config_is_refused_by_field(change: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=next(iter(change))):
        BackboneShape.from_config_dict({**QWEN3_4B, **change})


# Where adapters are found


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without network, with an empty Hub cache."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def cache_repository(cache: Path, repo_id: str, content: Path) -> Path:
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    return Path(shutil.copytree(content, repository / "snapshots" / ("c" * 40)))


def test_cached_hub_adapter_loads_without_network(hub_cache: Path) -> None:
    snapshot = cache_repository(hub_cache, "lab/adapter", TSW)
    assert resolve_adapter_dir("lab/adapter").samefile(snapshot)
    assert load_adapter("lab/adapter").fingerprint == load_adapter(TSW).fingerprint


@pytest.fixture
def hub_requests(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that knows no repository; yields the paths that were asked of it."""
    from huggingface_hub import constants

    paths: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield paths
    server.shutdown()
    server.server_close()


def test_hub_is_asked_only_for_what_is_not_cached(hub_cache: Path, hub_requests: list[str]) -> None:
    cache_repository(hub_cache, "lab/adapter", TSW)
    resolve_adapter_dir("lab/adapter")
    assert hub_requests == []
    with pytest.raises(AdapterError, match="cannot be used"):
        resolve_adapter_dir("lab/other")
    assert any("lab/other" in path for path in hub_requests)


def test_adapter_inside_a_linked_checkpoint_is_found(hub_cache: Path, base: Path) -> None:
    local = link(base, hub_cache / "linked", copy=True)
    assert resolve_linked_adapter_dir(local) == local / LINKED_ADAPTER_DIR
    snapshot = cache_repository(hub_cache, "lab/linked", local)
    (snapshot.parents[1] / "refs" / "v1").write_text("c" * 40)
    for revision in (None, "main", "v1"):
        folder = resolve_linked_adapter_dir("lab/linked", revision)
        assert folder.samefile(snapshot / LINKED_ADAPTER_DIR)
    with pytest.raises(AdapterError, match="lab/linked"):
        resolve_linked_adapter_dir("lab/linked", "v2")


def test_incomplete_hub_snapshot_is_refused(hub_cache: Path) -> None:
    snapshot = cache_repository(hub_cache, "lab/adapter", TSW)
    (snapshot / REFERENCE_WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterError, match="does not hold a complete adapter"):
        resolve_adapter_dir("lab/adapter")


def test_base_is_found_in_the_hub_cache(hub_cache: Path) -> None:
    snapshot = cache_repository(hub_cache, "lab/base", DATA / "qwen3_tsw" / "model")
    assert resolve_base_dir("lab/base").samefile(snapshot)
    (snapshot / "model.safetensors").unlink()
    assert resolve_base_dir("lab/base", config_only=True).samefile(snapshot)
    with pytest.raises(BackboneError, match="does not hold a complete base model"):
        resolve_base_dir("lab/base")


@pytest.mark.parametrize(
    ("given_path", "reason"),
    [
        ("lab/unknown", "HF_HUB_OFFLINE"),
        ("./no/such/folder", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("word", "no such folder"),
        ("", "no such folder"),
        (str(TSW / CONFIG_NAME), "is a file"),
    ],
)
def test_unknown_place_is_refused_readably(hub_cache: Path, given_path: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason) as caught:
        resolve_adapter_dir(given_path)
    assert "\n" not in str(caught.value)


# Linked checkpoints


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base folder that a test may change."""
    return Path(shutil.copytree(BASE, tmp_path / "base"))


def link(base: Path | str, out: Path, adapter: Path = TSW, **options: bool) -> Path:
    return link_checkpoint(base, adapter, out, architectures=ARCHITECTURES, **options)


def edit_config(base: Path, **change: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("copy", [False, True])
def test_linked_checkpoint_is_the_base_with_an_adapter(
    tmp_path: Path, base: Path, copy: bool
) -> None:
    (base / "extra").mkdir()
    (base / "extra" / "note.txt").write_text("kept")
    (base / ".git").mkdir()
    out = link(base, tmp_path / "deep" / "out", copy=copy)
    names = {entry.name for entry in out.iterdir()}
    stock = {entry.name for entry in base.iterdir()} - {".git"}
    assert names == stock | {LINKED_ADAPTER_DIR}
    for name in names - {"config.json", LINKED_ADAPTER_DIR}:
        assert (out / name).is_symlink() is not copy
        assert copy or os.path.isabs(os.readlink(out / name))
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (out / "extra" / "note.txt").read_text() == "kept"

    config, before = (json.loads((place / "config.json").read_text()) for place in (out, base))
    assert config.pop("deltamem") == {"adapter": LINKED_ADAPTER_DIR}
    assert config.pop("architectures") == ["DeltaMemQwen3ForCausalLM"]
    assert before.pop("architectures") == ["Qwen3ForCausalLM"]
    assert config == before

    # vLLM would load weight files of the top folder as the model's own.
    assert not {WEIGHTS_NAME, REFERENCE_WEIGHTS_NAME} & names
    inside = out / LINKED_ADAPTER_DIR
    assert {entry.name for entry in inside.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    assert load_adapter(inside).fingerprint == load_adapter(TSW).fingerprint


def test_relative_paths_are_linked_by_absolute_path(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = link("base", Path("out"))
    assert out == tmp_path / "out"
    monkeypatch.chdir("/")
    assert (out / "model.safetensors").exists()


def test_adapter_beside_the_base_weights_is_not_linked_as_weights(
    tmp_path: Path, base: Path
) -> None:
    shutil.copytree(save_adapter(load_adapter(TSW), tmp_path / "own"), base, dirs_exist_ok=True)
    out = link(base, tmp_path / "out", adapter=base)
    assert not (out / WEIGHTS_NAME).exists() and not (out / CONFIG_NAME).exists()
    assert (out / LINKED_ADAPTER_DIR / WEIGHTS_NAME).is_file()


def test_base_from_the_hub_cache_is_linked(tmp_path: Path, hub_cache: Path) -> None:
    cache_repository(hub_cache, "lab/base", BASE)
    cache_repository(hub_cache, "lab/adapter", TSW)
    out = link_checkpoint("lab/base", "lab/adapter", tmp_path / "o", architectures=ARCHITECTURES)
    assert (out / "model.safetensors").exists()


def _stock(base: Path) -> None:
    del base


def _no_config(base: Path) -> None:
    (base / "config.json").unlink()


def _no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def _broken_link(base: Path) -> None:
    (base / "tokenizer.json").symlink_to(base / "absent")


def _pipe(base: Path) -> None:
    os.mkfifo(base / "zz.pipe")  # cannot be copied: fails when most of the work is done


@pytest.mark.parametrize(
    ("damage", "adapter", "error", "reason"),
    [
        (_no_config, "qwen3_tsw", BackboneError, "config.json"),
        (_no_weights, "qwen3_tsw", BackboneError, "holds no weights"),
        (_broken_link, "qwen3_tsw", BackboneError, "broken links tokenizer.json"),
        (
            lambda base: edit_config(base, architectures=["GPT2LMHeadModel"]),
            "qwen3_tsw",
            BackboneError,
            "GPT2LMHeadModel is not supported; supported are: Qwen3ForCausalLM, X",
        ),
        (lambda base: edit_config(base, architectures=None), "qwen3_tsw", BackboneError, "None"),
        (
            lambda base: edit_config(base, architectures=["DeltaMemX"]),
            "qwen3_tsw",
            BackboneError,
            "already linked",
        ),
        (
            lambda base: edit_config(base, deltamem={"adapter": "x"}),
            "qwen3_tsw",
            BackboneError,
            "already linked",
        ),
        (lambda base: edit_config(base, hidden_size=32), "qwen3_tsw", BackboneError, "hidden_size"),
        (_stock, "absent", AdapterError, "no such folder"),
        (_pipe, "qwen3_tsw", OSError, "pipe"),
    ],
)
def test_failed_link_leaves_nothing_behind(
    tmp_path: Path, base: Path, damage: Any, adapter: str, error: type[Exception], reason: str
) -> None:
    damage(base)
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises(error, match=reason):
        link(base, parent / "out", adapter=DATA / adapter / "adapter", copy=True)
    assert list(parent.iterdir()) == []


def test_linked_checkpoint_is_not_a_base(tmp_path: Path, base: Path) -> None:
    out = link(base, tmp_path / "out")
    with pytest.raises(BackboneError, match="already linked"):
        link(out, tmp_path / "again")


def test_overwrite_replaces_only_what_link_made(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    link(base, out)  # an empty folder is as good as none
    with pytest.raises(AdapterError, match="already holds a linked checkpoint"):
        link(base, out)
    other = DATA / "qwen3_msw4" / "adapter"
    link(base, out, adapter=other, overwrite=True)
    assert load_adapter(out / LINKED_ADAPTER_DIR).fingerprint == load_adapter(other).fingerprint
    # The adapter may also come from the very folder that is replaced.
    link(base, out, adapter=out / LINKED_ADAPTER_DIR, overwrite=True)
    assert load_adapter(out / LINKED_ADAPTER_DIR).fingerprint == load_adapter(other).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(AdapterError, match="was not made by"):
            link(base, mine, overwrite=overwrite)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_failed_overwrite_keeps_the_old_checkpoint(tmp_path: Path, base: Path) -> None:
    out = link(base, tmp_path / "out", copy=True)
    _pipe(base)
    with pytest.raises(OSError, match="pipe"):
        link(base, out, copy=True, overwrite=True)
    assert load_adapter(out / LINKED_ADAPTER_DIR).fingerprint == load_adapter(TSW).fingerprint
    assert (out / "model.safetensors").exists()


def test_out_must_be_a_folder_outside_the_base(tmp_path: Path, base: Path) -> None:
    with pytest.raises(BackboneError, match="lies inside the base"):
        link(base, base / "out")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AdapterError, match="is not a folder"):
        link(base, file)
    (tmp_path / "alias").symlink_to(link(base, tmp_path / "out"))
    with pytest.raises(AdapterError, match="is not a folder"):
        link(base, tmp_path / "alias", overwrite=True)
