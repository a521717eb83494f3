"""The demo's conversations as adapter batches, in the ways an engine writes and asks."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Literal

from deltamem_vllm.demo.facts import Conversation, Message, TrainingMix, training_conversation
from deltamem_vllm.training.adapter_trainer import AdapterBatch, EncodedHistory, collate
from deltamem_vllm.training.encoding import ChatEncoder, EncodedAnswer, SpanLayout

WriteMode = Literal["joint", "turns", "pending"]
"""How a history reaches the memory: in one prefill; one request per turn; or one request per turn
where the reply's end token, sampled but never fed, is the first token of the next request."""

WRITE_MODES: tuple[WriteMode, ...] = ("joint", "turns", "pending")


@dataclass(frozen=True)
class AdapterData:
    """The adapter's stream of conversations: a curriculum from one to `max_facts` facts.

    One fact for the first `hold_share` of the steps, then a ramp that ends at `ramp_end`. `values`
    is how many values a family has (None: all), `modes` how often each of `WRITE_MODES` writes.
    Questions of `window_share` of the histories come with the last one or two turns in their
    prompt.
    """

    steps: int
    batch: int = 12
    max_facts: int = 12
    hold_share: float = 0.15
    ramp_end: float = 0.65
    overwrite_share: float = 0.25
    untold_share: float = 0.25
    foreign_value_share: float = 0.1
    questions: int = 6
    values: int | None = None
    modes: tuple[int, ...] = (2, 1, 1)
    window_share: float = 0.0
    seed: int = 0

    def mix(self, step: int) -> TrainingMix:
        """The conversations of one step."""
        progress = (step / self.steps - self.hold_share) / (self.ramp_end - self.hold_share)
        share = min(1.0, max(0.0, progress))
        return TrainingMix(
            max_facts=round(1 + share * (self.max_facts - 1)),
            overwrite_share=self.overwrite_share,
            untold_share=self.untold_share,
            foreign_value_share=self.foreign_value_share,
            questions=self.questions,
            values=self.values,
        )


def encode_history(
    conversation: Conversation, encoder: ChatEncoder, mode: WriteMode, window: int = 0
) -> EncodedHistory:
    """Renders a conversation for writing in one of the modes, and its questions for asking.

    The last `window` turns stand in front of each question as text.
    """
    chunks, weights, turns = [], [], list(conversation.turns())
    for turn in turns:
        chunks.append([token for m in turn for token in encoder.message(m)])
        weights.append([w for m in turn for w in encoder.reply_weights(m)])
    shown = list(chain(*chunks[max(0, len(chunks) - window) :]))
    ended: list[int] = []
    layout = SpanLayout()
    if mode == "joint" and chunks:
        chunks, weights = [list(chain(*chunks))], [list(chain(*weights))]
        layout.together(len(chunks[0]), _spans(conversation.messages, encoder))
    elif mode == "turns":
        for turn, chunk in zip(turns, chunks, strict=True):
            layout.together(len(chunk), _spans(turn, encoder))
    elif chunks:
        chunks = [[*([encoder.end] if i else []), *c[:-1]] for i, c in enumerate(chunks)]
        weights = [[*([0.0] if i else []), *w[:-1]] for i, w in enumerate(weights)]
        for index, turn in enumerate(turns):
            _live_turn(layout, turn, encoder, pending=min(index, 1))
        ended = [encoder.end]
    questions = [
        _asked(encoder.question(q), shown, [] if shown else ended) for q in conversation.questions
    ]
    return EncodedHistory(chunks, weights, questions, layout)


def _spans(messages: Sequence[Message], encoder: ChatEncoder) -> list[tuple[int, int]]:
    """The tokens of each message but the system's, in the messages rendered in a row."""
    edges = [0, *accumulate(len(encoder.message(m)) for m in messages)]
    return [
        span
        for message, span in zip(messages, pairwise(edges), strict=True)
        if message.role != "system"
    ]


def _live_turn(
    layout: SpanLayout, turn: Sequence[Message], encoder: ChatEncoder, pending: int
) -> None:
    """A turn whose reply was generated: its token of role opens it and is in no message, and its
    end was never fed."""
    layout.one_by_one(pending)
    asked = turn[:-1] if turn[-1].role == "assistant" else turn
    opening = len(turn) - len(asked)
    length = sum(len(encoder.message(m)) for m in asked)
    layout.together(length + opening, _spans(asked, encoder))
    if opening:
        layout.one_by_one(len(encoder.message(turn[-1])) - 2)
    else:
        layout.segments.pop()
        layout.spans.pop()


def _asked(question: EncodedAnswer, shown: Sequence[int], pending: Sequence[int]) -> EncodedAnswer:
    """The question behind a window or a token yet to be written, and how it is written where it
    writes: its message, then its reply."""
    layout = SpanLayout()
    layout.one_by_one(len(pending))
    length = len(shown) + len(question.prompt)
    layout.together(length, [(len(shown), length - 1)])
    layout.one_by_one(len(question.answer))
    prompt = [*pending, *shown, *question.prompt]
    return replace(question, prompt=prompt, shown=len(shown), layout=layout)


def encode_batch(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    modes: Sequence[WriteMode],
    windows: Sequence[int] | None = None,
) -> AdapterBatch:
    """One batch; `modes[i]` is how conversation i is written, `windows[i]` the turns shown."""
    rows = zip(conversations, modes, windows or [0] * len(modes), strict=True)
    return collate(
        [encode_history(c, encoder, mode, shown) for c, mode, shown in rows], encoder.pad
    )


def adapter_batches(data: AdapterData, encoder: ChatEncoder) -> Iterator[AdapterBatch]:
    """Batches of conversations of similar length, each conversation written in a random mode."""
    rng = random.Random(data.seed)
    waiting: list[list[Conversation]] = []
    for step in range(data.steps):
        if not waiting:
            waiting = similar_batches(rng, data.mix(step), data.batch)
        conversations = waiting.pop()
        modes = rng.choices(WRITE_MODES, weights=data.modes, k=len(conversations))
        windows = None
        if data.window_share:
            chances = (1 - data.window_share, data.window_share / 2, data.window_share / 2)
            windows = rng.choices((0, 1, 2), weights=chances, k=len(conversations))
        yield encode_batch(conversations, encoder, modes, windows)


def similar_batches(rng: random.Random, mix: TrainingMix, batch: int) -> list[list[Conversation]]:
    """Eight batches of conversations of similar length, in random order: less padding to compute.

    Conversations without any message (nothing told) are included.
    """
    drawn = [training_conversation(rng, mix) for _ in range(8 * batch)]
    drawn.sort(key=lambda c: sum(len(m.content) for m in c.messages))
    batches = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
    rng.shuffle(batches)
    return batches
