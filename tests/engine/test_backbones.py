"""Every backbone we name agrees with its transformers model under the sequential oracle."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.adapter import Adapter, BackboneShape, layer_tensor_shapes, save_adapter
from deltamem_vllm.adapter.weights import tensor_name
from deltamem_vllm.config import DeltaMemConfig
from tests.helpers import VOCAB, full_logprobs
from tests.oracle import Oracle

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}

BACKBONES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=48)
    ),
    # The second layer knows no positions.
    "smollm3": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**SIZES, no_rope_layer_interval=2, pad_token_id=0)
    ),
}


def make(folder: Path, name: str) -> tuple[Path, Path]:
    """A random backbone and a random adapter whose effect is large."""
    torch.manual_seed(0)
    model = BACKBONES[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model")
    shape = BackboneShape.from_dir(folder / "model")
    config = DeltaMemConfig(rank=4, num_state_heads=2, delta_heads=("q", "k", "o"))
    shapes = layer_tensor_shapes(
        config, hidden_size=shape.hidden_size, q_size=shape.q_size, kv_size=shape.kv_size
    )
    tensors = {
        tensor_name(layer, parameter): torch.randn(size) * 0.4
        for layer in range(shape.num_layers)
        for parameter, size in shapes.items()
    }
    save_adapter(Adapter.from_tensors(config, tensors, backbone=shape), folder / "adapter")
    return folder / "model", folder / "adapter"


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_agrees_with_the_oracle(name: str, tmp_path: Path) -> None:
    model, adapter = make(tmp_path, name)
    llm = MemoryLLM(
        str(model),
        adapter=str(adapter),
        dtype="float32",
        max_model_len=256,
        max_logprobs=VOCAB,
        max_num_batched_tokens=64,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=6, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in (1, 70, 200)
    ]
    oracle = Oracle(model, adapter)
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
            sampling,
            memory=[Memory(session=str(index)) for index in range(len(prompts))],
            use_tqdm=False,
        )
        for index, (tokens, output) in enumerate(zip(prompts, outputs, strict=True)):
            sampled = list(output.outputs[0].token_ids)
            answer = oracle([*tokens, *sampled[:-1]])
            actual = full_logprobs(output.outputs[0].logprobs)
            torch.testing.assert_close(
                actual, answer.logprobs[len(tokens) - 1 :], rtol=0, atol=1e-4
            )
            snapshot = llm.sessions[str(index)]
            del llm.sessions[str(index)]
            for layer, state in answer.state.items():
                tolerance = 1e-5 * max(1.0, state.abs().max().item())
                torch.testing.assert_close(snapshot.state[layer], state, rtol=0, atol=tolerance)
    assert outputs[-1].num_cached_tokens > 0
