"""Marked conversations as token ids, by any backbone's own chat template.

Histories are rendered as they are served: turn by turn, each a prompt of its own, or all in one go
and then cut into segments, as an ingest is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from deltamem_vllm.api.boundaries import common_prefix, num_standing, split_boundary
from deltamem_vllm.api.spans import SpanFinder
from deltamem_vllm.config import WriteGranularity
from deltamem_vllm.errors import DeltaMemError, TrainingDataError
from deltamem_vllm.training.adapter_trainer import EncodedHistory
from deltamem_vllm.training.conversations import MarkedConversation, TrainingMessage
from deltamem_vllm.training.encoding import EncodedAnswer, SpanLayout

ChatMode = Literal["joint", "turns"]
"""How a history reaches the memory: in one go, or one prompt per turn."""

Messages = Sequence[TrainingMessage]


@dataclass(frozen=True)
class _Rendered:
    """Messages as tokens, with what is known of them."""

    tokens: list[int]
    weights: list[float]  # 1 for a reply's tokens
    spans: list[tuple[int, int]]  # written together; empty for an adapter that writes by token
    silent: int  # tokens at the beginning that are not written: the system message's


class TemplateEncoder:
    """Encodes conversations for one tokenizer and one kind of adapter.

    Args:
        tokenizer: of the backbone; has a chat template.
        granularity: what one write of the adapter is.
        segment_tokens: the most tokens of a history that are read together.
        value_weight: what an answer's `value` counts in the loss, where all else counts 1.

    Raises:
        TrainingDataError: the tokenizer has no chat template, or is a slow one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        granularity: WriteGranularity,
        segment_tokens: int,
        value_weight: float,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TrainingDataError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, by which "
                "conversations are rendered; take the chat or instruct form of the model"
            )
        if not tokenizer.is_fast:
            raise TrainingDataError(
                f"{tokenizer.name_or_path}: its tokenizer does not say which characters a token "
                "stands for; a fast tokenizer (tokenizer.json) is needed"
            )
        self._tokenizer: Any = tokenizer
        self._segment_tokens, self._value_weight = segment_tokens, value_weight
        self._finder = (
            None if granularity == "token" else SpanFinder(granularity, self._text_tokens)
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.pad = int(pad)
        """Stands where a row of a batch has no token; is never read."""

    def history(
        self, conversation: MarkedConversation, mode: ChatMode, window: int = 0
    ) -> EncodedHistory:
        """A conversation for writing in one of the modes, and its questions for asking.

        The last `window` turns stand in front of each question as text.

        Raises:
            TrainingDataError: it cannot be rendered, or written in segments of this size; the
                message names file and line.
        """
        try:
            return self._history(conversation, mode, window)
        except TrainingDataError as error:
            raise TrainingDataError(f"{conversation.where}: {error}") from None
        except Exception as error:  # a template may fail in any way
            kind = "" if isinstance(error, DeltaMemError) else f"{type(error).__name__}: "
            raise TrainingDataError(
                f"{conversation.where}: the chat template cannot render it ({kind}{error})"
            ) from None

    def _history(
        self, conversation: MarkedConversation, mode: ChatMode, window: int
    ) -> EncodedHistory:
        system, turns = conversation.system, list(conversation.turns())
        whole = [*system, *conversation.history]
        parts = [whole] if mode == "joint" else [[*system, *turn] for turn in turns]
        chunks: list[list[int]] = []
        weights: list[list[float]] = []
        silent: list[int] = []
        layout = SpanLayout()
        for part in parts:
            rendered = self._rendered(part)
            # An ingest is not even shown the system's message.
            shown_from = rendered.silent if mode == "joint" else 0
            for begin, end in self._cuts(rendered, shown_from):
                silent.append(min(max(0, rendered.silent - begin), end - begin))
                chunks.append(rendered.tokens[begin:end])
                weights.append(rendered.weights[begin:end])
                spans = [(a - begin, b - begin) for a, b in rendered.spans if begin <= a < end]
                layout.together(end - begin, spans)
        shown = [*system, *chain(*turns[max(0, len(turns) - window) :])]
        questions = [self._question(shown, *pair) for pair in conversation.questions]
        return EncodedHistory(
            chunks, weights, questions, layout if self._finder else None, tuple(silent)
        )

    def _rendered(self, messages: Messages) -> _Rendered:
        tokens = self._render(messages)
        weights = [0.0] * len(tokens)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before = self._render(messages[:index], add_generation_prompt=True)
                after = self._render(messages[: index + 1])
                end = common_prefix(after, tokens)
                if common_prefix(before, tokens) == len(before) and end > len(before):
                    weights[len(before) : end] = [1.0] * (end - len(before))
        system = num_standing([message.as_dict() for message in messages])
        silent = self._boundary(messages, system, tokens, add_generation_prompt=False)
        spans = self._spans(messages, tokens, silent, system, add_generation_prompt=False)
        return _Rendered(tokens, weights, spans, silent)

    def _boundary(
        self, messages: Messages, count: int, tokens: Sequence[int], add_generation_prompt: bool
    ) -> int:
        """How many tokens of the rendered messages are those of the first `count`."""
        dicts = [message.as_dict() for message in messages]
        system = num_standing(dicts[:count])
        return split_boundary(
            self._render_dicts,
            dicts[:system],
            dicts[system:count],
            dicts[count:],
            add_generation_prompt=add_generation_prompt,
            prompt=tokens,
        )

    def _spans(
        self,
        messages: Messages,
        tokens: Sequence[int],
        start: int,
        first: int,
        add_generation_prompt: bool,
    ) -> list[tuple[int, int]]:
        """What is written of the messages from `first` on, which begin at token `start`."""
        if self._finder is None:
            return []
        found = self._finder.find(
            self._render_dicts,
            [message.as_dict() for message in messages],
            tokens,
            start=start,
            first=first,
            add_generation_prompt=add_generation_prompt,
        )
        if found is None:
            raise TrainingDataError("no message of it has anything to write")
        return list(found)

    def _cuts(self, rendered: _Rendered, start: int) -> list[tuple[int, int]]:
        """The rendered tokens from `start` on in segments; never within a span."""
        size, length = self._segment_tokens, len(rendered.tokens)
        if self._finder is None:
            return [(begin, min(begin + size, length)) for begin in range(start, length, size)]
        cuts, begin, end = [], start, start
        for span_end in [*(span[1] for span in rendered.spans[:-1]), length]:
            if span_end - begin > size and end > begin:
                cuts.append((begin, end))
                begin = end
            if span_end - begin > size:
                raise TrainingDataError(
                    f"one message or sentence has {span_end - begin} tokens, more than a segment; "
                    f"raise --segment-tokens ({size})"
                )
            end = span_end
        return [*cuts, (begin, length)]

    def _question(
        self, shown: Messages, asked: TrainingMessage, answer: TrainingMessage
    ) -> EncodedAnswer:
        prompt = self._render([*shown, asked], add_generation_prompt=True)
        boundary = self._boundary([*shown, asked], len(shown), prompt, add_generation_prompt=True)
        text = self._text([*shown, asked, answer])
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(encoded["input_ids"])
        if tokens[: len(prompt)] != prompt:
            raise TrainingDataError(
                "the chat template renders an answer in another way than a reply of the model, so "
                "its tokens cannot be told from the question's"
            )
        end = self._end_of_reply(tokens, len(prompt))
        weights = [1.0] * (end - len(prompt))
        start = text.rfind(answer.content)
        if answer.value is not None and start >= 0:
            first = start + answer.content.rindex(answer.value)
            last = first + len(answer.value)
            for index, (a, b) in enumerate(encoded["offset_mapping"][len(prompt) : end]):
                if a < last and b > first:
                    weights[index] = self._value_weight
        layout = None
        if self._finder is not None:
            spans = self._spans(
                [*shown, asked], prompt, boundary, len(shown), add_generation_prompt=True
            )
            layout = SpanLayout()
            layout.together(len(prompt), spans)
            layout.one_by_one(end - len(prompt))
        return EncodedAnswer(prompt, tokens[len(prompt) : end], weights, layout, boundary)

    def _end_of_reply(self, tokens: Sequence[int], start: int) -> int:
        """Behind the reply's own last token: what the template puts after it is never sampled."""
        eos = self._tokenizer.eos_token_id
        for index in range(start, len(tokens)):
            if tokens[index] == eos:
                return index + 1
        return len(tokens)

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        dicts = [message.as_dict() for message in messages]
        return self._render_dicts(dicts, add_generation_prompt=add_generation_prompt)

    def _render_dicts(self, messages: Sequence[Any], *, add_generation_prompt: bool) -> list[int]:
        if not messages:
            return []
        return list(
            self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, return_dict=False
            )
        )

    def _text(self, messages: Messages) -> str:
        dicts = [message.as_dict() for message in messages]
        return str(self._tokenizer.apply_chat_template(dicts, tokenize=False))

    def _text_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
