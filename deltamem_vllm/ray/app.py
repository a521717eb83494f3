"""The Serve app: replicas of `deltamem serve` behind one address, with one memory.

serve run deltamem_vllm.ray.app:build model=MODEL adapter=ADAPTER store=URL num_replicas=2
"""

import os
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deltamem_vllm.errors import SettingsError
from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.ray.compat import check_version
from deltamem_vllm.ray.replica import MemoryReplica

DEPLOYMENT: Final = "MemoryServer"

ROUTER: Final = "deltamem_vllm.ray.routing.SessionRouter"

DEFAULTS: Final[dict[str, Any]] = {
    "max_ongoing_requests": 256,
    "graceful_shutdown_timeout_s": 120.0,
    "graceful_shutdown_wait_loop_s": 1.0,
    "health_check_period_s": 5.0,
    "health_check_timeout_s": 30.0,
}
"""Where Serve's own defaults do not fit: a turn may take minutes and must commit before its replica
goes, and a dead engine should be noticed before clients give up."""


def build(arguments: ServeArguments) -> serve.Application:
    """The app, for `serve run`, `serve deploy` and `serve.run`.

    Raises:
        SettingsError: the arguments cannot be served together.
        EngineConfigError: the installed Ray was never tried.
        DeltaMemError: model, adapter or flags cannot be served, as far as that is known here.
    """
    check_version()
    _check_machines(arguments)
    _check_files(arguments)
    values = arguments.model_dump(mode="json")
    replica = serve.ingress()(MemoryReplica)
    deployment = serve.deployment(replica, name=DEPLOYMENT)
    chosen = options(arguments)
    try:
        return deployment.options(**chosen).bind(values)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"deployment: Serve does not take its options: {error}") from None


def options(arguments: ServeArguments) -> dict[str, Any]:
    """Serve's options of the deployment.

    Raises:
        SettingsError: an option is said twice.
    """
    given = dict(arguments.deployment)
    for ours, says in [
        ("num_replicas", "num_replicas"),
        ("autoscaling_config", "autoscaling_config"),
        ("request_router_config", "routing"),
        ("name", "no argument: it is fixed"),
    ]:
        if ours in given:
            raise SettingsError(f"deployment.{ours}: give it as an argument of the app ({says}).")
    found: dict[str, Any] = {
        **DEFAULTS,
        "request_router_config": RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs=arguments.routing.model_dump(),
        ),
        **_resources(arguments, given),
        **given,
    }
    if arguments.autoscaling_config is not None:
        found["autoscaling_config"] = arguments.autoscaling_config
    else:
        found["num_replicas"] = arguments.num_replicas
    return found


def _resources(arguments: ServeArguments, given: dict[str, Any]) -> dict[str, Any]:
    actor = dict(given.pop("ray_actor_options", None) or {})
    runtime_env = dict(actor.pop("runtime_env", None) or {})
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **arguments.environment}
    actor = {"num_cpus": 1, **actor, "runtime_env": runtime_env}
    if arguments.uses_ray_executor and "placement_group_bundles" not in given:
        # The first one is the replica's own; each worker gets a GPU, wherever there is one.
        bundles = [{"CPU": actor["num_cpus"]}, *({"GPU": 1} for _ in range(arguments.gpus))]
        return {
            "ray_actor_options": actor,
            "placement_group_bundles": bundles,
            "placement_group_strategy": given.get("placement_group_strategy", "PACK"),
        }
    if arguments.gpus and not arguments.uses_ray_executor:
        actor.setdefault("num_gpus", arguments.gpus)
    return {"ray_actor_options": actor}


def _check_files(arguments: ServeArguments) -> None:
    """Say at once, and once, what all replicas would say three times each.

    Only of folders, and where replicas have no other machine to find them on.
    """
    named = [arguments.model, *filter(None, [arguments.adapter])]
    others = bool(os.environ.get("RAY_ADDRESS"))
    if ray.is_initialized():
        others = len([node for node in ray.nodes() if node["Alive"]]) > 1
    if not others and all(Path(name).expanduser().is_absolute() for name in named):
        arguments.launch({**os.environ, **arguments.environment})


def _check_machines(arguments: ServeArguments) -> None:
    """A store of one machine needs all replicas there."""
    if arguments.most_replicas <= 1 or not arguments.is_on_one_machine:
        return
    actor = arguments.deployment.get("ray_actor_options") or {}
    if "label_selector" in actor or "resources" in actor or not ray.is_initialized():
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        raise SettingsError(
            f"store = {arguments.store} is on one machine, and the cluster has {len(nodes)}. Give "
            "redis://host:port/0, or keep all replicas on the machine of the file: "
            "deployment.ray_actor_options.resources or .label_selector."
        )
