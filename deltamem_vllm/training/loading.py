"""What a run takes from a base model's folder: its tokenizer, and the frozen model itself."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltamem_vllm.adapter.backbone import read_base_config
from deltamem_vllm.errors import BackboneError, TrainingError
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.training.settings import Device, Dtype


def check_architecture(folder: Path) -> None:
    """Refuse, before anything is computed, a base model that could not be served with memory.

    Raises:
        BackboneError: it is one.
    """
    found = read_base_config(folder).get("architectures")
    name = found[0] if isinstance(found, list) and found else None
    if name not in ARCHITECTURES:
        raise BackboneError(
            f"{folder} has architecture {name!r}; delta-mem serves "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        BackboneError: transformers cannot load it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise BackboneError(
            f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})"
        ) from None


def load_backbone(folder: Path, dtype: Dtype, asked: Device) -> PreTrainedModel:
    """The frozen backbone, on the device that is asked for.

    Raises:
        BackboneError: transformers cannot load it.
        TrainingError: a GPU is asked for, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise TrainingError("--device cuda: torch sees no GPU here")
    device = "cuda" if has_gpu and asked != "cpu" else "cpu"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    # Of files that were cut, or are pointers to others; of weights in other shapes.
    except (ValueError, KeyError, OSError, SafetensorError, RuntimeError) as error:
        raise BackboneError(
            f"{folder}: transformers cannot load it ({_first_line(error)})"
        ) from None
    moved: PreTrainedModel = model.to(device)
    return moved


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
