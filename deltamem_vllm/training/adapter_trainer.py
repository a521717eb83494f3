"""Trains an adapter on a frozen backbone: what was told must be answered from the state alone.

A step writes histories into an empty memory (with gradient through the scan), drops their text and
KV, and asks: each question is a sequence of its own that reads its conversation's state with writes
off. The loss is on the answers, and a little on the replies inside the history, so that a filling
memory does not disturb them. The trainer takes token ids, so any backbone that `AttachedMemory`
accepts and any tokenizer will do.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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

ADAM_STATE: Final = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter."""


@dataclass(frozen=True)
class EncodedHistory:
    """A conversation to write and its questions.

    Each chunk is written without the KV of the chunks before it, from position 0, as a served
    session writes its turns; a single chunk is a history written in one go. `weights` are the loss
    weights of predicting each token of `chunks` (0 for all but replies). `layout` says, over all
    chunks, which tokens an adapter writes together that writes by spans; for all others `silent` is
    how many tokens at each chunk's beginning are read and not written (none says that there are
    none).
    """

    chunks: list[list[int]]
    weights: list[list[float]]
    questions: list[EncodedAnswer]
    layout: SpanLayout | None = None
    silent: tuple[int, ...] = ()

    def written(self) -> list[bool]:
        """Whether each token of the chunks writes, where each writes by itself."""
        silent = self.silent or (0,) * len(self.chunks)
        return [
            place >= before
            for chunk, before in zip(self.chunks, silent, strict=True)
            for place in range(len(chunk))
        ]


class AdapterBatch(NamedTuple):
    """Padded histories [B, T] and questions [N, Q]; `owner` [N] is each question's history.

    The plans are there for an adapter that writes by spans, where every row has a layout.
    """

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    written: Tensor
    weights: Tensor
    question_ids: Tensor
    question_blocks: Tensor
    question_written: Tensor
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
        written=pad_rows([history.written() for history in histories], False, torch.bool),
        weights=pad_rows(weights, 0.0, torch.float32),
        question_ids=pad_rows(question_rows, pad, torch.long),
        question_blocks=pad_rows([[0] * len(r) for r in question_rows], IGNORED_BLOCK, torch.long),
        question_written=pad_rows(
            [
                [place >= q.shown for place in range(len(row))]
                for (_, q), row in zip(questions, question_rows, strict=True)
            ],
            False,
            torch.bool,
        ),
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
    memory.token_mask = batch.written
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
    memory.token_mask = batch.question_written
    memory.spans = batch.question_plan if memory.writes_spans else None
    ids = batch.question_ids
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = _hidden(model, ids, positions, batch.question_blocks)
    memory.token_mask = memory.spans = None
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
    loss = weighted_answer_loss(model, answers, batch)
    if reply_share > 0:
        loss = loss + reply_share * _next_token_loss(model, history, batch.ids, batch.weights)
    return loss


def weighted_answer_loss(model: PreTrainedModel, hidden: Tensor, batch: AdapterBatch) -> Tensor:
    """Loss of the answers, from what `ask_questions` returned."""
    return _next_token_loss(model, hidden, batch.question_ids, batch.question_weights)


def greedy_matches(
    model: PreTrainedModel, hidden: Tensor, ids: Tensor, weights: Tensor
) -> list[bool]:
    """Whether, in each row, every token with a weight is the most likely one given those before
    it: exactly when greedy decoding yields the answer.

    Args:
        model: the backbone, for its vocabulary projection.
        hidden: [N, T, hidden], the last hidden states of `ids`.
        ids: [N, T].
        weights: [N, T]; 0 for tokens that do not count.
    """
    chosen = weights[:, 1:] > 0
    greedy = model.get_output_embeddings()(hidden[:, :-1][chosen]).argmax(-1)
    wrong = torch.zeros_like(chosen)
    wrong[chosen] = greedy != ids[:, 1:][chosen]
    return [not any_wrong for any_wrong in wrong.any(1).tolist()]


class AdapterStepper:
    """Takes optimizer steps on a memory's parameters; the backbone is frozen and stays so.

    Args:
        model: the backbone.
        memory: attached to it.
        plan: the learning rate over the steps, and all else that decides a step.
    """

    def __init__(
        self, model: PreTrainedModel, memory: AttachedMemory, plan: AdapterTraining
    ) -> None:
        model.requires_grad_(False)
        model.eval()
        self._model, self._memory, self._plan = model, memory, plan
        self._parameters = {
            name: each for name, each in memory.named_parameters() if each.requires_grad
        }
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=plan.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=plan.weight_decay,
        )
        self.done = 0
        """Steps taken so far; those of a run that was gone on with count."""

    def step(self, batches: Sequence[AdapterBatch], writing_questions: bool = False) -> float:
        """One step on the mean gradient of the batches; returns their mean loss."""
        plan = self._plan
        share = learning_rate_share(self.done, plan.steps, plan.warmup, plan.final_share)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate * share
        self._optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            on_device = batch.to(self._model.device)
            loss = adapter_loss(
                self._model, self._memory, on_device, plan.reply_share, writing_questions
            )
            torch.autograd.backward(loss / len(batches))
            total += loss.item() / len(batches)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), plan.max_gradient)
        self._optimizer.step()
        self.done += 1
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and the optimizer's state, by name, on the CPU."""
        found = {}
        for name, parameter in self._parameters.items():
            found[f"parameter.{name}"] = parameter.detach()
            for kind, value in self._optimizer.state[parameter].items():
                found[f"{kind}.{name}"] = value
        return {name: tensor.cpu().clone() for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Goes on after step `done`, from what `tensors` gave then.

        Raises:
            KeyError: a parameter is missing.
        """
        self.done = done
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        if done:
            self._optimizer.load_state_dict(
                {
                    "state": {
                        number: {kind: tensors[f"{kind}.{name}"] for kind in ADAM_STATE}
                        for number, name in enumerate(self._parameters)
                    },
                    "param_groups": self._optimizer.state_dict()["param_groups"],
                }
            )


def train_adapter(
    model: PreTrainedModel,
    memory: AttachedMemory,
    batches: Iterator[AdapterBatch],
    plan: AdapterTraining,
    checkpoint: Callable[[int], None] | None = None,
    checkpoint_every: int = 200,
) -> None:
    """Trains the memory's parameters in place; the backbone is frozen and stays so."""
    stepper = AdapterStepper(model, memory, plan)
    rng = random.Random(plan.seed)
    progress = tqdm(range(plan.steps), desc="adapter", mininterval=5.0)
    smooth = 0.0
    for step in progress:
        writing = rng.random() < plan.writing_questions_share
        loss = stepper.step([next(batches)], writing)
        smooth = loss if step == 0 else 0.97 * smooth + 0.03 * loss
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
