"""Reading and writing adapter folders, in the reference's form and in ours.

Our form is a safetensors file with the metadata `format`, `format_version` and `fingerprint`; a
file whose fingerprint is not that of its content (a config edited afterwards, for example) is
refused. The reference's form carries no proof, so there only structure and values are checked.
"""

from __future__ import annotations

import io
import os
import pickle
import uuid
from pathlib import Path
from typing import Any, Final, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deltamem_vllm.adapter.backbone import BackboneShape
from deltamem_vllm.adapter.hub import resolve_adapter_dir
from deltamem_vllm.adapter.names import (
    ADAPTER_FILES,
    CONFIG_NAME,
    REFERENCE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from deltamem_vllm.adapter.weights import Adapter
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.errors import AdapterError

AdapterForm = Literal["safetensors", "reference"]

FORMAT_NAME: Final = "deltamem-adapter"
FORMAT_VERSION: Final = "1"


def load_adapter(path: str | os.PathLike[str], *, backbone: BackboneShape | None = None) -> Adapter:
    """Read and check an adapter; tensors keep the dtype of the file and lie on the CPU.

    Args:
        path: a folder or a Hub id. Of two weight files the safetensors one is read.
        backbone: if given, the adapter must have been made for a model of these sizes.

    Raises:
        ConfigError: `delta_mem_config.json` is not valid.
        AdapterError: a file is missing, damaged, hostile, of another format version, or does not
            hold what its config says.
        BackboneError: the adapter does not fit `backbone`.
    """
    folder = resolve_adapter_dir(path)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise AdapterError(
            f"{folder}: has no {CONFIG_NAME}; expected an adapter's folder, with that file and "
            f"{WEIGHTS_NAME} or {REFERENCE_WEIGHTS_NAME}"
        )
    config = DeltaMemConfig.from_file(config_path)
    weights_path = folder / WEIGHTS_NAME
    if weights_path.exists():
        tensors, claimed = _read_safetensors(weights_path)
        adapter = Adapter.from_tensors(config, tensors, source=folder)
        if adapter.fingerprint != claimed:
            raise AdapterError(
                f"{weights_path}: its fingerprint is {claimed[:16]}..., its content (with "
                f"{CONFIG_NAME}) has {adapter.fingerprint[:16]}...; one of the two files was "
                "changed or belongs to another adapter: restore both, or convert again"
            )
    else:
        reference_path = folder / REFERENCE_WEIGHTS_NAME
        if not reference_path.exists():
            raise AdapterError(
                f"{folder}: has no weights; expected {WEIGHTS_NAME} or {REFERENCE_WEIGHTS_NAME}"
            )
        adapter = Adapter.from_tensors(config, _read_reference(reference_path), source=folder)
    if backbone is not None:
        adapter.check_backbone(backbone)
    return adapter


def save_adapter(
    adapter: Adapter,
    out_dir: str | os.PathLike[str],
    *,
    form: AdapterForm = "safetensors",
    overwrite: bool = False,
) -> Path:
    """Write an adapter's two files and return their folder, which is created if needed.

    Each file appears whole or not at all. The config goes in last (and an old one goes first), so
    a folder that a crash left behind is refused as incomplete, never read as a mix.

    Raises:
        AdapterError: the folder already holds an adapter and `overwrite` is false, or holds a
            model; or `form` is unknown.
        OSError: the folder cannot be written.
    """
    if form not in get_args(AdapterForm):
        raise AdapterError(f"unknown form {form!r}; expected 'safetensors' or 'reference'")
    out = Path(out_dir).expanduser()
    present = [name for name in ADAPTER_FILES if (out / name).exists()]
    if present and not overwrite:
        raise AdapterError(
            f"{out}: already holds {', '.join(present)}; choose another folder, or overwrite it "
            "(--overwrite)"
        )
    if (out / "config.json").exists():
        raise AdapterError(
            f"{out}: holds a model, whose weights vLLM would look for in the adapter's file too; "
            "choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in present:
        (out / name).unlink()
    if form == "safetensors":
        write_atomically(out / WEIGHTS_NAME, _to_safetensors(adapter))
    else:
        buffer = io.BytesIO()
        torch.save(dict(adapter.tensors), buffer)
        write_atomically(out / REFERENCE_WEIGHTS_NAME, buffer.getvalue())
    write_atomically(out / CONFIG_NAME, adapter.config.to_json().encode())
    return out


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that a reader, or a crash, sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_safetensors(adapter: Adapter) -> bytes:
    metadata = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "fingerprint": adapter.fingerprint,
    }
    return safetensors.torch.save(adapter.tensors, metadata=metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the fingerprint that the file claims."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a readable safetensors file ({error}); download or convert it again"
        ) from error
    return tensors, metadata["fingerprint"]


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT_NAME or "fingerprint" not in metadata:
        raise AdapterError(
            f"{path}: is not in the format {FORMAT_NAME!r} (its metadata says "
            f"{metadata.get('format')!r}); make it with `deltamem adapter convert`"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: has format version {version!r}, this package reads {FORMAT_VERSION!r}; "
            "convert the adapter with this version, or update the package"
        )


def _read_reference(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only is stated here, so no environment variable can switch it off.
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or hostile pickle can fail in any way; each of them means: refused.
    except Exception as error:
        # torch's own text advises to execute such a file.
        hostile = isinstance(error, pickle.UnpicklingError)
        reason = "not a pickle of tensors" if hostile else f"{type(error).__name__}: {error}"
        reason = reason.split("\n", 1)[0]
        raise AdapterError(
            f"{path}: cannot be loaded as a plain dict of tensors ({reason}); the file is damaged, "
            "or holds more than tensors and was not executed: get it again from its source"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise AdapterError(
            f"{path}: holds a {type(content).__name__}, expected a dict from names to tensors, as "
            "the reference's training writes it"
        )
    return content
