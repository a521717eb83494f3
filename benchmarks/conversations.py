"""Long conversations for benchmarks, and what of their past a request shows.

Text is the demo's: facts, corrections and small talk, so that every tokenizer of ours knows it. A
conversation begins with a history of a given length; the turns that are measured follow. What a
client would send for the next turn is made here: the full history, a window of it, or a window and
the past turns that BM25 finds for the question.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deltamem_vllm.demo.facts import Message, TrainingMix, training_conversation

MIX = TrainingMix(max_facts=12)

SENTENCES = 6
"""Sentences of one user message."""

RETRIEVED = 4
"""Past turns that retrieval puts in front of a window."""

HEADING = "Earlier in this conversation:"

CountTokens = Callable[[Sequence[Message]], int]
"""Tokens of messages, as the model's chat template renders them."""


class Exchange(NamedTuple):
    """A user's message and its reply."""

    user: Message
    reply: Message

    @property
    def text(self) -> str:
        """Both, as a document to search in."""
        return f"{self.user.content} {self.reply.content}"


def user_message(rng: random.Random) -> Message:
    """One user message of `SENTENCES` sentences."""
    said: list[str] = []
    while len(said) < SENTENCES:
        told = training_conversation(rng, MIX).messages
        said += [message.content for message in told if message.role == "user"]
    return Message("user", " ".join(said[:SENTENCES]))


@dataclass
class Conversation:
    """A conversation as its client knows it: it grows with every reply."""

    name: str
    system: Message | None
    exchanges: list[Exchange]
    coming: list[Message]
    """User messages of the turns that follow, the next one first."""

    index: "TurnIndex | None" = field(default=None, repr=False)

    @property
    def standing(self) -> list[Message]:
        """What stands before the conversation."""
        return [] if self.system is None else [self.system]

    def said(self) -> list[Message]:
        """Everything said so far."""
        return [*self.standing, *self._flat(self.exchanges)]

    def full(self) -> list[Message]:
        """Everything said so far, and the next user message."""
        return [*self.said(), self.coming[0]]

    def window(self, exchanges: int) -> list[Message]:
        """The last `exchanges` exchanges and the next user message."""
        return [*self.standing, *self._flat(self.exchanges[-exchanges:]), self.coming[0]]

    def retrieved(self, exchanges: int) -> list[Message]:
        """A window, and before it the past exchanges that fit the next user message best."""
        older = len(self.exchanges) - exchanges
        if older < 1:
            return self.window(exchanges)
        if self.index is None:
            self.index = TurnIndex(self.exchanges[:older])
        found = self.index.search(self.coming[0].content, RETRIEVED)
        # One message: templates know a system message in front only, and the first wins.
        parts = [message.content for message in self.standing] + [HEADING, *found]
        return [Message("system", "\n".join(parts)), *self.window(exchanges)[len(self.standing) :]]

    def answered(self, reply: str, window: int) -> None:
        """Take a reply in; the index is made anew, as a client would between turns."""
        self.exchanges.append(Exchange(self.coming.pop(0), Message("assistant", reply)))
        if self.index is not None:
            self.index = TurnIndex(self.exchanges[: len(self.exchanges) - window])

    def text_bytes(self) -> int:
        """Bytes of everything said, UTF-8."""
        return sum(len(one.text.encode()) - 1 for one in self.exchanges)

    @staticmethod
    def _flat(exchanges: Sequence[Exchange]) -> list[Message]:
        return [message for exchange in exchanges for message in exchange]


class TurnIndex:
    """BM25 over past exchanges, by `bm25s`."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        import bm25s

        self._texts = [exchange.text for exchange in exchanges]
        self._bm25: Any = bm25s.BM25()
        tokens = bm25s.tokenize(self._texts, stopwords="en", show_progress=False)
        self._bm25.index(tokens, show_progress=False)

    def search(self, question: str, count: int) -> list[str]:
        """The best `count` exchanges, oldest first."""
        import bm25s

        tokens = bm25s.tokenize(question, stopwords="en", show_progress=False)
        count = min(count, len(self._texts))
        found, _ = self._bm25.retrieve(tokens, k=count, show_progress=False)
        return [self._texts[number] for number in sorted(int(one) for one in found[0])]

    def nbytes(self) -> int:
        """Bytes of the index's scores and positions, and of the texts it gives back."""
        scores = sum(part.nbytes for part in self._bm25.scores.values() if hasattr(part, "nbytes"))
        return int(scores) + sum(len(text.encode()) for text in self._texts)


def make_conversation(
    seed: int, history: int, turns: int, count: CountTokens, standing: int = 0
) -> Conversation:
    """A conversation with a history of about `history` tokens.

    Args:
        seed: what is said.
        history: tokens of what was said before the first measured turn; at most that many.
        turns: user messages that follow.
        count: how tokens are counted.
        standing: tokens of a system prompt in front, the same for all seeds; none if 0.
    """
    rng = random.Random(f"conversation/{seed}")
    replies = ["I see.", "Noted.", "Thank you for telling me."]
    messages: list[Message] = []
    while True:
        said = [user_message(rng), Message("assistant", rng.choice(replies))]
        if count([*messages, *said]) > history:
            break
        messages += said
    exchanges = [Exchange(*pair) for pair in zip(messages[::2], messages[1::2], strict=True)]
    coming = [user_message(rng) for _ in range(turns)]
    return Conversation(str(seed), _system(standing, count), exchanges, coming)


def _system(tokens: int, count: CountTokens) -> Message | None:
    if not tokens:
        return None
    rng = random.Random("system")
    said: list[str] = []
    while not said or count([Message("system", " ".join(said))]) < tokens:
        said.append(user_message(rng).content)
    return Message("system", " ".join(said))


@functools.cache
def token_counter(model: str) -> CountTokens:
    """Count with the tokenizer and the chat template of a checkpoint."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(messages: Sequence[Message]) -> int:
        chat = [message.as_dict() for message in messages]
        return len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))

    return count
