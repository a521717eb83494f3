"""Trains an adapter on a frozen backbone: what was told must be answered from the state alone.

A step writes histories into an empty memory (with gradient through the scan), drops their text and
KV, and asks: each question is a sequence of its own that reads its conversation's state with writes
off. The loss is on the answers, and a little on the replies inside the history, so that a filling
memory does not disturb them. The trainer takes token ids, so any backbone that `AttachedMemory`
accepts and any tokenizer will do.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from deltamem_vllm.training.attached import AttachedMemory, SpanPlan
from deltamem_vllm.training.encoding import (
    IGNORED_BLOCK,
    EncodedAnswer,
    SpanLayout,
    block_attention_mask,
    pad_rows,
    weighted_loss,
)
from deltamem_vllm.training.schedule import learning_rate_share


@dataclass(frozen=True)
class EncodedHistory:
    """A conversation to write and its questions.

    Each chunk is written without the KV of the chunks before it, from position 0, as a served
    session writes its turns; a single chunk is a history written in one go. `weights` are the loss
    weights of predicting each token of `chunks` (0 for all but replies). `layout` says, over all
    chunks, which tokens an adapter writes together that writes by spans.
    """

    chunks: list[list[int]]
    weights: list[list[float]]
    questions: list[EncodedAnswer]
    layout: SpanLayout | None = None


class AdapterBatch(NamedTuple):
    """Padded histories [B, T] and questions [N, Q]; `owner` [N] is each question's history.

    The plans are there for an adapter that writes by spans, where every row has a layout.
    """

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    weights: Tensor
    question_ids: Tensor
    question_blocks: Tensor
    question_weights: Tensor
    owner: Tensor
    plan: SpanPlan | None = None
    question_plan: SpanPlan | None = None

    def to(self, device: torch.device) -> "AdapterBatch":
        """The same batch on a device."""

        def moved(part: Tensor | SpanPlan | None) -> Any:
            if isinstance(part, SpanPlan):
                return SpanPlan(*map(moved, part))
            return None if part is None else part.to(device)

        return AdapterBatch(*map(moved, self))


@dataclass(frozen=True)
class AdapterTraining:
    """What determines an adapter's weights, besides its config, the backbone and the data.

    `writing_questions_share` is the share of steps whose questions write while they ask, as in an
    ordinary chat turn; all others ask read-only. `reply_share` weighs the history's replies.
    """

    steps: int
    learning_rate: float = 1e-2
    final_share: float = 0.02
    warmup: int = 20
    weight_decay: float = 0.0
    reply_share: float = 0.1
    writing_questions_share: float = 0.2
    seed: int = 0
    max_gradient: float = 1.0


def collate(histories: Sequence[EncodedHistory], pad: int) -> AdapterBatch:
    """Pads histories and questions into one batch."""
    ids, positions, blocks, weights = [], [], [], []
    for history in histories:
        ids.append([token for chunk in history.chunks for token in chunk])
        positions.append([p for chunk in history.chunks for p in range(len(chunk))])
        blocks.append([b for b, chunk in enumerate(history.chunks) for _ in chunk])
        # A chunk's first token has no context to be predicted from.
        weights.append([w for chunk in history.weights for w in (0.0, *chunk[1:])])
    questions = [(row, q) for row, history in enumerate(histories) for q in history.questions]
    question_rows = [[*q.prompt, *q.answer] for _, q in questions]
    return AdapterBatch(
        ids=pad_rows(ids, pad, torch.long),
        positions=pad_rows(positions, 0, torch.long),
        blocks=pad_rows(blocks, IGNORED_BLOCK, torch.long),
        weights=pad_rows(weights, 0.0, torch.float32),
        question_ids=pad_rows(question_rows, pad, torch.long),
        question_blocks=pad_rows([[0] * len(r) for r in question_rows], IGNORED_BLOCK, torch.long),
        question_weights=pad_rows(
            [[0.0] * len(q.prompt) + q.weights for _, q in questions], 0.0, torch.float32
        ),
        owner=torch.tensor([row for row, _ in questions]),
        plan=_span_plan([history.layout for history in histories]),
        question_plan=_span_plan([q.layout for _, q in questions]),
    )


def _span_plan(layouts: Sequence[SpanLayout | None]) -> SpanPlan | None:
    """The rows' layouts as one; None unless all rows have one. Padding writes nothing."""
    known = [layout for layout in layouts if layout is not None]
    if len(known) < len(layouts):
        return None
    return SpanPlan(
        segments=pad_rows([layout.segments for layout in known], 0, torch.long),
        spans=pad_rows([layout.spans for layout in known], -1, torch.long),
    )


def write_histories(model: PreTrainedModel, memory: AttachedMemory, batch: AdapterBatch) -> Tensor:
    """Writes all histories into an empty memory. Returns the last hidden states [B, T, hidden]."""
    memory.reset()
    memory.write_enabled = True
    memory.token_mask = batch.blocks != IGNORED_BLOCK
    memory.spans = batch.plan if memory.writes_spans else None
    hidden = _hidden(model, batch.ids, batch.positions, batch.blocks)
    memory.token_mask = memory.spans = None
    return hidden


def ask_questions(
    model: PreTrainedModel, memory: AttachedMemory, batch: AdapterBatch, writes: bool = False
) -> Tensor:
    """Asks every question of its own history's state. Returns the hidden states [N, Q, hidden].

    The memory must hold the states of the batch's histories, and holds them again afterwards: with
    `writes`, a question changes only its own copy.
    """
    states = memory.states
    memory.load_states({layer: state[batch.owner] for layer, state in states.items()})
    memory.write_enabled = writes
    memory.spans = batch.question_plan if memory.writes_spans else None
    ids = batch.question_ids
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = _hidden(model, ids, positions, batch.question_blocks)
    memory.spans = None
    memory.load_states(states)
    return hidden


def adapter_loss(
    model: PreTrainedModel,
    memory: AttachedMemory,
    batch: AdapterBatch,
    reply_share: float,
    writing_questions: bool = False,
) -> Tensor:
    """Loss of the answers from memory, plus `reply_share` times that of the history's replies."""
    history = write_histories(model, memory, batch)
    answers = ask_questions(model, memory, batch, writing_questions)
    loss = _next_token_loss(model, answers, batch.question_ids, batch.question_weights)
    if reply_share > 0:
        loss = loss + reply_share * _next_token_loss(model, history, batch.ids, batch.weights)
    return loss


def train_adapter(
    model: PreTrainedModel,
    memory: AttachedMemory,
    batches: Iterator[AdapterBatch],
    plan: AdapterTraining,
    checkpoint: Callable[[int], None] | None = None,
    checkpoint_every: int = 200,
) -> None:
    """Trains the memory's parameters in place; the backbone is frozen and stays so."""
    model.requires_grad_(False)
    model.eval()
    parameters = [p for p in memory.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_share(step, plan.steps, plan.warmup, plan.final_share),
    )
    rng = random.Random(plan.seed)
    progress = tqdm(range(plan.steps), desc="adapter", mininterval=5.0)
    smooth = 0.0
    for step in progress:
        writing = rng.random() < plan.writing_questions_share
        batch = next(batches).to(model.device)
        loss = adapter_loss(model, memory, batch, plan.reply_share, writing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, plan.max_gradient)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if step == 0 else 0.97 * smooth + 0.03 * loss.item()
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            checkpoint(step + 1)
    memory.reset()


def _hidden(model: PreTrainedModel, ids: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=block_attention_mask(blocks, shared=None, dtype=model.dtype),
        use_cache=False,
    ).last_hidden_state
    return hidden


def _next_token_loss(
    model: PreTrainedModel, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    chosen = weights[:, 1:] > 0
    logits = model.get_output_embeddings()(hidden[:, :-1][chosen])
    return weighted_loss(logits, ids[:, 1:][chosen], weights[:, 1:][chosen])
