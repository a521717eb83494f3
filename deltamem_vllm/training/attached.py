"""A delta memory attached to a Hugging Face decoder by hooks, for training and evaluation.

Any decoder whose attention modules are `model.layers[i].self_attn` with separate `q_proj`,
`k_proj`, `v_proj` and `o_proj` works (Qwen3, Qwen2, Llama, SmolLM3, Mistral). The backbone's code
and parameters stay untouched. Gradient checkpointing is not supported: recomputing a layer would
write its state twice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltamem_vllm.adapter import Adapter, LayerWeights, tensor_name
from deltamem_vllm.config import DELTA_HEADS, DeltaHead, DeltaMemConfig
from deltamem_vllm.errors import BackboneError, ConfigError
from deltamem_vllm.training.scan import ScanInputs, delta_rule_scan

NORM_EPS = 1e-6


class SpanPlan(NamedTuple):
    """How the tokens of a batch are written by spans; both tensors are [B, T] of long."""

    segments: Tensor  # the segment of each token, from 0: it reads the state before that segment
    spans: Tensor  # which of its segment's spans, from 0, the token is a part of; -1: of none

    def counts(self) -> tuple[int, int]:
        """Segments, and the most spans of one."""
        return int(self.segments.max()) + 1, max(1, int(self.spans.max()) + 1)


class LayerMemory(nn.Module):
    """One layer's trainable tensors (names and shapes of the adapter file) and its reads.

    All arithmetic is fp32 whatever the backbone's dtype.
    """

    def __init__(self, config: DeltaMemConfig, attention: nn.Module) -> None:
        super().__init__()
        self.config = config
        weights = {head: _projection(attention, head).weight for head in DELTA_HEADS}
        hidden = weights["q"].shape[1]
        read_dim, gate_dim = config.read_dim, config.gate_dim
        self.memory_q_proj = nn.Parameter(torch.empty(read_dim, hidden))
        self.memory_k_proj = nn.Parameter(torch.empty(read_dim, hidden))
        self.memory_v_proj = nn.Parameter(torch.empty(read_dim, hidden))
        self.beta_proj = nn.Parameter(torch.zeros(gate_dim, hidden))
        self.beta_bias = nn.Parameter(torch.full((gate_dim,), config.beta_bias_init))
        if not config.couple_lambda:
            self.lambda_proj = nn.Parameter(torch.zeros(gate_dim, hidden))
            self.lambda_bias = nn.Parameter(torch.full((gate_dim,), -config.beta_bias_init))
        for head, weight in weights.items():
            delta = nn.Parameter(torch.zeros(weight.shape[0], read_dim))
            delta.requires_grad_(head in config.delta_heads)
            self.register_parameter(f"delta_{head}_proj", delta)
        if config.trainable_delta_scale:
            share = config.delta_scale_init / config.delta_scale_max
            size = len(DELTA_HEADS) if config.delta_scale_granularity == "head" else 1
            raw = torch.full((size,), math.log(share / (1.0 - share)))
            self.delta_scale_raw = nn.Parameter(raw)
        if config.delta_o_rmsnorm:
            self.delta_o_rmsnorm_weight = nn.Parameter(torch.ones(weights["o"].shape[0]))
        for parameter in (self.memory_q_proj, self.memory_k_proj, self.memory_v_proj):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        for head in config.delta_heads:
            _init_delta(config, self.delta(head), weights[head])

    def delta(self, head: DeltaHead) -> nn.Parameter:
        """The output projection of one delta head, [projection's output size, H*r]."""
        return cast(nn.Parameter, getattr(self, f"delta_{head}_proj"))

    def correction(self, head: DeltaHead, reads: Tensor) -> Tensor:
        """s * D read for reads [B, T, H*r]: what is added to the output of one projection."""
        out = functional.linear(reads, self.delta(head)) * self.config.scaling
        if self.config.trainable_delta_scale:
            per_head = self.config.delta_scale_granularity == "head"
            raw = self.delta_scale_raw[DELTA_HEADS.index(head) if per_head else 0]
            out = out * torch.sigmoid(raw) * self.config.delta_scale_max
        if head == "o" and self.config.delta_o_rmsnorm:
            weight, eps = self.delta_o_rmsnorm_weight, self.config.delta_o_rmsnorm_eps
            out = functional.rms_norm(out, (out.shape[-1],), weight, eps)
        return out

    def read(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Reads [B, T, H*r] of all tokens from one unchanging state [B, H, r, r]."""
        query = self._unit(functional.linear(hidden, self.memory_q_proj))
        return torch.einsum("bhij,bthj->bthi", state, query).flatten(-2)

    def read_and_write(
        self, hidden: Tensor, state: Tensor, writes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Token by token: read, then write.

        Args:
            hidden: [B, T, hidden] fp32, the layer's attention input.
            state: [B, H, r, r] fp32.
            writes: [B, T] bool, False for tokens that must not write (padding), or None.

        Returns:
            Reads [B, T, H*r] and the state after the last token.
        """
        config = self.config
        beta = self._gate(hidden, self.beta_proj, self.beta_bias)
        if config.couple_lambda:
            keep = 1.0 - beta
        else:
            keep = self._gate(hidden, self.lambda_proj, self.lambda_bias)
        erase = keep * beta if config.state_update_mode == "lambda_outside" else beta
        if config.state_update_mode == "no_lambda":
            keep = torch.ones_like(keep)
        write = beta
        if writes is not None:
            writing = writes[:, :, None, None]
            keep = torch.where(writing, keep, 1.0)
            erase, write = erase * writing, write * writing
        scanned = delta_rule_scan(
            ScanInputs(
                query=self._unit(functional.linear(hidden, self.memory_q_proj)),
                key=self._unit(functional.linear(hidden, self.memory_k_proj)),
                value=self._by_head(functional.linear(hidden, self.memory_v_proj)),
                keep=keep,
                erase=erase,
                write=write,
            ),
            state,
        )
        return scanned.reads.flatten(-2), scanned.state

    def read_and_write_spans(
        self, hidden: Tensor, state: Tensor, plan: SpanPlan
    ) -> tuple[Tensor, Tensor]:
        """Span by span: a segment's tokens read what was there before it, then its spans write.

        Each span writes once, with the mean of its tokens' hidden states.

        Args:
            hidden: [B, T, hidden] fp32, the layer's attention input.
            state: [B, H, r, r] fp32.
            plan: which tokens are written together, and after which of them the others read.

        Returns:
            Reads [B, T, H*r] and the state after the last segment.
        """
        segments, width = plan.counts()
        nowhere = segments * width
        place = torch.where(plan.spans >= 0, plan.segments * width + plan.spans, nowhere)
        sums = hidden.new_zeros(len(hidden), nowhere + 1, hidden.shape[-1])
        sums = sums.scatter_add(1, place.unsqueeze(-1).expand_as(hidden), hidden)[:, :-1]
        sizes = hidden.new_zeros(len(hidden), nowhere + 1)
        sizes = sizes.scatter_add(1, place, torch.ones_like(hidden[..., 0]))[:, :-1]
        means, written = sums / sizes.clamp_min(1.0).unsqueeze(-1), sizes > 0
        before = []
        for first in range(0, nowhere, width):
            before.append(state)
            part = slice(first, first + width)
            _, state = self.read_and_write(means[:, part], state, written[:, part])
        query = self._unit(functional.linear(hidden, self.memory_q_proj))
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(-1)
        seen = torch.stack(before, dim=1)[rows, plan.segments]  # [B, T, H, r, r]
        return torch.einsum("bthij,bthj->bthi", seen, query).flatten(-2), state

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.config.num_state_heads, -1)

    def _unit(self, projected: Tensor) -> Tensor:
        """Query or key by state head, of length 1 unless `normalize_qk` is off."""
        by_head = self._by_head(projected)
        if not self.config.normalize_qk:
            return by_head
        return functional.normalize(torch.tanh(by_head), dim=-1, eps=NORM_EPS)

    def _gate(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A gate in (0, 1) as [B, T, H, r]; without rankwise gates a head's rows share one."""
        gate = self._by_head(torch.sigmoid(functional.linear(hidden, weight, bias)))
        return gate.expand(*gate.shape[:-1], self.config.rank)


class AttachedMemory(nn.Module):
    """All layers' memories of one backbone, and the state they read and write.

    After construction every forward pass of the backbone reads the memory, and writes it while
    `write_enabled`. Parameters of this module are the adapter's; the backbone's are not among them.

    Attributes:
        write_enabled: False asks the memory without changing it.
        read_enabled: False makes the backbone behave as if nothing were attached.
        token_mask: [B, T] bool for the next forward passes, False for padding; None means that
            every token writes.
        spans: how the tokens of the next forward passes are written together (SSW), or None: each
            token writes by itself, as the engine does with what has no spans.
    """

    def __init__(self, model: PreTrainedModel, config: DeltaMemConfig) -> None:
        super().__init__()
        self.config = config
        self.write_enabled = True
        self.read_enabled = True
        self.token_mask: Tensor | None = None
        self.spans: SpanPlan | None = None
        self._states: dict[int, Tensor] = {}
        self._reads: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.layers = nn.ModuleDict()
        for index, attention in enumerate(_attention_modules(model)):
            if config.targets_layer(index):
                self.layers[str(index)] = LayerMemory(config, attention)
                self._hook(index, attention)
        device = next(model.parameters()).device
        self.to(device)

    @property
    def writes_spans(self) -> bool:
        """Whether the adapter writes by messages or sentences (SSW)."""
        return self.config.memory_write_granularity != "token"

    @property
    def states(self) -> dict[int, Tensor]:
        """State [B, H, r, r] by layer; empty before the first write."""
        return dict(self._states)

    def load_states(self, states: Mapping[int, Tensor]) -> None:
        """Continues from these states (the tensors are not copied, gradients flow through)."""
        self._states = dict(states)

    def reset(self) -> None:
        """Forgets everything: the next forward pass starts from an empty memory."""
        self._states = {}
        self.token_mask = None
        self.spans = None

    def detach(self) -> None:
        """Removes the hooks; the backbone is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def layer(self, index: int) -> LayerMemory:
        """The memory of decoder layer `index`."""
        return cast(LayerMemory, self.layers[str(index)])

    def adapter(self) -> Adapter:
        """The trained tensors as a validated adapter, ready for `save_adapter`."""
        tensors = {
            tensor_name(int(index), name): parameter.detach().float().cpu().clone()
            for index, layer in self.layers.items()
            for name, parameter in layer.named_parameters()
        }
        return Adapter.from_tensors(self.config, tensors)

    def load_adapter(self, adapter: Adapter) -> None:
        """Takes over the tensors of an adapter with the same config.

        Raises:
            ConfigError: the adapter's config differs.
        """
        if adapter.config != self.config:
            raise ConfigError("the adapter's config is not the attached memory's; attach with it")
        with torch.no_grad():
            for index in adapter.layer_indices:
                weights = adapter.layer(index)
                for name in LayerWeights.__dataclass_fields__:
                    tensor = getattr(weights, name)
                    if tensor is not None:
                        getattr(self.layer(index), name).copy_(tensor)

    def _hook(self, index: int, attention: nn.Module) -> None:
        def before(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if self.read_enabled:
                self._advance(index, hidden.float())

        def after(_: nn.Module, __: Sequence[Any], ___: Any) -> None:
            self._reads.pop(index, None)

        def corrector(head: DeltaHead) -> Any:
            def correct(_: nn.Module, __: Sequence[Any], output: Tensor) -> Tensor:
                reads = self._reads.get(index)
                if reads is None:
                    return output
                return output + self.layer(index).correction(head, reads).to(output.dtype)

            return correct

        self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(attention.register_forward_hook(after))
        for head in self.config.delta_heads:
            projection = _projection(attention, head)
            self._handles.append(projection.register_forward_hook(corrector(head)))

    def _advance(self, index: int, hidden: Tensor) -> None:
        layer, batch = self.layer(index), hidden.shape[0]
        state = self._states.get(index)
        if state is None:
            state = hidden.new_zeros(batch, *self.config.state_shape)
        if self.write_enabled and self.spans is not None:
            reads, self._states[index] = layer.read_and_write_spans(hidden, state, self.spans)
        elif self.write_enabled:
            reads, self._states[index] = layer.read_and_write(hidden, state, self.token_mask)
        else:
            reads = layer.read(hidden, state)
        self._reads[index] = reads


def attach(model: PreTrainedModel, adapter: Adapter) -> AttachedMemory:
    """Attaches a trained adapter to a backbone that it was made for."""
    memory = AttachedMemory(model, adapter.config)
    memory.load_adapter(adapter)
    return memory


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise BackboneError(
            f"{type(model).__name__} has no model.layers[i].self_attn; give a decoder of the "
            "Qwen3, Qwen2, Llama, SmolLM3 or Mistral layout"
        )
    return [cast(nn.Module, layer.self_attn) for layer in layers]


def _projection(attention: nn.Module, head: DeltaHead) -> nn.Linear:
    projection = getattr(attention, f"{head}_proj", None)
    if not isinstance(projection, nn.Linear):
        raise BackboneError(
            f"{type(attention).__name__} has no linear {head}_proj; fused or missing projections "
            "cannot take a memory here"
        )
    return projection


def _init_delta(config: DeltaMemConfig, delta: nn.Parameter, base: Tensor) -> None:
    """`output_init` of the config: zero, random, or the first columns of the base's weight."""
    if config.output_init == "zero":
        return
    with torch.no_grad():
        if config.output_init == "random":
            nn.init.kaiming_uniform_(delta, a=math.sqrt(5))
            delta.mul_(config.online_gain)
            return
        width = min(config.rank, base.shape[1])
        if config.output_init == "base_slice_fixed":
            width = min(width, config.base_slice_ref_width)
        columns = functional.normalize(base[:, :width].float(), dim=0, eps=NORM_EPS)
        delta[:, :width] = columns * config.online_gain
