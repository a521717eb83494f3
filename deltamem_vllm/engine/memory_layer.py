"""The memory of one attention layer inside vLLM.

`MemoryLayer` owns the adapter's weights for its layer and a state page per block of the layer's KV
cache. `forward` turns the attention's input into reads, for all requests of the step in ONE op;
`correct_qkv` and `correct_output` add what the reads say. Memory arithmetic is fp32 whatever the
model's dtype is.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.logger import init_logger

from deltamem_vllm.adapter import Adapter, LayerWeights
from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.config import DELTA_HEADS, DeltaHead
from deltamem_vllm.engine.attention_backend import MemoryBackend, MemoryMetadata
from deltamem_vllm.engine.compat import (
    AttentionBackend,
    AttentionLayerBase,
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    VllmConfig,
    direct_register_custom_op,
    eager_break_during_capture,
    extract_layer_index,
    get_dtype_size,
    get_forward_context,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    kv_connector_of,
)
from deltamem_vllm.engine.names import CONNECTOR_NAME
from deltamem_vllm.engine.probe import CorrectionProbe, probed_head, probed_layer
from deltamem_vllm.engine.settings import delta_rule, memory_settings, page_layout
from deltamem_vllm.errors import EngineConfigError
from deltamem_vllm.ops import BoundStep, StatePages, bind_step, warm_up

logger = init_logger(f"vllm.{__name__}")

WARN_KV_SHARE = 0.10
"""Above this share of the KV cache the start-up log warns and proposes a block size."""


class MemoryLayer(nn.Module, AttentionLayerBase):
    """The delta-mem memory beside one attention module.

    Notation: H state heads, r rank, P = `rule.projection_dim`; q and kv sizes are this tensor
    parallel rank's. The state is replicated over tensor parallel ranks: each computes the same
    reads from the same full input, so no communication is added.

    Args:
        attention: vLLM's attention module of the layer (Qwen3Attention, LlamaAttention, ...).
        adapter: the adapter; gives shapes here, and values in `load`.
        vllm_config: the engine's configuration.
        prefix: the module's name, e.g. `model.layers.0.self_attn`.
    """

    def __init__(
        self, attention: Any, adapter: Adapter, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        config = adapter.config
        self.layer_name = f"{prefix}.memory"
        self.layer_index = extract_layer_index(prefix)
        self.config = config
        self.rule = delta_rule(adapter)
        self._layout = partial(page_layout, adapter, vllm_config)
        self.max_kv_share = memory_settings(vllm_config.model_config.hf_config).max_kv_share
        self.pages_are_initialised = kv_connector_of(vllm_config) == CONNECTOR_NAME
        self.pages: StatePages | None = None
        self.step: BoundStep | None = None
        self.loaded = False
        self._made_up = vllm_config.load_config.load_format == "dummy"
        # Known when vLLM has chosen the block size.
        self.block_size = 0
        self.layout = self._layout(1)
        # In a tuple: the module must not become a child of this one.
        self._siblings = (attention.attn,)
        self._kv_head_slice = kv_head_slice(attention)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)

        hidden = attention.hidden_size
        sizes = {"q": attention.q_size, "k": attention.kv_size, "v": attention.kv_size, "o": hidden}
        self.projection = parameter(self.rule.projection_dim, hidden)
        self.gate_bias = parameter(self.rule.gate_bias_dim)
        self.delta_q, self.delta_k, self.delta_v, self.delta_o = (
            parameter(sizes[head], self.rule.read_dim) if head in config.delta_heads else None
            for head in DELTA_HEADS
        )
        normed = config.delta_o_rmsnorm and "o" in config.delta_heads
        self.output_norm = parameter(hidden) if normed else None
        head = probed_head(config)
        has_probe = self.layer_index == probed_layer(adapter)
        self.probe = CorrectionProbe(head) if has_probe and head is not None else None

        context = vllm_config.compilation_config.static_forward_context
        if self.layer_name in context:
            raise ValueError(f"two memory layers are called {self.layer_name}")
        context[self.layer_name] = self
        warm_up(self.projection.device)

    # Weights

    def load(self, adapter: Adapter) -> None:
        """Copy this layer's weights out of `adapter`, cut for this tensor parallel rank.

        The scale s = alpha / r, times the trained multiplier where there is one, is folded into
        the correction weights.
        """
        weights = adapter.layer(self.layer_index)
        rows = [weights.memory_q_proj, weights.memory_k_proj, weights.memory_v_proj]
        rows += present(weights.beta_proj, weights.lambda_proj)
        self.projection.data.copy_(torch.cat([row.float() for row in rows]))
        biases = present(weights.beta_bias, weights.lambda_bias)
        self.gate_bias.data.copy_(torch.cat([bias.float() for bias in biases]))
        for head in self.config.delta_heads:
            parameter = getattr(self, f"delta_{head}")
            (weight,) = present(weights.delta(head))
            weight = weight.float() * self._scale(head, weights)
            parameter.data.copy_(self._local_rows(head, weight, parameter.shape[0]))
        if self.output_norm is not None:
            (norm,) = present(weights.delta_o_rmsnorm_weight)
            self.output_norm.data.copy_(norm.float())
        self.loaded = True

    def _scale(self, head: DeltaHead, weights: LayerWeights) -> float:
        scale = self.config.scaling
        if weights.delta_scale_raw is not None:
            per_head = self.config.delta_scale_granularity == "head"
            raw = weights.delta_scale_raw.float()[DELTA_HEADS.index(head) if per_head else 0]
            scale *= float(torch.sigmoid(raw)) * self.config.delta_scale_max
        return scale

    def _local_rows(self, head: str, weight: Tensor, size: int) -> Tensor:
        if head == "o":
            return weight
        index = get_tensor_model_parallel_rank() if head == "q" else self._kv_head_slice
        return weight[index * size : (index + 1) * size]

    # Forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Write this step's tokens into their memories and read them.

        Args:
            hidden_states: [T, hidden] attention input (after the input layer norm).

        Returns:
            [T, H * r] fp32 reads; each token's read is taken before its own write.
        """
        projections = nn.functional.linear(hidden_states.float(), self.projection)
        reads = torch.empty(
            (projections.shape[0], self.rule.read_dim),
            dtype=torch.float32,
            device=projections.device,
        )
        if projections.device.type == "cpu" and not torch.compiler.is_compiling():
            # As vLLM's attention does there: the way through the dispatcher is longer than the op.
            _memory_step(projections, reads, self.layer_name)
        else:
            torch.ops.deltamem.memory_step(projections, reads, self.layer_name)
        return reads

    def correct_qkv(
        self, q: Tensor, k: Tensor, v: Tensor, reads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add s * D read to the fresh projections, in place, before any q/k norm and before RoPE.

        Args:
            q, k, v: [T, q_size], [T, kv_size], [T, kv_size].
            reads: [T, H * r] fp32.
        """
        return (
            self._corrected("q", q, self.delta_q, reads),
            self._corrected("k", k, self.delta_k, reads),
            self._corrected("v", v, self.delta_v, reads),
        )

    def correct_output(self, output: Tensor, reads: Tensor) -> Tensor:
        """Add s * Do read, normalised if the adapter says so, to o_proj's output [T, hidden], in
        place.

        Must follow the all-reduce of a row-parallel o_proj: every rank adds the whole correction.
        """
        return self._corrected("o", output, self.delta_o, reads)

    def _corrected(
        self, head: DeltaHead, base: Tensor, delta: Tensor | None, reads: Tensor
    ) -> Tensor:
        """base [T, n], in place, + the correction that reads [T, H * r] make."""
        if delta is None:
            return base
        norm = self.output_norm if head == "o" else None
        is_probed = self.probe is not None and self.probe.head == head
        if norm is None and not is_probed and base.dtype == reads.dtype:
            return base.addmm_(reads, delta.t())
        correction = nn.functional.linear(reads, delta)
        if norm is not None:
            size, eps = (correction.shape[-1],), self.config.delta_o_rmsnorm_eps
            correction = nn.functional.rms_norm(correction, size, norm, eps)
        if is_probed:
            assert self.probe is not None
            self.probe(base, correction, reads)
        return base.add_(correction.to(base.dtype))

    # KV cache

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MemoryBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec | None:
        """The spec of the layer's own K/V with one state page in the place of a block's tokens.

        Class, window, block size, dtype and quantisation mode stay those of the attention layer,
        so that vLLM puts both into one group with one block table (see `engine/compat.py`).

        Raises:
            EngineConfigError: the pages would take more of the KV cache than allowed.
        """
        spec = self._siblings[0].get_kv_cache_spec(vllm_config)
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise EngineConfigError(
                f"delta-mem does not support the KV cache of {self.layer_name}: {spec!r}"
            )
        self.block_size = spec.block_size
        self.layout = self._layout(spec.block_size)
        self._check_kv_share(spec.page_size_bytes, spec.block_size)
        return replace(
            spec,
            num_kv_heads=1,
            head_size=self.layout.page_bytes // get_dtype_size(spec.dtype),
            head_size_v=0,
            num_head_slots=None,
            page_size_padded=None,
            state_content_bytes=self.layout.page_bytes,
            tokens_per_state=spec.block_size,
        )

    def _check_kv_share(self, kv_page_bytes: int, block_size: int) -> None:
        page_bytes = self.layout.page_bytes
        share = page_bytes / (page_bytes + kv_page_bytes)
        proposal = block_size
        aim = min(WARN_KV_SHARE, self.max_kv_share)
        while page_bytes / (page_bytes + kv_page_bytes * proposal // block_size) > aim:
            proposal *= 2
        advice = (
            f"--block-size {proposal}, where the attention backend supports it, would bring it "
            f"under {aim:.4g}"
        )
        if share > self.max_kv_share:
            raise EngineConfigError(
                f"state pages would take {share:.1%} of the KV cache, more than max_kv_share="
                f"{self.max_kv_share:.4g} of the {CONFIG_KEY!r} key allows; {advice}."
            )
        message = (
            f"delta-mem: state pages take {share:.2%} of the KV cache "
            f"({page_bytes} of {page_bytes + kv_page_bytes} bytes per block of {block_size} tokens "
            f"and layer, ring {self.layout.ring})"
        )
        if share > WARN_KV_SHARE:
            logger.warning_once("%s; %s", message, advice)
        else:
            logger.info_once("%s", message)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take this layer's part of the KV cache: [num_blocks, 1, 1, page] of the spec's dtype.

        Raises:
            EngineConfigError: the loader left the memory without its adapter.
        """
        if not self.loaded and not self._made_up:
            raise EngineConfigError(
                f"{self.layer_name}: the adapter was not loaded; this --load-format does not call "
                "the model's `load_weights`. Use another one."
            )
        pages = kv_cache.flatten(1).view(torch.uint8)
        self.kv_cache = kv_cache
        self.pages = self.layout.views(pages)
        self.step = bind_step(
            self.rule,
            self.gate_bias,
            self.pages,
            block_size=self.block_size,
            pages_are_initialised=self.pages_are_initialised,
        )

    def state_at(self, block: int, num_tokens: int) -> Tensor:
        """The state [H, r, r] after `num_tokens` tokens, the last of which lies in `block`."""
        assert self.pages is not None
        return self.pages.states[block, num_tokens % self.layout.ring]


def present(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors that an adapter's config switches on."""
    return [tensor for tensor in tensors if tensor is not None]


def kv_head_slice(attention: Any) -> int:
    """Which of the equal slices of the key heads this tensor parallel rank holds.

    With fewer key heads than ranks, neighbouring ranks hold copies of one head.
    """
    ranks: int = get_tensor_model_parallel_world_size()
    rank: int = get_tensor_model_parallel_rank()
    copies = max(1, ranks // int(attention.total_num_kv_heads))
    return rank // copies


def _memory_step(projections: Tensor, reads: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    metadata: Any = context.attn_metadata
    if metadata is None:
        # A profiling run before the KV cache exists: shapes matter, values do not.
        reads.zero_()
        return
    step: MemoryMetadata = metadata[layer_name]
    layer: MemoryLayer = context.no_compile_layers[layer_name]
    assert layer.step is not None
    layer.step(projections, step.bound, reads)


def _memory_step_fake(projections: Tensor, reads: Tensor, layer_name: str) -> None:
    return None


_library = Library("deltamem", "FRAGMENT")
direct_register_custom_op(
    op_name="memory_step",
    # vLLM's breakable CUDA graphs know no splitting ops: they stop where an op says so.
    op_func=eager_break_during_capture(_memory_step),
    mutates_args=["reads"],
    fake_impl=_memory_step_fake,
    target_lib=_library,
)
