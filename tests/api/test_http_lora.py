"""Sessions with LoRA adapters that come, change and go while the server runs."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamem_vllm.sessions import SessionInfo, SessionStore, open_store
from tests.api.server import Server
from tests.api.sessions_http import SHAPE, Reply, ask, new_name
from tests.engine.test_changed_backbones import LORA_RANK, make_lora
from tests.helpers import assert_states_close, change_json, random_tokens

PROMPT = random_tokens(1, 100)
"""Three blocks, which a prefix cache holds."""


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the server looks for LoRAs."""
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lora-server")
    with Server(
        checkpoint,
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        flags=["--enable-lora", "--max-lora-rank", str(LORA_RANK), "--max-loras", "2"],
        environment={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(loras),
            "VLLM_PLUGINS": "deltamem,lora_filesystem_resolver",
        },
    ) as server:
        yield server


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[SessionStore]:
    assert server.store is not None
    with open_store(server.store) as store:
        yield store


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def make(checkpoint: Path, folder: Path, factor: float = 1.0) -> Path:
    """A LoRA for the server's model; `factor` makes another one of the same size."""
    made = make_lora(checkpoint.parent / "base", folder)
    change_json(made / "adapter_config.json", base_model_name_or_path=str(checkpoint))
    overwrite(made, factor)
    return made


def overwrite(lora: Path, factor: float) -> None:
    weights = load_file(lora / "adapter_model.safetensors")
    save_file(
        {name: factor * weight for name, weight in weights.items()},
        lora / "adapter_model.safetensors",
    )


def load(server: Server, name: str, path: Path, **fields: Any) -> None:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def unload(server: Server, name: str) -> None:
    body = {"lora_name": name}
    answer = httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def turn(client: openai.OpenAI, session: str, model: str, **memory: Any) -> Reply:
    return ask(client, PROMPT, {"session": session, **memory}, model=model)


def of(store: SessionStore, session: str) -> list[SessionInfo]:
    """The sessions of this name, of all models, the oldest first."""
    found = store.list_sessions("public", prefix=session, limit=1000).sessions
    named = [info for info in found if info.key.name == session]
    return sorted(named, key=lambda info: info.created_at)


def state_of(store: SessionStore, info: SessionInfo) -> dict[str, torch.Tensor]:
    return SHAPE.unpack(store.get(info.key).content.state)


def test_the_first_turn_of_a_resolved_lora_is_its_own(
    server: Server, client: openai.OpenAI, store: SessionStore, checkpoint: Path, loras: Path
) -> None:
    session = new_name("resolved")
    make(checkpoint, loras / "found")
    turn(client, session, "found")
    (first,) = of(store, session)
    turn(client, session, "found")
    (second,) = of(store, session)
    assert second.version == 2

    turn(client, session, "words")
    with_lora, base = of(store, session)
    assert with_lora.key == first.key != base.key
    listed = httpx.get(
        f"{server.url}/v1/memory/sessions", params={"prefix": session, "model": "found"}
    )
    assert [item["version"] for item in listed.json()["data"]] == [2]


def test_a_route_resolves_a_lora_as_a_turn_does(
    server: Server, store: SessionStore, checkpoint: Path, loras: Path
) -> None:
    session = new_name("ingested")
    make(checkpoint, loras / "ingested")
    for model in ("ingested", "words"):
        answer = httpx.post(
            f"{server.url}/v1/memory/sessions/{session}/ingest",
            params={"model": model},
            json={"token_ids": PROMPT},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
    with_lora, base = of(store, session)
    assert with_lora.key.fingerprint != base.key.fingerprint
    one, other = state_of(store, with_lora), state_of(store, base)
    assert any((one[name] - other[name]).abs().max() > 1e-3 for name in one)


def test_an_unknown_model_is_a_404_and_not_the_base_model(
    server: Server, client: openai.OpenAI, store: SessionStore
) -> None:
    session = new_name("unknown")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        turn(client, session, "nobody")
    url = f"{server.url}/v1/memory/sessions"
    requests: list[tuple[str, str, Any]] = [
        ("POST", f"/{session}/ingest", {"token_ids": PROMPT}),
        ("GET", "", None),
        ("DELETE", f"/{session}", None),
    ]
    for method, path, body in requests:
        answer = httpx.request(
            method, url + path, params={"model": "nobody"}, json=body, timeout=60
        )
        assert answer.status_code == 404, answer.text
        assert "nobody" in answer.json()["error"]["message"]
    assert of(store, session) == []


@pytest.mark.parametrize("inplace", [False, True])
def test_a_lora_loaded_again_from_changed_files_is_another(
    server: Server,
    client: openai.OpenAI,
    store: SessionStore,
    checkpoint: Path,
    tmp_path: Path,
    inplace: bool,
) -> None:
    session, name = new_name("changed"), f"changed-{inplace}"
    lora = make(checkpoint, tmp_path / "lora")
    load(server, name, lora)
    turn(client, session, name)
    overwrite(lora, -2)
    # Nobody can tell which of the two the engine serves now.
    with pytest.raises(openai.ConflictError, match="changed after it was loaded"):
        turn(client, session, name)
    if inplace:
        load(server, name, lora, load_inplace=True)
    else:
        unload(server, name)
        load(server, name, lora)
    turn(client, session, name)
    old, new = of(store, session)
    assert (old.version, new.version) == (1, 1)

    # The same LoRA under another path: no block of its KV cache was ever another's.
    shutil.copytree(lora, tmp_path / "copy")
    load(server, f"{name}-copy", tmp_path / "copy")
    turn(client, f"{session}-copy", f"{name}-copy")
    (copy,) = of(store, f"{session}-copy")
    assert copy.key.fingerprint == new.key.fingerprint
    assert_states_close(state_of(store, new), state_of(store, copy))
    unload(server, f"{name}-copy")
    unload(server, name)


def test_a_loaded_lora_outlives_its_files(
    server: Server, client: openai.OpenAI, store: SessionStore, checkpoint: Path, loras: Path
) -> None:
    session = new_name("gone")
    folder = make(checkpoint, loras / "gone-later")
    load(server, "gone", folder)
    turn(client, session, "gone")
    shutil.rmtree(folder)
    turn(client, session, "gone")
    (info,) = of(store, session)
    assert info.version == 2


def test_a_lora_is_known_from_its_loading_on(
    server: Server, client: openai.OpenAI, store: SessionStore, checkpoint: Path, tmp_path: Path
) -> None:
    session = new_name("from-loading")
    for name in ("gone-at-once", "changed-at-once"):
        load(server, name, make(checkpoint, tmp_path / name))
    shutil.rmtree(tmp_path / "gone-at-once")
    turn(client, session, "gone-at-once")
    (info,) = of(store, session)
    assert info.version == 1

    # Its first turn would otherwise be kept under the new files' key, but written by the old ones.
    overwrite(tmp_path / "changed-at-once", -2)
    with pytest.raises(openai.ConflictError, match="changed after it was loaded"):
        turn(client, session, "changed-at-once")
    assert of(store, session) == [info]
    for name in ("gone-at-once", "changed-at-once"):
        unload(server, name)


def test_a_turn_that_waited_while_its_lora_changed_is_refused(
    server: Server, client: openai.OpenAI, store: SessionStore, checkpoint: Path, tmp_path: Path
) -> None:
    session, name = new_name("waited"), "waited"
    lora = make(checkpoint, tmp_path / "lora")
    load(server, name, lora)
    turn(client, session, name)
    (info,) = of(store, session)
    lease = store.acquire(info.key, "test", seconds=60)
    body = {"model": name, "prompt": PROMPT, "max_tokens": 4, "memory": {"session": session}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        time.sleep(2)  # it has its key by then, and waits for the lease
        overwrite(lora, -2)
        load(server, name, lora, load_inplace=True)
        assert not answer.done()
        store.release(lease)
        refused = answer.result()
    assert refused.status_code == 409, refused.text
    assert json.loads(refused.text)["error"]["type"] == "ConflictError"
    assert of(store, session)[0].version == 1
    unload(server, name)


@pytest.mark.parametrize("loads", [True, False], ids=["loaded", "files"])
@pytest.mark.parametrize("what", ["turn", "ingest"])
def test_what_runs_while_its_lora_changes_is_not_written(
    server: Server, store: SessionStore, checkpoint: Path, tmp_path: Path, what: str, loads: bool
) -> None:
    """Files alone count too: vLLM may read them again at any time."""
    session, name = new_name("running"), f"running-{what}-{loads}"
    lora = make(checkpoint, tmp_path / "lora")
    load(server, name, lora)
    if what == "turn":
        url = f"{server.url}/v1/completions"
        body: dict[str, Any] = {"model": name, "prompt": PROMPT, "memory": {"session": session}}
        body |= {"max_tokens": 900, "ignore_eos": True, "stream": True}
    else:
        url = f"{server.url}/v1/memory/sessions/{session}/ingest?model={name}"
        body = {"token_ids": random_tokens(2, 4000), "segment_tokens": 64, "stream": True}
    events = []
    slowed = ExitStack()
    slowed.enter_context(server.engine_slowed())
    with (
        slowed,
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", url, json=body, timeout=60) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            events += [line] if line else []
            if len(events) == 2:
                overwrite(lora, -2)
                if loads:
                    loading = pool.submit(load, server, name, lora, load_inplace=True)
                slowed.close()
                if loads:
                    loading.result()
    assert "loaded" in events[-2], events[-2:]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 409
    assert of(store, session) == []
    unload(server, name)
