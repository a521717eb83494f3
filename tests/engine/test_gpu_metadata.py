"""What a GPU's model runners make of our backend, on CPU tensors: metadata for CUDA graphs, blocks.

vLLM's own functions are called with what they would have on a GPU; no graph is captured here.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache, select_common_block_size

from deltamem_vllm import MemoryLLM
from deltamem_vllm.engine.attention_backend import MemoryBackend, MemoryMetadataBuilder
from deltamem_vllm.engine.compat import AttentionCGSupport
from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.ops import DeltaRule, memory_step
from deltamem_vllm.state.page import PageLayout
from tests.helpers import DATA, running

CASE = DATA / "qwen3_msw4"
BLOCK = 32
MAX_ROWS = 8
COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]


def config_of(device_type: str) -> Any:
    return SimpleNamespace(device_config=SimpleNamespace(device_type=device_type))


def test_graphs_of_decodes_are_declared_where_the_op_can_be_captured() -> None:
    support = MemoryMetadataBuilder.get_cudagraph_support
    assert support(config_of("cuda"), None) is AttentionCGSupport.UNIFORM_BATCH
    assert support(config_of("cpu"), None) is AttentionCGSupport.NEVER


@pytest.mark.parametrize("tokens_per_request", [1, 4], ids=["plain", "drafts"])
def test_vllm_keeps_its_full_graphs_of_decodes(tokens_per_request: int) -> None:
    """A backend that declared nothing would take them from the whole model."""
    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    compilation.cudagraph_capture_sizes = []
    resolved = compilation.resolve_cudagraph_mode_and_sizes(
        MemoryMetadataBuilder.get_cudagraph_support(config_of("cuda"), None),
        MemoryBackend.get_name(),
        tokens_per_request,
        use_v2_model_runner=True,
        is_profiling=True,
    )
    assert resolved is CUDAGraphMode.FULL_AND_PIECEWISE


class Buffers:
    """The tensors that a model runner keeps, and the metadata that it builds of them."""

    def __init__(self) -> None:
        self.query_start_loc = torch.zeros(MAX_ROWS + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_ROWS, dtype=torch.int32)
        self.block_table = torch.zeros(MAX_ROWS, 4, dtype=torch.int32)
        builder = MemoryMetadataBuilder(None, ["memory"], None, torch.device("cpu"))
        group = AttentionGroup(MemoryBackend, ["memory"], SimpleNamespace(), 0)
        group.metadata_builders = [builder]
        self.groups = [[group]]

    def fill(self, contexts: list[int], tables: list[list[int]], each: int) -> None:
        """`each` tokens for a request; all other rows are padding, as vLLM pads them."""
        count = len(contexts)
        self.query_start_loc.fill_(count * each)
        self.query_start_loc[: count + 1] = torch.arange(count + 1) * each
        self.seq_lens.zero_()
        self.seq_lens[:count] = torch.tensor(contexts) + each
        self.block_table.zero_()
        for row, table in enumerate(tables):
            self.block_table[row, : len(table)] = torch.tensor(table)

    def build(self, rows: int, each: int, *, capture: bool = False) -> Any:
        metadata = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=rows,
            num_tokens=rows * each,
            query_start_loc_gpu=self.query_start_loc[: rows + 1],
            query_start_loc_cpu=self.query_start_loc[: rows + 1].clone(),
            max_query_len=each,
            seq_lens=self.seq_lens,
            max_seq_len=64,
            block_tables=[self.block_table[:rows]],
            slot_mappings=torch.zeros(1, rows * each, dtype=torch.int64),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
            for_cudagraph_capture=capture,
        )
        return metadata["memory"]


def addresses(batch: Any) -> list[int]:
    tensors = (batch.block_table, batch.query_start_loc, batch.seq_lens)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("each", [1, 3], ids=["plain", "drafts"])
def test_a_captured_step_replays_on_later_requests_of_the_same_tensors(each: int) -> None:
    """Rows beyond the requests touch no page; the metadata of the capture is that of the replay."""
    rule, layout = DeltaRule(4), PageLayout((1, 4, 4), each + 1)
    buffers = Buffers()
    captured = buffers.build(MAX_ROWS, each, capture=True).bound.batch
    assert captured.max_query_len == each
    for contexts, tables in (([40, 3], [[1, 2], [3]]), ([5, 65, 32], [[4], [5, 6, 7], [8, 9]])):
        buffers.fill(contexts, tables, each)
        built = buffers.build(MAX_ROWS, each).bound.batch
        assert addresses(built) == addresses(captured)
        assert {tensor.dtype for tensor in built[:3]} == {torch.int32}
        raw = torch.randn(12, layout.page_words)
        pages = layout.views(raw)
        pages.header.zero_()
        before = raw.clone()
        projections = torch.randn(MAX_ROWS * each, rule.projection_dim)
        bias = torch.zeros(rule.gate_bias_dim)
        options = {"block_size": BLOCK, "pages_are_initialised": True}
        reads = memory_step(rule, projections, bias, pages, captured, **options)
        own = [table[context // BLOCK] for context, table in zip(contexts, tables, strict=True)]
        touched = (raw != before).any(dim=1).nonzero().flatten().tolist()
        assert touched == sorted(own)
        fed = len(contexts) * each
        assert not reads[fed:].any()
        alone = before.clone()
        exact = buffers.build(len(contexts), each).bound.batch
        expected = memory_step(rule, projections[:fed], bias, layout.views(alone), exact, **options)
        assert torch.equal(reads[:fed], expected)
        assert torch.equal(raw, alone)


@pytest.fixture(scope="module")
def engine() -> Iterator[MemoryLLM]:
    llm = MemoryLLM(
        str(CASE / "model"),
        str(CASE / "adapter"),
        dtype="bfloat16",
        max_model_len=128,
        block_size=BLOCK,
        num_gpu_blocks_override=20,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    with running(llm):
        yield llm


@pytest.mark.parametrize("layout", COMPACT, ids=lambda layout: layout.name)
def test_pages_lie_apart_in_every_layout_of_the_kv_cache(
    engine: MemoryLLM, layout: KVCacheLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention and FlashInfer ask for different ones; vLLM leaves those out that put a
    block's heads apart, because our pages have another size than those of keys and values."""
    worker = engine.llm_engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    layers = runner.compilation_config.static_forward_context
    config = runner.vllm_config
    monkeypatch.setattr(config.cache_config, "kv_cache_layout", layout.name)
    (planned,) = get_kv_cache_configs(config, [runner.get_kv_cache_spec()], [10**7])
    caches = allocate_kv_cache(planned, torch.device("cpu"), layout, [BLOCK])
    memories = {name: layer for name, layer in layers.items() if isinstance(layer, MemoryLayer)}
    others = [cache for name, cache in caches.items() if name not in memories]
    assert memories and others
    raws = []
    for number, (name, layer) in enumerate(memories.items()):
        raw = caches[name].flatten(1).view(torch.uint8)
        states = layer.layout.views(raw).states
        blocks = torch.arange(len(states), dtype=torch.float32)
        states[:] = (1000.0 * number + blocks).view(-1, 1, 1, 1, 1)
        raws.append(states)
    assert not any(cache.any() for cache in others)
    for number, states in enumerate(raws):
        assert (states[:, -1, 0, 0, 0] == 1000.0 * number + torch.arange(len(states))).all()
        assert (states.flatten(1) == states.flatten(1)[:, :1]).all()
    for cache in others:
        cache.fill_(1)
    for number, states in enumerate(raws):
        assert (states[:, 0, 0, 0, 0] == 1000.0 * number + torch.arange(len(states))).all()


def test_a_page_is_never_split_among_kernel_blocks(engine: MemoryLLM) -> None:
    """Beside FlashAttention, which takes any multiple of 16, the manager's block size is kept."""
    worker = engine.llm_engine.model_executor.driver_worker.worker
    groups = worker.model_runner.attn_groups[0]
    specs = [group.kv_cache_spec for group in groups if group.backend is MemoryBackend]
    for size in (BLOCK, 64):
        spec = specs[0].copy_with_new_block_size(size)
        backends = [FlashAttentionBackend, MemoryBackend]
        assert select_common_block_size(size, backends, [None, spec]) == size


def test_a_block_that_the_attention_would_split_is_refused(engine: MemoryLLM) -> None:
    """FlashInfer's largest kernel block is 64 tokens on most GPUs; a page has one address."""

    class UpTo64(FlashAttentionBackend):
        @classmethod
        def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
            return [16, 32, 64]

    worker = engine.llm_engine.model_executor.driver_worker.worker
    groups = worker.model_runner.attn_groups[0]
    spec = next(group.kv_cache_spec for group in groups if group.backend is MemoryBackend)
    assert select_common_block_size(128, [UpTo64], [None]) == 64
    with pytest.raises(ValueError, match="DELTAMEM"):
        select_common_block_size(
            128, [UpTo64, MemoryBackend], [None, spec.copy_with_new_block_size(128)]
        )
