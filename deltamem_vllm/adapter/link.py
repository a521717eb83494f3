"""A base checkpoint and an adapter, joined into one folder that `vllm serve` takes.

    OUT/config.json          the base's, with our architecture and {"deltamem": {"adapter": ...}}
    OUT/<the base's files>   symlinks, or copies
    OUT/deltamem_adapter/    the adapter in safetensors form

The adapter lies in a subfolder because vLLM loads every weight file of the top folder as the
model's own.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.adapter.backbone import BackboneShape, read_base_config
from deltamem_vllm.adapter.files import load_adapter, save_adapter
from deltamem_vllm.adapter.hub import resolve_base_dir
from deltamem_vllm.adapter.names import ADAPTER_FILES, LINKED_ADAPTER_DIR
from deltamem_vllm.errors import AdapterError, BackboneError

CONFIG_KEY: Final = "deltamem"
"""The key of config.json that marks a linked checkpoint."""

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt")


def link_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    architectures: Mapping[str, str],
    copy: bool = False,
    overwrite: bool = False,
) -> Path:
    """Make a servable checkpoint folder of a base model and an adapter; returns its path.

    Everything is checked before anything is written, and the folder appears whole or not at all.
    Hidden entries of the base (.git, .cache) and adapter files beside its weights are left out.

    Args:
        base: a local checkpoint or a Hub id.
        adapter: a local adapter or a Hub id.
        out: the folder to make. It must be absent or empty; with `overwrite` it may also be a
            folder that this function made.
        architectures: from a stock architecture's name to ours.
        copy: copy the base's files instead of linking to them by absolute path.

    Raises:
        BackboneError: the base is unknown, incomplete, already linked, or not the adapter's.
        AdapterError, ConfigError: the adapter is not valid, or `out` may not be written.
        OSError: the file system refuses.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    _check_target(target, overwrite)
    config_dir = resolve_base_dir(base, config_only=True)
    config = read_base_config(config_dir)
    architecture = _our_architecture(config, config_dir, architectures)
    backbone = BackboneShape.from_config_dict(config)
    loaded = load_adapter(adapter, backbone=backbone)
    base_dir = Path(os.path.abspath(resolve_base_dir(base)))
    if base_dir.resolve() in (target.resolve(), *target.resolve().parents):
        raise BackboneError(f"{target}: lies inside the base {base_dir}; choose a folder outside")
    entries = _base_entries(base_dir)

    config["architectures"] = [architecture]
    config[CONFIG_KEY] = {"adapter": LINKED_ADAPTER_DIR}
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        staging.mkdir()
        for entry in entries:
            _place(entry, staging / entry.name, copy)
        save_adapter(loaded, staging / LINKED_ADAPTER_DIR)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _swap_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise AdapterError(f"{target}: is not a folder; choose a new folder for the checkpoint")
    if not target.exists() or not any(target.iterdir()):
        return
    if not _is_linked_checkpoint(target):
        raise AdapterError(
            f"{target}: is not empty and was not made by `deltamem adapter link`; choose another "
            "folder"
        )
    if not overwrite:
        raise AdapterError(
            f"{target}: already holds a linked checkpoint; choose another folder, or overwrite it "
            "(--overwrite)"
        )


def _is_linked_checkpoint(folder: Path) -> bool:
    try:
        config = read_base_config(folder)
    except BackboneError:
        return False
    return CONFIG_KEY in config and (folder / LINKED_ADAPTER_DIR).is_dir()


def _our_architecture(
    config: Mapping[str, Any], base_dir: Path, architectures: Mapping[str, str]
) -> str:
    names = config.get("architectures")
    known = ", ".join(sorted(architectures))
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise BackboneError(
            f"{base_dir}: its config.json has architectures = {names!r}, expected one of: {known}"
        )
    if CONFIG_KEY in config or names[0] in architectures.values():
        raise BackboneError(
            f"{base_dir}: is already linked to an adapter ({names[0]}); give the stock base model"
        )
    if names[0] not in architectures:
        raise BackboneError(
            f"{base_dir}: the architecture {names[0]} is not supported; supported are: {known}"
        )
    return architectures[names[0]]


def _base_entries(base_dir: Path) -> list[Path]:
    """What of the base goes into the linked checkpoint, config.json excepted."""
    skipped = {"config.json", LINKED_ADAPTER_DIR, *ADAPTER_FILES}
    entries = [
        entry
        for entry in sorted(base_dir.iterdir())
        if entry.name not in skipped and not entry.name.startswith(".")
    ]
    broken = [entry.name for entry in entries if not entry.exists()]
    if broken:
        raise BackboneError(
            f"{base_dir}: broken links {', '.join(broken)}; download the base model again"
        )
    if not any(entry.suffix in _WEIGHT_SUFFIXES for entry in entries):
        raise BackboneError(
            f"{base_dir}: holds no weights (*.safetensors); give the folder of a whole checkpoint"
        )
    return entries


def _place(entry: Path, destination: Path, copy: bool) -> None:
    if not copy:
        destination.symlink_to(entry, target_is_directory=entry.is_dir())
    elif entry.is_dir():
        shutil.copytree(entry, destination)
    else:
        shutil.copy2(entry, destination)


def _swap_in(staging: Path, target: Path) -> None:
    """Put the finished folder in place; an old one is kept until the new one stands there."""
    if not target.exists() or not any(target.iterdir()):
        staging.replace(target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
