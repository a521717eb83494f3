"""The same app as a deployment of `ray.serve.llm`, for those who configure all their models there.

serve run deltamem_vllm.ray.llm:build, or in a file:

    import_path: deltamem_vllm.ray.llm:build
    args:
      adapter: ADAPTER
      store: redis://host:6379/0
      llm_config:
        model_loading_config: {model_id: NAME, model_source: MODEL}
        engine_kwargs: {max_model_len: 32768}
        deployment_config: {num_replicas: 2}

Ray's `LLMServer` starts the engine and builds vLLM's own ASGI app, with the routes of memory.
Requests reach that app through Serve's proxy and our router. `build_openai_app` would put an
ingress of Ray's own before it, which knows neither the routes nor the field `memory`.
"""

import json
import os
from itertools import pairwise
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import RequestRouterConfig

from deltamem_vllm.errors import SettingsError
from deltamem_vllm.ray.app import DEFAULTS, ROUTER
from deltamem_vllm.ray.arguments import ServeArguments, SessionRouting
from deltamem_vllm.ray.compat import check_version
from deltamem_vllm.serve import CONNECTOR, EXTENSION, OVERRIDES

OURS: Final = {
    OVERRIDES: "hf_overrides",
    CONNECTOR: "kv_transfer_config",
    EXTENSION: "worker_extension_cls",
}
"""Flags of vLLM that memory needs, and their names among `engine_kwargs`."""


class LLMArguments(BaseModel):
    """Arguments of the builder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    llm_config: dict[str, Any]
    """Of `ray.serve.llm.LLMConfig`."""

    adapter: str | None = None
    """Adapter of a base model; a linked checkpoint has its own."""

    store: str
    """The store that all replicas share; see `ServeArguments`."""

    routing: SessionRouting = SessionRouting()
    """How requests find a replica."""


def build(arguments: LLMArguments) -> serve.Application:
    """The app, for `serve run`, `serve deploy` and `serve.run`.

    Raises:
        SettingsError: the arguments cannot be served together.
        DeltaMemError: model or adapter cannot be served; they are looked at here.
    """
    check_version()
    # Heavy: they load vLLM.
    from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment

    config = LLMConfig(**with_memory(arguments))
    options = {
        name: value for name, value in DEFAULTS.items() if name not in config.deployment_config
    }
    options["request_router_config"] = RequestRouterConfig(
        request_router_class=ROUTER, request_router_kwargs=arguments.routing.model_dump()
    )
    application: serve.Application = build_llm_deployment(
        config, deployment_cls=serve.ingress()(LLMServer), override_serve_options=options
    )
    return application


def with_memory(arguments: LLMArguments) -> dict[str, Any]:
    """The `llm_config`, with what memory needs of the engine and of its process.

    Raises:
        SettingsError: something is missing, contradicts memory, or is said twice.
        DeltaMemError: model or adapter cannot be served.
    """
    given = arguments.llm_config
    source = given.get("model_loading_config", {}).get("model_source")
    if not isinstance(source, str):
        raise SettingsError(
            "llm_config.model_loading_config.model_source: expected the model's folder or Hub id, "
            f"not {source!r}."
        )
    deployment = given.get("deployment_config", {})
    if "request_router_config" in deployment:
        raise SettingsError("llm_config.deployment_config.request_router_config: give routing.")
    runtime = given.get("runtime_env") or {}
    engine = dict(given.get("engine_kwargs", {}))
    flags = [
        part
        for flag, name in OURS.items()
        if name in engine
        for part in (flag, _text(engine.pop(name)))
    ]
    checked = ServeArguments(
        model=source,
        adapter=arguments.adapter,
        store=arguments.store,
        flags=flags,
        environment=runtime.get("env_vars", {}),
        num_replicas=deployment.get("num_replicas", 1),
        autoscaling_config=deployment.get("autoscaling_config"),
    )
    launch = checked.launch({**os.environ, **checked.environment})
    for flag, value in pairwise(launch.arguments):
        if flag in OURS:
            engine[OURS[flag]] = value if flag == EXTENSION else json.loads(value)
    variables = {**checked.environment, **launch.environment}
    return {**given, "engine_kwargs": engine, "runtime_env": {**runtime, "env_vars": variables}}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
