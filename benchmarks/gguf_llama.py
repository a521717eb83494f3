"""A GGUF file of a Llama model, written as a Hugging Face checkpoint.

In: one GGUF file with its tokenizer (byte-level BPE), in any of the types that the `gguf` package
can take apart. Out: a folder with `model.safetensors`, `config.json` and tokenizer that
transformers and vLLM load as any other. Quantised weights become what the file says they are; the
model's output is the quantised model's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONTROL_TOKEN = 3
"""The type, in a GGUF, of tokens that are no text."""


def hugging_face_name(name: str) -> str:
    """The checkpoint's name of a GGUF tensor, e.g. of `blk.3.attn_q.weight`.

    Raises:
        ValueError: a Llama model has no such tensor.
    """
    stem, _, suffix = name.rpartition(".")
    block, _, part = stem.rpartition(".")
    if suffix == "weight" and stem == "output":
        return "lm_head.weight"
    if suffix == "weight" and stem in NAMES:
        return f"model.{NAMES[stem]}.weight"
    if suffix == "weight" and block.startswith("blk.") and part in LAYER_NAMES:
        return f"model.layers.{int(block.removeprefix('blk.'))}.{LAYER_NAMES[part]}.weight"
    raise ValueError(f"{name}: not a tensor of a Llama model")


def unpermute(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a query or key projection in the order of Hugging Face.

    Both rotate a head's values in pairs. In a GGUF the two of a pair are neighbours; in Hugging
    Face they are half a head apart.

    Args:
        weight: [heads * head size, input size].
        heads: of queries, or of keys for a key projection.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def convert(file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write the model of a GGUF file as a checkpoint.

    Raises:
        ValueError: the file holds no Llama model, or a tokenizer of another kind.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"{file}: expected a Llama model with a byte-level BPE tokenizer")
    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue  # computed from `rope_theta`
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".")[-2]
            if part in heads:
                weight = unpermute(weight, heads[part])
            value = torch.from_numpy(weight.astype(np.float32)).to(getattr(torch, dtype))
            yield hugging_face_name(tensor.name), value

    folder.mkdir(parents=True, exist_ok=True)
    written = dict(tensors())
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    _save_config(facts, dtype, folder, tied="lm_head.weight" not in written)
    _save_tokenizer(facts, folder)


def _save_config(facts: dict[str, Any], dtype: str, folder: Path, *, tied: bool) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=facts["llama.embedding_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        intermediate_size=facts["llama.feed_forward_length"],
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=round(facts["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    ).save_pretrained(folder)


def _save_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    splits: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if facts["tokenizer.ggml.pre"] == "smollm":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    core.decoder = decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    core.add_special_tokens(special)

    def token(name: str) -> str:
        return tokens[int(facts[f"tokenizer.ggml.{name}_token_id"])]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)
