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

from deltamem_vllm.adapter.names import ADAPTER_FILES, CONFIG_NAME, LINKED_ADAPTER_DIR
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
        files=ADAPTER_FILES,
        complete=_holds_adapter,
        error=AdapterError,
    )


def resolve_linked_adapter_dir(
    checkpoint: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """The folder of the adapter inside a linked checkpoint; on the Hub, of its `revision`.

    Raises:
        AdapterError: there is neither such a folder nor such a repository, or the repository
            is no linked checkpoint.
    """
    folder = _resolve(
        checkpoint,
        what="linked checkpoint",
        files=[f"{LINKED_ADAPTER_DIR}/{name}" for name in ADAPTER_FILES],
        complete=lambda folder: _holds_adapter(folder / LINKED_ADAPTER_DIR),
        error=AdapterError,
        revision=revision,
    )
    return folder / LINKED_ADAPTER_DIR


def resolve_base_dir(
    path_or_hub_id: str | os.PathLike[str],
    *,
    config_only: bool = False,
    revision: str | None = None,
) -> Path:
    """The folder of a base model; with `config_only` at least its `config.json` is there.

    Args:
        path_or_hub_id: what the user typed.
        config_only: do not download weights.
        revision: branch, tag or commit on the Hub; None is the default branch.

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
        revision=revision,
    )


def _holds_adapter(folder: Path) -> bool:
    weights = [folder / name for name in ADAPTER_FILES if name != CONFIG_NAME]
    return (folder / CONFIG_NAME).exists() and any(path.exists() for path in weights)


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
    revision: str | None = None,
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
    return _download(
        text, what=what, files=files, complete=complete, error=error, revision=revision
    )


def _download(
    repo_id: str,
    *,
    what: str,
    files: Sequence[str],
    complete: Callable[[Path], bool],
    error: type[AdapterError] | type[BackboneError],
    revision: str | None = None,
) -> Path:
    # Imported late: reading local folders must not pay for the Hub client.
    from huggingface_hub import snapshot_download

    reason = f"it does not hold a complete {what}"
    for local_files_only in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=list(files),
                    local_files_only=local_files_only,
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
