"""Llama with memory, and what vLLM serves with its Llama class (SmolLM2 and others)."""

from torch import Tensor
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM

from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.models.base import MemoryModel


class DeltaMemLlamaAttention(LlamaAttention):
    """Corrections join q (and k, v) before RoPE."""

    memory: MemoryLayer

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        reads = self.memory.read(hidden_states, qkv)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return self.memory.correct_output(output, reads)


class DeltaMemLlamaForCausalLM(MemoryModel, LlamaForCausalLM):
    memory_attention = DeltaMemLlamaAttention
