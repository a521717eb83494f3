"""SmolLM3 with memory: Llama, but for the layers whose attention knows no positions (NoPE)."""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM

from deltamem_vllm.engine.compat import VllmConfig
from deltamem_vllm.models.base import MemoryModel
from deltamem_vllm.models.llama import DeltaMemLlamaAttention


class NoRotation(nn.Module):
    """In the place of RoPE."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class DeltaMemSmolLM3ForCausalLM(MemoryModel, LlamaForCausalLM):
    """vLLM itself serves SmolLM3 by its Transformers backend, which has no place for a memory."""

    memory_attention = DeltaMemLlamaAttention

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        layers: Any = self.get_submodule("model.layers")
        rotates = vllm_config.model_config.hf_text_config.no_rope_layers
        for index, layer in enumerate(layers):
            # A layer of another pipeline rank has no attention.
            if not rotates[index] and hasattr(layer, "self_attn"):
                layer.self_attn.rotary_emb = NoRotation()
