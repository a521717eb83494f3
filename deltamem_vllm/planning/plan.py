"""What conversations take on a machine: with their full history, with a window, with a memory.

Times come from two numbers of the machine. A prefill and a decode step each take the larger of
their operations over `tflops` and their bytes over `gb_per_s`. Operations are two per parameter and
token (the output embedding for sampled tokens alone), and four per layer, query column and pair of
tokens that attention joins. Bytes are the weights, once in a step, and the keys and values that are
read. In full batches a prefill shares its steps with decodes, and their reading of the weights.
What scheduling, sampling and HTTP take is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.planning.machine import Machine
from deltamem_vllm.planning.sizes import (
    Backbone,
    BlockBytes,
    MemoryShape,
    block_bytes,
    session_bytes,
)
from deltamem_vllm.planning.workload import Workload

WayName = Literal["full_cold", "full_warm", "window", "memory"]

STATE_ACCESSES: Final = 2
"""A decoded token's states are read and written, on each GPU."""


@dataclass(frozen=True)
class Way:
    """One way to serve the conversations."""

    name: WayName
    prompt_tokens: int
    """Shown to the model in a turn."""

    computed_tokens: int
    """Of them, those that go through the model; the others are in the prefix cache."""

    blocks_per_turn: int
    shared_blocks: int
    """Of them, those that all turns hold one copy of."""

    blocks: int
    """Of a replica's KV cache."""

    turns_at_once: int
    """Turns that a replica's KV cache has room for, without preemption."""

    warm_conversations: int | None
    """Conversations whose history a replica can keep between turns; None: it need not."""

    replicas_to_keep_warm: int | None
    """That keep all conversations of the workload so, however few turns there are."""

    rest_bytes: int
    """What is kept of one conversation between its turns, beside its text."""

    first_token_s: float
    """Of a turn by itself, until its first token."""

    replica_s: float
    """Of a replica, per turn, in full batches."""

    replicas: float
    """That the workload keeps busy."""

    price_per_1000_turns: float


@dataclass(frozen=True)
class Plan:
    """Sizes of a model with memory, and what each way of serving a workload takes."""

    kv_bytes_per_token: int
    block: BlockBytes
    """Of one GPU."""

    state_bytes: int
    """Of one conversation."""

    store_bytes: int
    """Of all sessions."""

    kv_cache_bytes: float
    """Of a replica."""

    ways: tuple[Way, ...]

    def way(self, name: WayName) -> Way:
        """The way of that name."""
        return next(way for way in self.ways if way.name == name)


def turns_at_once(blocks: int, tokens: int, block_size: int, shared: int = 0) -> int:
    """Turns that a KV cache has room for, without preemption.

    Args:
        blocks: that requests can have; vLLM keeps one for itself.
        tokens: of a turn, its reply included.
        block_size: tokens of a block.
        shared: blocks that all turns begin with, and hold one copy of.
    """
    return max(blocks - shared, 0) // max(math.ceil(tokens / block_size) - shared, 1)


def make_plan(
    backbone: Backbone,
    memory: MemoryShape,
    workload: Workload,
    machine: Machine,
    block_size: int = 16,
) -> Plan:
    """Work out what a workload takes.

    Args:
        backbone: the model.
        memory: its memory.
        workload: the conversations.
        machine: what a replica runs on.
        block_size: tokens of a KV cache block.

    Raises:
        ConfigError: the machine has no room for the model, or for one turn, or the model's heads
            cannot be split over its GPUs.
    """
    if not backbone.can_be_split(machine.gpus):
        raise ConfigError(
            f"--tensor-parallel-size {machine.gpus}: the model's {backbone.shape.num_heads} heads "
            f"and {backbone.shape.num_kv_heads} key heads cannot be split evenly over so many GPUs."
        )
    block = block_bytes(backbone, memory, block_size, machine.gpus)
    cache = machine.kv_cache_bytes(backbone.weight_bytes)
    if cache <= block.total * machine.gpus:
        raise ConfigError(
            f"the machine has no room for a KV cache: {machine.memory_bytes / 1e9:,.1f} GB at "
            f"{machine.utilization:.0%}, less {backbone.weight_bytes / 1e9:,.1f} GB of weights and "
            f"{machine.overhead_bytes / 1e9:,.1f} GB for each of {machine.gpus} GPU(s) beside them."
        )
    session = session_bytes(memory, workload.written_messages, workload.versions_kept)
    planner = _Planner(backbone, memory, workload, machine, block_size, block, cache, session)
    names: tuple[WayName, ...] = ("full_cold", "full_warm", "window", "memory")
    return Plan(
        kv_bytes_per_token=backbone.kv_bytes_per_token,
        block=block,
        state_bytes=memory.state_bytes,
        store_bytes=session * workload.conversations,
        kv_cache_bytes=cache,
        ways=tuple(planner.way(name) for name in names),
    )


@dataclass(frozen=True)
class _Planner:
    backbone: Backbone
    memory: MemoryShape
    workload: Workload
    machine: Machine
    block_size: int
    block: BlockBytes
    cache: float
    session: int

    def way(self, name: WayName) -> Way:
        work, machine = self.workload, self.machine
        with_memory = name == "memory"
        shown = work.history if name in ("full_cold", "full_warm") else work.shown
        prompt = work.standing + shown + work.question
        cached = {
            # What a turn shares with the one before it, or with other conversations: whole blocks.
            "full_cold": 0,
            "full_warm": self._whole(work.standing + work.history),
            "window": self._whole(work.standing),
            # Its salt is its session's, but for what has nothing to do with its memory.
            "memory": self._whole(work.standing) if work.share_prefix else 0,
        }[name]
        computed = prompt - cached
        blocks = self._blocks(with_memory)
        # Turns hold one copy of what they find in the prefix cache.
        shared = min(cached, self._whole(work.standing)) // self.block_size
        total = math.ceil((prompt + work.reply) / self.block_size)
        at_once = turns_at_once(blocks, prompt + work.reply, self.block_size, shared)
        if at_once < 1:
            raise ConfigError(
                f"a turn of {prompt + work.reply:,} tokens takes {total:,} blocks, and the KV "
                f"cache has {blocks:,}: give the machine more memory, or less history."
            )
        batch = min(at_once, machine.max_requests)
        context = prompt + work.reply / 2
        # The prefill gives a reply's first token.
        decodes = (work.reply - 1) * self._decode_s(batch, context, with_memory) / batch
        seconds = self._prefill_s(computed, cached, with_memory, alone=False) + decodes
        warm = None
        rest = 0
        if name == "full_warm":
            warm = at_once
            rest = (total - shared) * self.block_size * self._kv_bytes
        if with_memory:
            rest = self.session
        return Way(
            name=name,
            prompt_tokens=prompt,
            computed_tokens=computed,
            blocks_per_turn=total,
            shared_blocks=shared,
            blocks=blocks,
            turns_at_once=at_once,
            warm_conversations=warm,
            replicas_to_keep_warm=math.ceil(work.conversations / warm) if warm else None,
            rest_bytes=rest,
            first_token_s=self._prefill_s(computed, cached, with_memory, alone=True),
            replica_s=seconds,
            replicas=work.turns_per_second * seconds,
            price_per_1000_turns=1000 * seconds * machine.price_per_hour / 3600,
        )

    @property
    def _kv_bytes(self) -> int:
        """Keys and values of a token, of all GPUs: more GPUs than key heads hold copies."""
        return self.block.keys_values // self.block_size * self.machine.gpus

    def _whole(self, tokens: int) -> int:
        """Tokens of the whole blocks of a beginning: what a prefix cache can give back."""
        return tokens // self.block_size * self.block_size

    def _blocks(self, with_memory: bool) -> int:
        """Blocks of a GPU's KV cache that requests can have; vLLM keeps one for itself."""
        each = self.block.total if with_memory else self.block.keys_values
        return max(int(self.cache / self.machine.gpus // each) - 1, 0)

    def _operations(self, tokens: float, sampled: float, pairs: float, with_memory: bool) -> float:
        shape = self.backbone.shape
        each = 2 * self.backbone.body
        if with_memory:
            each += 2 * shape.hidden_size * self.memory.projected
        attention = 4 * shape.num_layers * shape.q_size * pairs
        return each * tokens + 2 * self.backbone.head * sampled + attention

    def _prefill_s(self, computed: int, cached: int, with_memory: bool, *, alone: bool) -> float:
        """Seconds of a prompt; the weights are read for it only where it is alone in its steps."""
        operations = self._operations(computed, 1, computed * (cached + computed / 2), with_memory)
        read = cached * self._kv_bytes
        if alone:
            read += self.backbone.weight_bytes
        return self._seconds(operations, read)

    def _decode_s(self, batch: int, context: float, with_memory: bool) -> float:
        """Seconds of a step of `batch` requests."""
        each = context * self._kv_bytes
        if with_memory:
            each += STATE_ACCESSES * self.memory.state_bytes * self.machine.gpus
        operations = self._operations(batch, batch, batch * context, with_memory)
        return self._seconds(operations, self.backbone.weight_bytes + batch * each)

    def _seconds(self, operations: float, read: float) -> float:
        """Of what takes so many operations, and reads so many bytes meanwhile."""
        machine = self.machine
        return max(operations / (machine.tflops * 1e12), read / (machine.gb_per_s * 1e9))
