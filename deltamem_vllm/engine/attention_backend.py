"""The memory layers' place in vLLM's attention machinery: a backend without an attention kernel.

vLLM asks each layer that owns a part of the KV cache for a backend, and the backend for a builder
of per-step metadata. Ours hands the block table, the query boundaries and the sequence lengths
through; the op in `memory_layer.py` does the rest.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from deltamem_vllm.engine.compat import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    VllmConfig,
)
from deltamem_vllm.ops import Batch, BoundBatch, bind_batch, runs_in_graphs


@dataclass
class MemoryMetadata(AttentionMetadata):
    """What one step needs to find every request's state pages."""

    bound: BoundBatch


class MemoryMetadataBuilder(AttentionMetadataBuilder[MemoryMetadata]):
    """Packs vLLM's common metadata for the memory op; allocates nothing on the device.

    CUDA graphs replay the op on the tensors of their capture. Those of the common metadata are fit
    for that: both of vLLM's model runners keep block table, query boundaries and sequence lengths
    in buffers for good, and mark padded rows with a length of 0, which the op skips.
    """

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """Batches whose requests all have one token, or one and their drafts.

        Not any batch: how many launches the op takes depends on the longest query.
        """
        device = torch.device(vllm_config.device_config.device_type)
        if runs_in_graphs(device):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> MemoryMetadata:
        return MemoryMetadata(
            bind_batch(
                Batch(
                    block_table=common_attn_metadata.block_table_tensor,
                    query_start_loc=common_attn_metadata.query_start_loc,
                    seq_lens=common_attn_metadata.seq_lens,
                    max_query_len=common_attn_metadata.max_query_len,
                )
            )
        )


class MemoryBackend(AttentionBackend):
    """Names the builder; memory layers have no attention implementation of their own."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "DELTAMEM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("memory layers are read through their own op, not by attention")

    @staticmethod
    def get_builder_cls() -> type[MemoryMetadataBuilder]:
        return MemoryMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # A state page stands for a whole block of the KV cache manager: never split it.
        return [MultipleOf(1) if kv_cache_spec is None else int(kv_cache_spec.block_size)]
