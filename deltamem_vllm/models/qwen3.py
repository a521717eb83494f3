"""Qwen3 with memory."""

from torch import Tensor
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.models.base import MemoryModel


class DeltaMemQwen3Attention(Qwen3Attention):
    """Corrections join q (and k, v) before the per-head norms and RoPE."""

    memory: MemoryLayer

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        reads = self.memory.read(hidden_states, qkv)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return self.memory.correct_output(output, reads)


class DeltaMemQwen3ForCausalLM(MemoryModel, Qwen3ForCausalLM):
    memory_attention = DeltaMemQwen3Attention
