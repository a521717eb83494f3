"""Puts a session's state into its first page and takes the final state out of its last.

Scheduler side: reads each request's `MemoryArgs`, salts its prefix-cache hashes so that no other
memory can hit its blocks, and says which pages to fill or to copy in each step. Worker side: fills
and copies them, always before the step's forward. No I/O happens here; states arrive inside the
request, and leave through `take_states`, a worker call of the frontend.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger

from deltamem_vllm.engine.compat import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    Request,
    SchedulerOutput,
    SupportsHMA,
    VllmConfig,
    extend_cache_salt,
    get_tensor_model_parallel_rank,
)
from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.engine.probe import CorrectionNorms
from deltamem_vllm.engine.request_args import (
    MemoryArgs,
    ending_spans,
    memory_args,
    without_memory,
)
from deltamem_vllm.engine.settings import adapter_of, page_layout
from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.ops import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    STARTS_AT,
    WRITE_FROM,
    WRITE_UNTIL,
)
from deltamem_vllm.state.page import HEADER_WORDS, PageLayout

logger = init_logger(f"vllm.{__name__}")

Words = npt.NDArray[np.int32]

EPHEMERAL = MemoryArgs()
"""A request that says nothing: an empty memory that is read and written and then dropped."""


MAX_UNWANTED: Final = 10_000
"""Tickets to remember of states that nobody wants any more."""


@dataclass(frozen=True)
class PageLoad:
    """Fill `block` before its first token, that at `position`, of a request that starts there."""

    block: int
    args: MemoryArgs
    position: int = 0


@dataclass(frozen=True)
class PageMarks:
    """Mark the tokens of blocks that belong to spans, before the first of them."""

    blocks: Words  # [n]
    words: Words  # [n, words of a page's marks]


@dataclass(frozen=True)
class _Marks:
    """The marks of a request's whole prompt."""

    words: Words  # [blocks of the prompt, words of a page's marks]
    block_size: int
    num_tokens: int

    @classmethod
    def of(cls, args: MemoryArgs, layout: PageLayout) -> "_Marks":
        assert args.spans is not None and args.span_end is not None
        if layout.spans is None:
            raise MemoryRequestError("the adapter knows no spans.")
        size = layout.spans.block_size
        per_page = layout.mark_words * MARKS_PER_WORD
        marks = np.zeros((-(-args.span_end // size), per_page), np.uint32)
        flat = np.zeros(len(marks) * size, np.uint32)
        for start, end in args.spans:
            flat[start:end] = IN_SPAN
            flat[end - 1] |= ENDS_SPAN
        marks[:, :size] = flat.reshape(-1, size)
        shifts = np.arange(MARKS_PER_WORD, dtype=np.uint32) * MARK_BITS
        words = np.bitwise_or.reduce(
            marks.reshape(len(marks), layout.mark_words, MARKS_PER_WORD) << shifts, axis=-1
        )
        return cls(words.view(np.int32), size, args.span_end)

    def step(self, before: int, count: int, blocks: list[int]) -> PageMarks:
        """For the pages that `count` tokens after the first `before`, which has less than the
        prompt, lie in."""
        last = min(before + count, self.num_tokens)
        touched = slice(before // self.block_size, (last - 1) // self.block_size + 1)
        return PageMarks(np.array(blocks[touched], np.int32), self.words[touched])


@dataclass(frozen=True)
class PageSave:
    """Keep the state after `num_tokens` tokens, which lies in `block`, under `ticket`.

    A request that holds no block, because it ended while it waited or was preempted, leaves 0
    tokens and no state; whoever wants one must run it again. One that holds shared blocks alone,
    whose pages are of any memory, leaves the state `before` it: none of its tokens was written.
    """

    request_id: str
    ticket: str
    block: int | None
    num_tokens: int
    before: bytes | None = None
    """As in `MemoryArgs.state`; only where no block is named."""


@dataclass(frozen=True)
class SavedState:
    """A final state, waiting in the worker to be taken."""

    num_tokens: int
    states: dict[int, Tensor]  # layer index -> [H, r, r] fp32; empty for 0 tokens

    def encoded(self) -> tuple[int, dict[int, bytes]]:
        return self.num_tokens, {
            index: state.cpu().numpy().tobytes() for index, state in self.states.items()
        }


def _on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on `device`, in the order of its stream.

    From pinned memory: any other copy makes the host wait until the device has run all that was
    queued before, which is the step that asynchronous scheduling runs meanwhile.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class MemoryConnectorMetadata(KVConnectorMetadata):
    """One step's page traffic. Saves come first: a freed block may be filled in the same step."""

    saves: list[PageSave] = field(default_factory=list)
    loads: list[PageLoad] = field(default_factory=list)
    marks: list[PageMarks] = field(default_factory=list)


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector of this package; name it in `--kv-transfer-config`."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.adapter = adapter_of(vllm_config)
        self.block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        # Scheduler side
        self._layout = page_layout(self.adapter, vllm_config, self.block_size)
        self._marks: dict[str, _Marks] = {}
        self._shared: dict[str, int] = {}
        """Tokens at a request's beginning whose blocks hold pages of any memory."""

        self._args: dict[str, MemoryArgs] = {}
        self._saves: list[PageSave] = []
        # Worker side
        self._layers: list[MemoryLayer] = []
        self._started: Tensor | None = None
        """Blocks with a `STARTS_AT`."""

        self._saved: dict[str, SavedState] = {}
        self._unwanted: OrderedDict[str, None] = OrderedDict()
        self._finished: set[str] = set()
        if role == KVConnectorRole.WORKER:
            context = vllm_config.compilation_config.static_forward_context
            self._layers = [layer for layer in context.values() if isinstance(layer, MemoryLayer)]

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Scheduler side

    def on_new_request(self, request: Request) -> None:
        params = request.sampling_params
        try:
            args = memory_args(None if params is None else params.extra_args)
            if args is not None:
                # Read here alone; and vLLM writes its requests into the log when it dies.
                request.sampling_params = without_memory(params)
            if args is not None and args.spans is not None:
                args = ending_spans(args, request.num_prompt_tokens)
                self._marks[request.request_id] = _Marks.of(args, self._layout)
        except MemoryRequestError as error:
            # Raising here would take the whole engine down; frontends refuse such requests.
            logger.error("request %s runs with an empty memory: %s", request.request_id, error)
            args = None
        if args is None:
            extend_cache_salt(request, EPHEMERAL.salt)
            return
        self._args[request.request_id] = args
        shared_blocks = args.prefix // self.block_size
        if shared_blocks:
            self._shared[request.request_id] = shared_blocks * self.block_size
        extend_cache_salt(
            request, args.salt, shared_blocks=shared_blocks, shared_salt=args.shared_salt
        )

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        return None

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MemoryConnectorMetadata:
        """Fill the first page of every request that starts, or starts again after preemption.

        A request that starts behind a prefix-cache hit needs no page filled: the hit's salt equals
        its own, so the state at the hit's boundary is the one its snapshot would lead to. Unless
        the blocks are shared by all memories: then the page of the first block behind them is
        filled.
        """
        cached = scheduler_output.scheduled_cached_reqs
        new = scheduler_output.scheduled_new_reqs
        computed = {request.req_id: request.num_computed_tokens for request in new}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starting = {request_id: 0 for request_id, count in computed.items() if count == 0}
        for request_id in self._shared.keys() & computed:
            count = computed[request_id]
            if count % self.block_size == 0 and count <= self._shared[request_id]:
                starting[request_id] = count
        saves, self._saves = self._saves, []
        if not (starting or self._marks):
            return MemoryConnectorMetadata(saves=saves)
        block_ids = scheduler_output.kv_connector_block_state.resolve_block_ids
        return MemoryConnectorMetadata(
            saves=saves,
            loads=[
                PageLoad(
                    block_ids(request_id)[0][position // self.block_size],
                    self._args.get(request_id, EPHEMERAL),
                    position,
                )
                for request_id, position in starting.items()
            ],
            marks=[
                self._marks[request_id].step(
                    computed[request_id],
                    scheduler_output.num_scheduled_tokens[request_id],
                    block_ids(request_id)[0],
                )
                for request_id in self._marks.keys() & computed
                if computed[request_id] < self._marks[request_id].num_tokens
            ],
        )

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hold the blocks of a request whose final state is wanted until the worker copied it."""
        self._marks.pop(request.request_id, None)
        shared = self._shared.pop(request.request_id, 0)
        args = self._args.pop(request.request_id, None)
        if args is None or args.ticket is None:
            return False, None
        computed = request.num_computed_tokens
        # The last sampled token counts as not fed, although a step that feeds it may be running, or
        # have run: an abort is handled between a forward and its outcome. Claim no state that is
        # no longer in the ring.
        num_tokens = max(min(computed, request.num_tokens - 1), computed - self._layout.ring + 1)
        if num_tokens <= shared:
            save = PageSave(request.request_id, args.ticket, None, num_tokens, args.state)
            self._saves.append(save)
            return False, None
        block = block_ids[0][(num_tokens - 1) // self.block_size]
        self._saves.append(PageSave(request.request_id, args.ticket, block, num_tokens))
        return True, None

    # Worker side

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, MemoryConnectorMetadata)
        for save in connector_metadata.saves:
            self._save(save)
        if self._started is not None:
            for layer in self._layers:
                assert layer.pages is not None
                layer.pages.header[self._started, STARTS_AT] = 0
            self._started = None
        if connector_metadata.loads and self._layers:
            self._load(connector_metadata.loads)
        if connector_metadata.marks:
            self._mark(connector_metadata.marks)

    def _save(self, save: PageSave) -> None:
        states = {}
        if save.block is not None:
            self._finished.add(save.request_id)
        if save.ticket in self._unwanted:
            del self._unwanted[save.ticket]
            return
        if save.block is not None:
            states = {
                layer.layer_index: layer.state_at(save.block, save.num_tokens).clone()
                for layer in self._layers
            }
        elif save.num_tokens:
            first_states = torch.from_numpy(self._first_states(save.before).copy())
            states = {
                layer.layer_index: first_states[self._row_of(layer)] for layer in self._layers
            }
        # Tensor parallel ranks hold equal states, so one of them is enough.
        if get_tensor_model_parallel_rank() == 0:
            self._saved[save.ticket] = SavedState(save.num_tokens, states)

    def _load(self, loads: list[PageLoad]) -> None:
        """Write headers and initial states of all starting requests, sent to the device once.

        One that starts behind blocks of others is told so by `STARTS_AT`, until the next step.
        """
        states = np.stack([self._first_states(load.args.state) for load in loads])
        header = np.zeros((len(loads), HEADER_WORDS), np.int32)
        for row, load in enumerate(loads):
            header[row, READ_FROM] = max(load.args.read_from, load.args.prefix)
            header[row, WRITE_FROM] = load.args.write_from
            header[row, WRITE_UNTIL] = load.args.write_until
            header[row, SPAN_END] = load.args.span_end or 0
            header[row, STARTS_AT] = load.position
        device = self._device()
        rows = _on_device(np.array([load.block for load in loads]), device)
        slots = _on_device(np.array([load.position % self._layout.ring for load in loads]), device)
        headers, first_states = _on_device(header, device), _on_device(states, device)
        for layer in self._layers:
            assert layer.pages is not None
            layer.pages.header[rows] = headers
            layer.pages.states[rows, slots] = first_states[:, self._row_of(layer)]
        if header[:, STARTS_AT].any():
            self._started = rows

    def _first_states(self, packed: bytes | None) -> npt.NDArray[np.float32]:
        """[layers, H, r, r] of `MemoryArgs.state`."""
        shape = (len(self.adapter.layer_indices), *self.adapter.config.state_shape)
        if packed is None:
            return np.zeros(shape, np.float32)
        return np.frombuffer(packed, np.float32).reshape(shape)

    def _row_of(self, layer: MemoryLayer) -> int:
        """Where a layer's state lies among the adapter's."""
        return self.adapter.layer_indices.index(layer.layer_index)

    def _device(self) -> torch.device:
        """Where the state pages of all layers lie."""
        pages = self._layers[0].pages
        assert pages is not None
        return pages.states.device

    def _mark(self, marks: list[PageMarks]) -> None:
        if not self._layers:
            return
        device = self._device()
        blocks = _on_device(np.concatenate([mark.blocks for mark in marks]), device)
        words = _on_device(np.concatenate([mark.words for mark in marks]), device)
        for layer in self._layers:
            assert layer.pages is not None and layer.pages.spans is not None
            layer.pages.spans.marks[blocks] = words

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        finished, self._finished = self._finished, set()
        return finished or None, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return None

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return None

    def wait_for_save(self) -> None:
        return None

    def take_states(
        self, tickets: list[str], unwanted: list[str]
    ) -> dict[str, tuple[int, dict[int, bytes]]]:
        """Hand over, and forget, the final states that have arrived.

        Args:
            tickets: of states that are waited for.
            unwanted: of requests that were given up; theirs are dropped, now or when they arrive.

        Returns:
            ticket -> (tokens, layer index -> fp32 [H, r, r] bytes) with this worker's layers;
            nothing from all but the first of the tensor parallel ranks.
        """
        for ticket in unwanted:
            if self._saved.pop(ticket, None) is None:
                self._unwanted[ticket] = None
        while len(self._unwanted) > MAX_UNWANTED:
            # Of requests that never reached the engine.
            self._unwanted.popitem(last=False)
        return {
            ticket: self._saved.pop(ticket).encoded() for ticket in tickets if ticket in self._saved
        }

    def forget_states(self) -> None:
        """Drop all final states that nobody took."""
        self._saved.clear()

    def take_correction_norms(self) -> CorrectionNorms:
        """What the probe of this worker's layers added up since the last call; 0 without one."""
        for layer in self._layers:
            if layer.probe is not None:
                return layer.probe.take()
        return CorrectionNorms(0.0, 0.0)
