"""Mistral with memory."""

from torch import Tensor
from vllm.model_executor.models.mistral import MistralAttention, MistralForCausalLM

from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.models.base import MemoryModel


class DeltaMemMistralAttention(MistralAttention):
    """Corrections join q (and k, v) before RoPE and before the scaling some variants have."""

    memory: MemoryLayer

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        reads = self.memory.read(hidden_states, qkv)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        if self.do_llama_4_scaling:
            q = (q * self._get_llama_4_attn_scale(positions)).to(q.dtype)
        output, _ = self.o_proj(self.attn(q, k, v))
        return self.memory.correct_output(output, reads)


class DeltaMemMistralForCausalLM(MemoryModel, MistralForCausalLM):
    memory_attention = DeltaMemMistralAttention
