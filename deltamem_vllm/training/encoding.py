"""Chat messages as token ids, loss weights and attention blocks.

The rendering equals the tokenizer's chat template (special role tokens never merge with text, so a
message can be encoded alone); encoding message by message lets repeated sentences be cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltamem_vllm.demo.facts import Message, Question
from deltamem_vllm.demo.tokenizer import END, ROLE_TOKENS

# What a wrong token costs. The first word of an answer decides whether the asked fact is known;
# replies in the history and the user's words are mostly chance.
VALUE_WEIGHT = 4.0
FIRST_WEIGHT = 3.0
ANSWER_WEIGHT = 0.5
REPLY_WEIGHT = 0.3
USER_WEIGHT = 0.1
IGNORED_BLOCK = -1


@dataclass
class SpanLayout:
    """Which tokens of a row are written together, as `SpanPlan` has it: one entry per token.

    Built front to back, in the order in which an engine writes.
    """

    segments: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)

    def one_by_one(self, count: int) -> None:
        """Tokens that each read and then write by themselves: replies, pending tokens."""
        first = self._next()
        self.segments += range(first, first + count)
        self.spans += [0] * count

    def together(self, count: int, spans: Sequence[tuple[int, int]]) -> None:
        """A prompt of `count` tokens, of which each half-open range of `spans` writes once."""
        places = [-1] * count
        for number, (begin, end) in enumerate(spans):
            places[begin:end] = [number] * (end - begin)
        self.segments += [self._next()] * count
        self.spans += places

    def _next(self) -> int:
        return self.segments[-1] + 1 if self.segments else 0


@dataclass(frozen=True)
class EncodedAnswer:
    """A question's prompt and its expected reply.

    `weights[i]` is the loss weight of `answer[i]`; the reply ends with the end-of-turn token. The
    prompt's first `shown` tokens are read and never written: a window, a system message. `layout`
    says how prompt and reply are written, where they are and the adapter writes by spans.
    """

    prompt: list[int]
    answer: list[int]
    weights: list[float]
    layout: SpanLayout | None = None
    shown: int = 0


class ChatEncoder:
    """Encodes messages of the demo's template with a cache per distinct text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._roles = {r: int(tokenizer.convert_tokens_to_ids(t)) for r, t in ROLE_TOKENS.items()}
        self.end = int(tokenizer.convert_tokens_to_ids(END))
        self.pad = int(tokenizer.convert_tokens_to_ids(tokenizer.pad_token))
        self._text = lru_cache(maxsize=65536)(self._encode_text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def message(self, message: Message) -> list[int]:
        """One message: role token, text, end-of-turn token."""
        return [self._roles[message.role], *self._text(message.content), self.end]

    def message_weights(self, message: Message) -> list[float]:
        """Loss weights of a history message: replies count, the user's words only a little.

        The role token is given by the template and never predicted.
        """
        weight = REPLY_WEIGHT if message.role == "assistant" else USER_WEIGHT
        length = len(self._text(message.content)) + 1
        return [0.0] + [weight] * length

    def reply_weights(self, message: Message) -> list[float]:
        """Loss weights where only the assistant's replies count."""
        length = len(self._text(message.content)) + 1
        return [0.0] + [1.0 if message.role == "assistant" else 0.0] * length

    def question(self, question: Question) -> EncodedAnswer:
        """The question's own turn with the generation prompt, and the reply to learn."""
        prompt = [*self.message(Message("user", question.text)), self._roles["assistant"]]
        answer = [*self._text(question.answer), self.end]
        weights = [FIRST_WEIGHT] + [ANSWER_WEIGHT] * (len(answer) - 1)
        if question.value is not None:
            value = self._text(" " + question.value)
            for start in range(len(answer) - len(value), -1, -1):
                if tuple(answer[start : start + len(value)]) == value:
                    weights[start : start + len(value)] = [VALUE_WEIGHT] * len(value)
                    break
        return EncodedAnswer(prompt, answer, weights)


def pad_rows(rows: Sequence[Sequence[float]], value: float, dtype: torch.dtype) -> Tensor:
    """Right-pads rows to one length, of at least 1. Returns [len(rows), longest]."""
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=dtype)


def block_attention_mask(
    blocks: Tensor, shared: int | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Additive mask: causal, and a token sees only its own block (and the block `shared`).

    Args:
        blocks: [B, T] block number of each token, `IGNORED_BLOCK` for padding.
        shared: a block that all later tokens see too, or None.
        dtype: that of the model's activations.

    Returns:
        [B, 1, T, T] of `dtype`, 0 where attention is allowed. Padding sees itself, so that no row
        of the softmax is empty.
    """
    length = blocks.shape[1]
    visible = blocks.unsqueeze(2) == blocks.unsqueeze(1)
    if shared is not None:
        visible |= (blocks == shared).unsqueeze(1) & (blocks != IGNORED_BLOCK).unsqueeze(2)
    visible &= torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=blocks.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of `logits` [N, V] for `targets` [N] with `weights` [N], fp32."""
    # In bf16 each token's loss would be rounded to three digits.
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)
