"""From an adapter's configuration to the arithmetic and the state page that it asks for."""

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.ops import DeltaRule
from deltamem_vllm.state.page import PageLayout, SpanSizes


def rule_of(config: DeltaMemConfig) -> DeltaRule:
    """The arithmetic of an adapter, as the ops understand it."""
    return DeltaRule(
        rank=config.rank,
        num_heads=config.num_state_heads,
        normalize_qk=config.normalize_qk,
        couple_lambda=config.couple_lambda,
        rankwise_gates=config.rankwise_gates,
        update_mode=config.state_update_mode,
    )


def layout_of(config: DeltaMemConfig, block_size: int, ring: int) -> PageLayout:
    """The state page of one layer and block.

    Args:
        config: the adapter's.
        block_size: tokens of a KV cache block.
        ring: states per page, see `ring_length`.
    """
    spans = None
    if config.memory_write_granularity != "token":
        spans = SpanSizes(block_size, rule_of(config).sums_dim)
    return PageLayout(state_shape=config.state_shape, ring=ring, spans=spans)
