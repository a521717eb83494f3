"""Arguments of the Serve app: what contradicts itself is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.errors import AdapterError, BackboneError, EngineConfigError, SettingsError
from deltamem_vllm.ray.app import DEFAULTS, build, options
from deltamem_vllm.ray.arguments import ServeArguments

REDIS = "redis://host:6379/0"
FILE = "sqlite:///srv/sessions.db"


def arguments(**values: Any) -> ServeArguments:
    return ServeArguments(**{"model": "m", "store": REDIS, **values})


def test_a_command_line_says_the_same_as_a_file() -> None:
    """`serve run` passes strings only."""
    words = arguments(
        num_replicas="2",
        gpus="1",
        metrics_port="9400",
        flags="--dtype float32 --served-model-name 'two words'",
        environment='{"DELTAMEM_LEASE_SECONDS": "5"}',
        deployment='{"max_ongoing_requests": 7}',
        routing='{"max_imbalance": 3}',
    )
    values = arguments(
        num_replicas=2,
        gpus=1,
        metrics_port=9400,
        flags=["--dtype", "float32", "--served-model-name", "two words"],
        environment={"DELTAMEM_LEASE_SECONDS": "5"},
        deployment={"max_ongoing_requests": 7},
        routing={"max_imbalance": 3},
    )
    assert words == values
    assert ServeArguments(**values.model_dump(mode="json")) == values


@pytest.mark.parametrize("many", [{"num_replicas": 2}, {"num_replicas": "auto"}])
@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("none", "keeps no sessions"),
        ("sqlite://sessions.db", "absolute path"),
    ],
)
def test_replicas_with_memories_of_their_own_are_refused(
    many: dict[str, Any], store: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        arguments(store=store, **many)
    with pytest.raises(SettingsError, match=says):
        arguments(store=store, autoscaling_config={"max_replicas": 2})
    assert arguments(store=store, num_replicas=1)
    for shared in (REDIS, "rediss://host/0", FILE):
        assert arguments(store=shared, **many)


def test_replicas_that_a_configuration_adds_are_checked_too() -> None:
    """A replica asks how many it is one of."""
    with pytest.raises(ValueError, match="keeps no sessions"):
        arguments(store="none").check_store(2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": ""}, "model"),
        ({"store": "mysql://x"}, "store"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": "0"}, "num_replicas"),
        ({"num_replicas": "-1"}, "num_replicas"),
        ({"num_replica": 2}, "num_replica"),
        ({"num_replicas": 2, "autoscaling_config": {"max_replicas": 2}}, "not both"),
        ({"flags": "--port 8000"}, "Ray Serve"),
        ({"flags": ["--api_server_count=2"]}, "--api-server-count"),
        ({"flags": "--hf-overrides"}, "needs a value"),
        ({"environment": {"DELTAMEM_STORE": REDIS}}, "argument store"),
        ({"environment": {"DELTAMEM_LEASE_SECOND": "5"}}, "no such setting"),
        ({"deployment": "{"}, "deployment"),
        ({"autoscaling_config": {"max_replicas": None}}, "max_replicas: Input should be"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        arguments(**values)


@pytest.mark.parametrize(
    "given", [{"nosuch": 1}, {"max_ongoing_requests": "x"}, {"ray_actor_options": {"nosuch": 1}}]
)
def test_options_that_serve_does_not_know_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        build(arguments(deployment=given))


def test_options_may_be_null() -> None:
    assert options(arguments(deployment={"ray_actor_options": None}))["ray_actor_options"]


def test_messages_hide_passwords_and_variables() -> None:
    with pytest.raises(SettingsError) as caught:
        arguments(store="redos://me:secret@host/0", environment={"DELTAMEM_X": "secret"})
    assert "secret" not in str(caught.value)


def test_what_is_missing_is_named_without_the_rest() -> None:
    with pytest.raises(SettingsError) as caught:
        ServeArguments(model="m", environment={"HF_TOKEN": "secret"})
    assert str(caught.value).endswith("not valid: store: Field required")
    given = {"model": "m", "store": "redis://me:secret@host/0", "environment": {"DELTAMEM_X": "1"}}
    with pytest.raises(ValueError, match="DELTAMEM_X") as shown:
        ServeArguments.model_validate(given)  # as Serve does
    assert "secret" not in str(shown.value)


@pytest.mark.parametrize("name", ["num_replicas", "request_router_config", "name"])
def test_options_are_said_once(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        options(arguments(deployment={name: 1}))


def test_options_are_ours_unless_given() -> None:
    found = options(arguments(num_replicas=3, deployment={"max_ongoing_requests": 5}))
    assert found["num_replicas"] == 3
    assert found["max_ongoing_requests"] == 5
    for name, value in DEFAULTS.items():
        assert name == "max_ongoing_requests" or found[name] == value
    scaled = options(arguments(autoscaling_config={"min_replicas": 1, "max_replicas": 4}))
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"]["max_replicas"] == 4


def test_environment_joins_that_of_the_actor_options() -> None:
    actor = {"num_cpus": 2, "runtime_env": {"env_vars": {"A": "1"}}}
    found = options(arguments(environment={"B": "2"}, deployment={"ray_actor_options": actor}))
    assert found["ray_actor_options"]["runtime_env"]["env_vars"] == {"A": "1", "B": "2"}
    assert found["ray_actor_options"]["num_cpus"] == 2


@pytest.mark.parametrize("executor", [["--distributed-executor-backend", "ray"], []])
def test_gpus_are_asked_for_where_the_workers_run(executor: list[str]) -> None:
    """Those of one process at the replica, those of Ray's workers in a bundle each."""
    found = options(arguments(gpus=4, flags=["--tensor-parallel-size", "4", *executor]))
    if executor:
        assert found["placement_group_bundles"] == [{"CPU": 1}, *[{"GPU": 1}] * 4]
        assert "num_gpus" not in found["ray_actor_options"]
    else:
        assert found["ray_actor_options"]["num_gpus"] == 4
        assert "placement_group_bundles" not in found


def test_folders_are_looked_at_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is but one machine; others may have what this one has not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    missing = str(tmp_path / "missing")
    model, adapter = str(model_dir()), str(adapter_dir("msw"))
    assert build(arguments(model=model, adapter=adapter))
    with pytest.raises(BackboneError, match="missing"):
        build(arguments(model=missing, adapter=adapter))
    with pytest.raises(AdapterError, match="missing"):
        build(arguments(model=model, adapter=missing))
    with pytest.raises(EngineConfigError, match="kv-transfer-config"):
        build(arguments(model=model, adapter=adapter, flags=["--kv-transfer-config", "{"]))
    monkeypatch.setenv("RAY_ADDRESS", "ray.example.com:6379")
    assert build(arguments(model=missing, adapter=adapter))
