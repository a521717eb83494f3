"""The app of `ray.serve.llm`: what it adds to a configuration, and two replicas of it."""

import os
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.errors import BackboneError, EngineConfigError, SettingsError
from deltamem_vllm.ray.llm import LLMArguments, build, with_memory
from tests.ray.cluster import serving

APP = f"llm-{os.getpid()}"
PATIENCE_S = 300


def arguments(store: str, **llm_config: Any) -> LLMArguments:
    model = {"model_id": "demo", "model_source": str(model_dir())}
    return LLMArguments(
        adapter=str(adapter_dir("msw")),
        store=store,
        llm_config={"model_loading_config": model, **llm_config},
    )


def test_engine_and_process_get_what_memory_needs() -> None:
    found = with_memory(
        arguments(
            "redis://host/0",
            engine_kwargs={"max_model_len": 512, "hf_overrides": {"rope_theta": 5}},
            runtime_env={"env_vars": {"DELTAMEM_LEASE_SECONDS": "5"}, "working_dir": "/srv"},
            deployment_config={"num_replicas": 2},
        )
    )
    engine = found["engine_kwargs"]
    assert engine["max_model_len"] == 512
    assert engine["hf_overrides"]["rope_theta"] == 5
    assert engine["hf_overrides"]["deltamem"] == {"adapter": str(adapter_dir("msw"))}
    assert engine["kv_transfer_config"]["kv_connector"] == "DeltaMemConnector"
    assert "MemoryWorkerExtension" in engine["worker_extension_cls"]
    assert found["runtime_env"]["working_dir"] == "/srv"
    variables = found["runtime_env"]["env_vars"]
    assert variables["DELTAMEM_STORE"] == "redis://host/0"
    assert variables["DELTAMEM_LEASE_SECONDS"] == "5"
    assert "deltamem" in variables["VLLM_PLUGINS"].split(",")


def test_what_contradicts_memory_is_refused() -> None:
    redis = "redis://host/0"
    with pytest.raises(SettingsError, match="keeps no sessions"):
        with_memory(arguments("none", deployment_config={"num_replicas": 2}))
    with pytest.raises(SettingsError, match="give routing"):
        with_memory(arguments(redis, deployment_config={"request_router_config": {}}))
    with pytest.raises(SettingsError, match="model_source"):
        with_memory(arguments(redis, model_loading_config={"model_id": "demo"}))
    missing = {"model_id": "demo", "model_source": "/no/such/model"}
    with pytest.raises(BackboneError, match="/no/such/model"):
        with_memory(arguments(redis, model_loading_config=missing))
    other = {"kv_transfer_config": {"kv_connector": "NixlConnector"}}
    with pytest.raises(EngineConfigError, match="kv_connector"):
        with_memory(arguments(redis, engine_kwargs=other))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_of_its_replicas_have_one_memory(tmp_path: Path) -> None:
    """Sessions, their routes, and going on after the replica that has them is killed."""
    given = arguments(
        f"sqlite://{tmp_path}/sessions.db",
        engine_kwargs={"dtype": "float32", "max_model_len": 512, "enforce_eager": True},
        deployment_config={"num_replicas": 2, "ray_actor_options": {"num_cpus": 0}},
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
    )
    body = {"model": "demo", "memory": {"session": "s"}, "max_tokens": 8}
    body |= {"messages": [{"role": "user", "content": "My friend is called Kofi."}]}
    with serving() as url, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        serve.run(build(given), name=APP)
        for version in (1, 2):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.json()["memory"]["version"] == version
        victim, _ = replicas()
        victim.kill()
        deadline = time.monotonic() + PATIENCE_S
        while not (answer := client.post("/v1/chat/completions", json=body)).is_success:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.3)
        assert answer.json()["memory"]["version"] == 3
        assert client.get("/v1/memory/sessions/s").json()["version"] == 3


def replicas() -> list[psutil.Process]:
    """The processes of its replicas, as Ray titles them."""
    title = f"ray::ServeReplica:{APP}:"
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if (one.info["cmdline"] or [""])[0].startswith(title)]
