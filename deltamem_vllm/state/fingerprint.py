"""What decides what a state means, as digests.

A state is of use only to the model that wrote it: the same text has to become the same tokens, the
same hidden states and the same writes. `FingerprintParts` names what that depends on, part by part,
so that a refusal can say which part differs. Not part of it is what changes results by rounding
only: vLLM's version, parallelism, the dtype computed in, the KV cache's dtype, the attention
backend.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from deltamem_vllm.adapter.backbone import read_base_config
from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.adapter.names import ADAPTER_FILES
from deltamem_vllm.adapter.weights import Adapter
from deltamem_vllm.errors import BackboneError, SnapshotError
from deltamem_vllm.state.digests import file_digests

FORMAT: Final = 1
"""Changes when the same model would get another fingerprint."""

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt")
"""In the order in which vLLM looks for weights: it loads files of one kind only."""

WEIGHT_INDEX: Final = "model.safetensors.index.json"

TOKENIZER_CONFIG: Final = "tokenizer_config.json"

TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""Hashed byte by byte where they are there, `*.tiktoken` too; `TOKENIZER_CONFIG` is hashed without
what `TOKENIZER_CONFIG_IGNORED` lists."""

TOKENIZER_CONFIG_IGNORED: Final = frozenset(
    {"_commit_hash", "chat_template", "name_or_path", "processor_class", "transformers_version"}
)
"""The chat template is a part of its own; the rest says where a tokenizer came from."""

CONFIG_IGNORED: Final = frozenset(
    {
        # Where the checkpoint came from, and what wrote it.
        "_commit_hash",
        "_name_or_path",
        "transformers_version",
        # Which of two classes of the same arithmetic serves it: `model_type` says which it is.
        "architectures",
        "auto_map",
        CONFIG_KEY,
        # What it is stored or computed in.
        "dtype",
        "torch_dtype",
        # Training, and what transformers returns or keeps.
        "attention_dropout",
        "gradient_checkpointing",
        "hidden_dropout",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "return_dict",
        "use_cache",
        # A part of its own.
        "quantization_config",
    }
)
"""Keys of config.json that do not change what a state means. Every other key counts, known or not:
a needless refusal can be mended by an alias, a wrong state cannot."""

LORA_IGNORED: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Keys of adapter_config.json that matter to training only, or say where a LoRA came from."""

LORA_CONFIG: Final = "adapter_config.json"
LORA_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")

_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FingerprintParts:
    """sha256 (hex) of each part; equal parts mean the same."""

    weights: str
    """The backbone's weight files; under an alias, its name."""

    config: str
    """The backbone's hyper-parameters; under an alias, its name."""

    tokenizer: str
    """Without the chat template."""

    chat_template: str
    adapter: str
    quantization: str
    """The backbone's; under an alias, its name."""

    lora: str
    """Of no LoRA, unless a request uses one."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str) or not _HEX.fullmatch(value):
                raise SnapshotError(f"the part {name} of a fingerprint is no sha256: {value!r:.80}")

    @property
    def digest(self) -> str:
        """All parts in one: 64 hexadecimal digits; the `fingerprint` of a `SessionKey`."""
        return _json_digest({"format": FORMAT, **dataclasses.asdict(self)})

    def differences(self, other: "FingerprintParts") -> list[str]:
        """Names of the parts that differ."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Parts as they were written into a file.

        Raises:
            SnapshotError: a part is missing, unknown, or no digest.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise SnapshotError(
                f"its fingerprint has the parts {', '.join(sorted(values))[:400] or 'none'}, "
                f"expected {', '.join(sorted(known))}."
            )
        return cls(**values)

    def with_lora(self, lora: str | os.PathLike[str] | None) -> "FingerprintParts":
        """The fingerprint of the same model with a LoRA's folder, or without one.

        Raises:
            BackboneError: the folder holds no LoRA.
        """
        return dataclasses.replace(self, lora=_lora_digest(lora))


def fingerprint(
    model_dir: str | os.PathLike[str],
    adapter: Adapter,
    *,
    quantization: str | None,
    chat_template: str | None,
    lora: str | os.PathLike[str] | None = None,
    alias: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
) -> FingerprintParts:
    """The fingerprint of a model with memory. Blocks while weights are read for the first time:
    seconds per 10 GB from a fast disk.

    A linked checkpoint has the same as its base together with its adapter.

    Args:
        model_dir: the checkpoint's folder: of `adapter.resolve_base_dir`.
        adapter: the adapter served.
        quantization: the backbone's method as vLLM names it, None for none; what the checkpoint
            says about itself goes first.
        chat_template: the template's text; None for the checkpoint's own.
        lora: the folder of a LoRA; None without one.
        alias: stands for weights, config and quantization, which are then not read. Models of one
            alias share sessions; whoever gives it vouches that their states mean the same.
        overrides: the `hf_overrides` that are laid over config.json.
        tokenizer_dir: the tokenizer's folder, if it is not the checkpoint's.

    Raises:
        BackboneError: the folder has no weights or config, or holds a damaged file.
        OSError: a file cannot be read.
    """
    folder = Path(model_dir)
    tokenizer_folder = folder if tokenizer_dir is None else Path(tokenizer_dir)
    tokenizer_config = _read_json(tokenizer_folder / TOKENIZER_CONFIG)
    if chat_template is None:
        chat_template = _own_chat_template(tokenizer_folder, tokenizer_config)
    if alias is None:
        config = {**read_base_config(folder), **(overrides or {})}
        weights, config_digest = _weights_digest(folder), _config_digest(config)
        quantization_digest = _quantization_digest(quantization, config.get("quantization_config"))
    else:
        weights = config_digest = quantization_digest = _json_digest(["alias", alias])
    return FingerprintParts(
        weights=weights,
        config=config_digest,
        tokenizer=_tokenizer_digest(tokenizer_folder, tokenizer_config),
        chat_template=_json_digest(chat_template),
        adapter=adapter.fingerprint,
        quantization=quantization_digest,
        lora=_lora_digest(lora),
    )


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """The parts of a checkpoint without memory, by the names that `FingerprintParts` has for them.
    Blocks as `fingerprint` does.

    Raises:
        BackboneError: the folder has no weights or config, or holds a damaged file.
        OSError: a file cannot be read.
    """
    tokenizer_config = _read_json(folder / TOKENIZER_CONFIG)
    return {
        "weights": _weights_digest(folder),
        "config": _config_digest(read_base_config(folder)),
        "tokenizer": _tokenizer_digest(folder, tokenizer_config),
        "chat_template": _json_digest(_own_chat_template(folder, tokenizer_config)),
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that vLLM loads as the backbone's weights; an adapter's beside them do not count.

    Raises:
        BackboneError: there are none, or the index names one that is absent.
    """
    index = _read_json(folder / WEIGHT_INDEX)
    if index:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(_is_file_name(name) for name in names.values()):
            raise BackboneError(f"{folder / WEIGHT_INDEX}: has no weight_map of file names")
        files = [folder / name for name in sorted(set(names.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise BackboneError(f"{folder}: {', '.join(absent)} is missing; download it again")
        return files
    for suffix in WEIGHT_SUFFIXES:
        files = [
            path
            for path in sorted(folder.glob(f"*{suffix}"))
            if path.name not in ADAPTER_FILES and not path.name.startswith(("training_args", "."))
        ]
        if files:
            return files
    raise BackboneError(f"{folder}: holds no weights (*.safetensors)")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _weights_digest(folder: Path) -> str:
    return _json_digest(sorted(file_digests(weight_files(folder))))


def _config_digest(config: Mapping[str, Any]) -> str:
    return _json_digest({key: value for key, value in config.items() if key not in CONFIG_IGNORED})


def _quantization_digest(method: str | None, config: Any) -> str:
    if isinstance(config, Mapping):
        # Of one method in a checkpoint, vLLM makes one of several, by the kernels that a GPU has.
        method = config.get("quant_method", method)
    return _json_digest([method, config])


def _tokenizer_digest(folder: Path, config: Mapping[str, Any]) -> str:
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    names += sorted(path.name for path in folder.glob("*.tiktoken"))
    digests = file_digests(folder / name for name in names)
    kept = {key: value for key, value in config.items() if key not in TOKENIZER_CONFIG_IGNORED}
    return _json_digest([dict(zip(names, digests, strict=True)), kept])


def _own_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> Any:
    """As transformers looks for it; a tokenizer may have several, by name."""
    text = folder / "chat_template.jinja"
    if text.exists():
        return text.read_text(encoding="utf-8")
    in_json = _read_json(folder / "chat_template.json").get("chat_template")
    return in_json or tokenizer_config.get("chat_template")


def _lora_digest(lora: str | os.PathLike[str] | None) -> str:
    if lora is None:
        return _json_digest(None)
    folder = Path(lora)
    config = _read_json(folder / LORA_CONFIG)
    files = [folder / name for name in LORA_WEIGHTS if (folder / name).exists()][:1]
    if not config or not files:
        raise BackboneError(
            f"{folder}: is no LoRA's folder; expected {LORA_CONFIG} and {LORA_WEIGHTS[0]}"
        )
    kept = {
        # PEFT writes sets of names as lists, in another order each time.
        key: sorted(value) if _is_name_list(value) else value
        for key, value in config.items()
        if key not in LORA_IGNORED
    }
    return _json_digest([kept, file_digests(files)])


def _is_name_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty without the file.

    Raises:
        BackboneError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: not valid JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _json_digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A lone surrogate is valid in JSON, and in no other encoding.
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
