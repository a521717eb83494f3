"""From what a user types (a folder or a Hugging Face Hub id) to a local folder.

The local cache is asked first, so a machine without network serves what it has downloaded once;
`HF_HUB_OFFLINE=1` is respected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from deltamem_vllm.adapter.names import CONFIG_NAME, REFERENCE_WEIGHTS_NAME, WEIGHTS_NAME
from deltamem_vllm.errors import AdapterError, BackboneError

BASE_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What a checkpoint needs to be served; other weight formats of a repository stay there."""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def resolve_adapter_dir(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: the local one, or the Hub's snapshot in the local cache.

    Only the adapter's own files are downloaded.

    Raises:
        AdapterError: there is neither such a folder nor such a repository, or the repository
            holds no adapter.
    """
    return _resolve(
        path_or_hub_id,
        what="adapter",
        files=(CONFIG_NAME, WEIGHTS_NAME, REFERENCE_WEIGHTS_NAME),
        complete=_holds_adapter,
        error=AdapterError,
    )


def resolve_base_dir(path_or_hub_id: str | os.PathLike[str], *, config_only: bool = False) -> Path:
    """The folder of a base model; with `config_only` at least its `config.json` is there.

    Raises:
        BackboneError: there is neither such a folder nor such a repository, or (without
            `config_only`) the repository holds no safetensors.
    """
    return _resolve(
        path_or_hub_id,
        what="base model",
        files=("config.json",) if config_only else BASE_FILES,
        complete=_holds_config if config_only else _holds_checkpoint,
        error=BackboneError,
    )


def _holds_adapter(folder: Path) -> bool:
    weights = (WEIGHTS_NAME, REFERENCE_WEIGHTS_NAME)
    return (folder / CONFIG_NAME).exists() and any((folder / name).exists() for name in weights)


def _holds_config(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _holds_checkpoint(folder: Path) -> bool:
    return _holds_config(folder) and any(folder.glob("*.safetensors"))


def _resolve(
    given: str | os.PathLike[str],
    *,
    what: str,
    files: Sequence[str],
    complete: Callable[[Path], bool],
    error: type[AdapterError] | type[BackboneError],
) -> Path:
    text = os.fspath(given)
    local = Path(text).expanduser()
    # Path("") is the current folder, which nobody means by an empty argument.
    if text and local.is_dir():
        return local
    if text and local.exists():
        raise error(f"{text}: is a file, expected the {what}'s folder; give its parent folder")
    if _HUB_ID.fullmatch(text) is None:
        raise error(
            f"{text!r}: no such folder, and not a Hub id of the form owner/name; give the {what}'s "
            "folder or its Hub id"
        )
    return _download(text, what=what, files=files, complete=complete, error=error)


def _download(
    repo_id: str,
    *,
    what: str,
    files: Sequence[str],
    complete: Callable[[Path], bool],
    error: type[AdapterError] | type[BackboneError],
) -> Path:
    # Imported late: reading local folders must not pay for the Hub client.
    from huggingface_hub import snapshot_download

    reason = f"it does not hold a complete {what}"
    for local_files_only in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    repo_id, allow_patterns=list(files), local_files_only=local_files_only
                )
            )
        # Which exceptions come out depends on the Hub client's version and its HTTP library.
        except Exception as problem:
            reason = str(problem).strip().split("\n", 1)[0] or type(problem).__name__
            continue
        if complete(folder):
            return folder
        reason = f"it does not hold a complete {what} (needed: {', '.join(files)})"
    raise error(
        f"{repo_id!r}: no such folder, and the Hub repository cannot be used: {reason}. Check the "
        "name, the network and HF_HUB_OFFLINE, or give a local folder"
    )
