"""The memory of one attention layer inside vLLM.

`MemoryLayer` owns the adapter's weights for its layer and a state page per block of the layer's KV
cache. `read` turns the attention's input into reads, for all requests of the step in ONE op, and
corrects the fresh projections with them; `correct_output` corrects the attention's output. Memory
arithmetic is fp32 whatever the model's dtype is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import CompilationMode
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
from deltamem_vllm.ops import (
    BoundCorrection,
    BoundStep,
    ReadingStep,
    StatePages,
    bind_correction,
    bind_step,
    warm_up,
)

logger = init_logger(f"vllm.{__name__}")

QKV_HEADS: Final[tuple[DeltaHead, ...]] = ("q", "k", "v")
"""As the attention's joint projection has them."""

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
        self.correct_o: Callable[[Tensor, Tensor], Tensor] = partial(self._correct, "o")
        self._step_corrects = False
        self._dtype = vllm_config.model_config.dtype
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
        self._qkv_sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        sizes = {"q": attention.q_size, "k": attention.kv_size, "v": attention.kv_size, "o": hidden}
        self.projection = parameter(self.rule.projection_dim, hidden)
        self._on_cpu = self.projection.device.type == "cpu"
        self._is_traced = vllm_config.compilation_config.mode != CompilationMode.NONE
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

    def read(self, hidden_states: Tensor, qkv: Tensor) -> Tensor:
        """Write this step's tokens into their memories, read them, and correct the projections.

        Args:
            hidden_states: [T, hidden] attention input (after the input layer norm).
            qkv: [T, q_size + 2 * kv_size] what the attention's projections make of it, before any
                q/k norm and RoPE; s * D read is added in place.

        Returns:
            [T, H * r] fp32 reads; each token's read is taken before its own write.
        """
        reads = torch.empty(
            (hidden_states.shape[0], self.rule.read_dim),
            dtype=torch.float32,
            device=hidden_states.device,
        )
        if not self._on_cpu:
            # Outside of the op, so that a compiler joins it to what is around it.
            projections = nn.functional.linear(hidden_states.float(), self.projection)
            torch.ops.deltamem.memory_step(projections, reads, self.layer_name)
            self._correct_qkv(qkv, reads)
        elif self._is_traced:
            torch.ops.deltamem.read_and_correct(hidden_states, qkv, reads, self.layer_name)
        else:
            # As vLLM's attention does there: the way through the dispatcher is longer than the op.
            metadata = get_forward_context().attn_metadata
            self.read_and_correct(hidden_states, qkv, reads, metadata)
        return reads

    def correct_output(self, output: Tensor, reads: Tensor) -> Tensor:
        """Add s * Do read, normalised if the adapter says so, to o_proj's output [T, hidden], in
        place.

        Must follow the all-reduce of a row-parallel o_proj: every rank adds the whole correction.
        """
        if self.delta_o is None:
            return output
        if not self._on_cpu:
            self._correct("o", output, reads)
        elif self._is_traced:
            torch.ops.deltamem.correct_output(output, reads, self.layer_name)
        else:
            self.correct_o(output, reads)
        return output

    def read_and_correct(
        self, hidden_states: Tensor, qkv: Tensor, reads: Tensor, metadata: Any
    ) -> None:
        """What `read` does on CPUs, in one call of compiled code. `metadata` is the step's."""
        if metadata is None:
            # A profiling run before the KV cache exists: shapes matter, values do not.
            reads.zero_()
            return
        assert self.step is not None
        self.step(hidden_states, metadata[self.layer_name].bound, reads, qkv)
        if not self._step_corrects:
            self._correct_qkv(qkv, reads)

    def _correct_qkv(self, qkv: Tensor, reads: Tensor) -> None:
        parts = qkv.split(self._qkv_sizes, dim=-1)
        for head, base in zip(QKV_HEADS, parts, strict=True):
            self._correct(head, base, reads)

    def _correct(self, head: DeltaHead, base: Tensor, reads: Tensor) -> Tensor:
        """Add to base [T, n], in place, the correction that reads [T, H * r] make, if any."""
        delta: Tensor | None = getattr(self, f"delta_{head}")
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
        correction = None
        if self._on_cpu:
            correction = self._bind_corrections()
            self._step_corrects = correction is not None
        self.step = bind_step(
            self.rule,
            self.gate_bias,
            self.pages,
            block_size=self.block_size,
            pages_are_initialised=self.pages_are_initialised,
            projection=self.projection if self._on_cpu else None,
            correction=correction,
        )
        if self._step_corrects and not self._is_traced and isinstance(self.step, ReadingStep):
            # Calls of Python cost more than the rule: the shortest way replaces the general one.
            self.read = self._shortest_read(self.step)  # type: ignore[method-assign,assignment]
            self.correct_output = self.correct_o  # type: ignore[method-assign,assignment]

    def _shortest_read(self, step: ReadingStep) -> Callable[[Tensor, Tensor], Tensor]:
        name, read, read_dim = self.layer_name, step.read, self.rule.read_dim

        def shortest(hidden_states: Tensor, qkv: Tensor) -> Tensor:
            metadata: Any = get_forward_context().attn_metadata
            if metadata is None:
                return torch.zeros(hidden_states.shape[0], read_dim)
            return read(hidden_states, metadata[name].bound, qkv)

        return shortest

    def _bind_corrections(self) -> BoundCorrection | None:
        """Bind those that are nothing but a product; return that of q, k and v together."""
        probed = self.probe.head if self.probe is not None else None
        if self.delta_o is not None and self.output_norm is None:
            measured = probed == "o"
            bound = bind_correction(self.delta_o, self._dtype, measured=measured)
            if bound is not None:
                self.correct_o = partial(self._measure, bound) if measured else bound
        heads = [head for head in QKV_HEADS if head in self.config.delta_heads]
        if not heads or probed in QKV_HEADS:
            return None
        # What lies between q and v is corrected by 0.
        indices = range(QKV_HEADS.index(heads[0]), QKV_HEADS.index(heads[-1]) + 1)
        rows = [
            self.gate_bias.new_zeros(self._qkv_sizes[index], self.rule.read_dim)
            if (delta := getattr(self, f"delta_{QKV_HEADS[index]}")) is None
            else delta
            for index in indices
        ]
        first = sum(self._qkv_sizes[: indices.start])
        return bind_correction(torch.cat(rows), self._dtype, first=first)

    def _measure(self, correction: BoundCorrection, base: Tensor, reads: Tensor) -> Tensor:
        assert self.probe is not None
        correction.add_norms(base, reads, self.probe.sums)
        return correction(base, reads)

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


def _read_and_correct(hidden_states: Tensor, qkv: Tensor, reads: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    layer: MemoryLayer = context.no_compile_layers[layer_name]
    layer.read_and_correct(hidden_states, qkv, reads, context.attn_metadata)


def _correct_output(output: Tensor, reads: Tensor, layer_name: str) -> None:
    layer: MemoryLayer = get_forward_context().no_compile_layers[layer_name]
    layer.correct_o(output, reads)


def _nothing(*_: Any) -> None:
    """What the ops return where only shapes matter."""


_library = Library("deltamem", "FRAGMENT")
for _name, _function, _changed in (
    # vLLM's breakable CUDA graphs know no splitting ops: they stop where an op says so.
    ("memory_step", eager_break_during_capture(_memory_step), ["reads"]),
    ("read_and_correct", _read_and_correct, ["qkv", "reads"]),
    ("correct_output", _correct_output, ["output"]),
):
    direct_register_custom_op(
        op_name=_name,
        op_func=_function,
        mutates_args=_changed,
        fake_impl=_nothing,
        target_lib=_library,
    )
