"""`ServeArguments`: what `serve run deltamem_vllm.ray.app:build` and its YAML file can say.

The engine is configured by vLLM's own flags, Serve by its own options; what is here joins the two
and refuses what would give replicas memories of their own. `docs/ray.md` has the table.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ray.serve.config import AutoscalingConfig

from deltamem_vllm.api.settings import (
    NO_STORE,
    ServerSettings,
    unknown_variables,
    variable,
    without_password,
)
from deltamem_vllm.errors import SettingsError
from deltamem_vllm.serve import Launch, plan, split_flags

SHARED_SCHEMES: Final = ("redis", "rediss")
"""Stores that replicas on any machine reach."""

SERVERS_FLAGS: Final = (
    "--host",
    "--port",
    "--uds",
    "--api-server-count",
    "--headless",
    "--ssl-keyfile",
    "--ssl-certfile",
    "--root-path",
)
"""Flags of vLLM's own HTTP server, whose place Serve takes."""

EXECUTOR_FLAG: Final = "--distributed-executor-backend"


def _split(given: object) -> object:
    return shlex.split(given) if isinstance(given, str) else given


def _object(given: object) -> object:
    """`serve run` passes strings only."""
    return json.loads(given) if isinstance(given, str) else given


Options = Annotated[dict[str, Any], BeforeValidator(_object)]


class SessionRouting(BaseModel):
    """How requests find a replica; see `deltamem_vllm.ray.routing`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_virtual_nodes: int = Field(default=100, ge=1)
    """Places of a replica on the hash ring: more spread sessions more evenly."""

    max_imbalance: int = Field(default=16, ge=1)
    """How many more running requests than the least busy one a session's replica may have before a
    request goes elsewhere."""


class ServeArguments(BaseModel):
    """Arguments of the app's builder.

    Raises:
        SettingsError: an argument is not valid; the message names it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        # Serve shows what pydantic says of our error, and a store's URL has a password.
        hide_input_in_errors=True,
    )

    model: str = Field(min_length=1)
    """Linked checkpoint, or base model: a folder or a Hub id that every replica can read."""

    adapter: str | None = None
    """Adapter of a base model."""

    store: str
    """The store that all replicas share: `redis://host:port/0`; `sqlite:///path/to/file.db` if all
    run on one machine; `none`, for one replica, serves ephemeral memory only."""

    flags: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    """Flags of `vllm serve`: a list, or one string as for a shell."""

    environment: Annotated[dict[str, str], BeforeValidator(_object)] = Field(default_factory=dict)
    """Variables of the replicas' processes, such as `DELTAMEM_LEASE_SECONDS`. Whoever reads Serve's
    configuration reads them: set secrets where the nodes are started."""

    num_replicas: int | Literal["auto"] = 1
    """Replicas, or `auto` for Serve's default autoscaling."""

    autoscaling_config: Options | None = None
    """Serve's `AutoscalingConfig`."""

    gpus: int = Field(default=0, ge=0)
    """GPUs of a replica: tensor times pipeline parallel size. With
    `--distributed-executor-backend ray` they may be on several machines."""

    routing: Annotated[SessionRouting, BeforeValidator(_object)] = SessionRouting()
    """How requests find a replica."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port at which each machine shows the metrics of its replicas, added up; none if not set."""

    deployment: Options = Field(default_factory=dict)
    """Any other option of `@serve.deployment`, such as `ray_actor_options` or
    `max_ongoing_requests`."""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(_problem(dict(item)) for item in error.errors())
            raise SettingsError(f"the app's arguments are not valid: {problems}") from None

    @field_validator("num_replicas", mode="before")
    @classmethod
    def _positive(cls, given: object) -> object:
        if isinstance(given, str) and given.removeprefix("-").isdecimal():
            given = int(given)
        if isinstance(given, int) and not isinstance(given, bool) and given < 1:
            raise ValueError("expected at least 1, or auto")
        return given

    @field_validator("autoscaling_config")
    @classmethod
    def _serves_own(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            try:
                AutoscalingConfig(**given)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(map(str, first["loc"])) or "it"
                raise ValueError(f"{name}: {first['msg']}") from None
        return given

    @field_validator("store")
    @classmethod
    def _known_store(cls, url: str) -> str:
        return ServerSettings(store=url).store

    @field_validator("flags")
    @classmethod
    def _not_the_servers(cls, flags: Sequence[str]) -> tuple[str, ...]:
        names = {flag.partition("=")[0].replace("_", "-") for flag in flags}
        refused = sorted(names.intersection(SERVERS_FLAGS))
        if refused:
            raise ValueError(
                f"{', '.join(refused)} would configure vLLM's own HTTP server, and here requests "
                "come through Ray Serve: see http_options in serving/ray/serve.yaml"
            )
        split_flags(flags)
        return tuple(flags)

    @field_validator("environment")
    @classmethod
    def _known_variables(cls, given: Mapping[str, str]) -> dict[str, str]:
        unknown = unknown_variables(given)
        if variable("store") in given:
            raise ValueError(f"give the argument store, and not {variable('store')}")
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such setting; see docs/configuration.md")
        return dict(given)

    @model_validator(mode="after")
    def _one_memory(self) -> Self:
        if self.autoscaling_config is not None and self.num_replicas not in (1, "auto"):
            raise ValueError("give num_replicas or autoscaling_config, not both")
        self.check_store(self.most_replicas)
        return self

    @property
    def most_replicas(self) -> float:
        """How many replicas there may be at a time."""
        if self.autoscaling_config is not None:
            most = self.autoscaling_config.get("max_replicas", 1)
            return float(most)
        return float("inf") if self.num_replicas == "auto" else float(self.num_replicas)

    @property
    def is_on_one_machine(self) -> bool:
        """Whether the store is a file or socket that other machines do not have."""
        return self.store != NO_STORE and self.store.partition("://")[0] not in SHARED_SCHEMES

    @property
    def uses_ray_executor(self) -> bool:
        """Whether the engine's workers are Ray actors."""
        flags = [flag.replace("_", "-") for flag in self.flags]
        joined = f"{EXECUTOR_FLAG}=ray" in flags
        return joined or any(
            name == EXECUTOR_FLAG and value == "ray" for name, value in pairwise(flags)
        )

    def check_store(self, replicas: float) -> None:
        """Refuse a store that several replicas would not share.

        Raises:
            ValueError: it is one.
        """
        if replicas <= 1:
            return
        if self.store == NO_STORE:
            raise ValueError(
                f"store = {NO_STORE} keeps no sessions, so a turn would find nothing of the turn "
                "before it. With several replicas give a store that all of them reach: "
                "redis://host:port/0, or sqlite:///path/to/file.db if all run on one machine"
            )
        _, _, path = self.store.partition("://")
        if self.is_on_one_machine and not path.startswith("/"):
            raise ValueError(
                f"store = {self.store}: replicas have working folders of their own, and would each "
                "make a file there. Give an absolute path: sqlite:///path/to/file.db"
            )

    def launch(self, environment: Mapping[str, str]) -> Launch:
        """The `vllm serve` that a replica is.

        Raises:
            DeltaMemError: model, adapter or flags cannot be served; see `deltamem_vllm.serve.plan`.
        """
        return plan(self.model, self.adapter, self.store, self.flags, environment)


def _problem(item: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if not name:
        return without_password(message)
    # The input of an argument that is missing is all the others.
    is_shown = item["type"] != "missing" and not name.startswith("environment")
    given = f" = {without_password(str(item['input']))!r}" if is_shown else ""
    return f"{name}{given}: {without_password(message)}"
