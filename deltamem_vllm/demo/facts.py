"""Conversations that tell facts and questions that ask for them: training data and demo questions.

Everything is generated from a seed. A (slot, value) pair belongs to exactly one split by its hash:
85 % `train`, 7 % `validation` (looked at while tuning), 8 % `test` (the published figures). No
training text, neither the backbone's nor an adapter's, ever contains a held-out pair.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deltamem_vllm.demo.vocabulary import (
    ACKNOWLEDGEMENTS,
    FAMILIES,
    OVERWRITE_MARKERS,
    SLOTS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    UNKNOWN,
    Slot,
)

Split = Literal["train", "validation", "test"]
Kind = Literal["told", "overwritten", "untold"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates and OpenAI-compatible servers take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Question:
    """A question about a conversation.

    `answer` is the whole expected reply. `value` is the word in it that only the conversation
    tells, or None for a question whose answer was never told.
    """

    text: str
    answer: str
    kind: Kind
    value: str | None


@dataclass(frozen=True)
class Conversation:
    """What a user told, turn by turn, and what may be asked afterwards.

    `messages` may start with a system message; then user and assistant messages alternate.
    `facts` holds the final value of each told slot as (noun, value) pairs.
    """

    messages: tuple[Message, ...]
    questions: tuple[Question, ...]
    facts: tuple[tuple[str, str], ...]

    def turns(self) -> Iterator[tuple[Message, ...]]:
        """The messages cut into turns: each turn is one user message with its reply.

        A leading system message belongs to the first turn; a last message without a reply is a
        turn of its own.
        """
        start = 0
        for index, message in enumerate(self.messages):
            if message.role == "assistant":
                yield self.messages[start : index + 1]
                start = index + 1
        if start < len(self.messages):
            yield self.messages[start:]


@dataclass(frozen=True)
class TrainingMix:
    """How training conversations are drawn. All shares are probabilities.

    `foreign_value_share` is how often a slot takes a value of another family ("My bike is Oslo."):
    such facts can only be copied, never guessed from the slot, so that copying is what is learned.
    `values` takes that many of a family's values, all if None: few are soon told apart.
    """

    max_facts: int
    overwrite_share: float = 0.3
    small_talk_share: float = 0.15
    inline_question_share: float = 0.1
    two_facts_share: float = 0.2
    system_share: float = 0.1
    untold_share: float = 0.2
    foreign_value_share: float = 0.2
    questions: int = 6
    values: int | None = None


@dataclass(frozen=True)
class _Telling:
    slot: Slot
    value: str
    overwrites: bool


def split_of(slot: Slot, value: str) -> Split:
    """The split that a (slot, value) pair belongs to, by its SHA-256."""
    digest = hashlib.sha256(f"{slot.noun}|{value}".encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    if bucket < 85:
        return "train"
    return "validation" if bucket < 92 else "test"


_VALUES: dict[tuple[str, Split], tuple[str, ...]] = {
    (slot.noun, split): tuple(v for v in slot.family.values if split_of(slot, v) == split)
    for slot in SLOTS
    for split in ("train", "validation", "test")
}
_ALL_VALUES = tuple(value for family in FAMILIES for value in family.values)
_FOREIGN_VALUES: dict[str, tuple[str, ...]] = {
    slot.noun: tuple(v for v in _ALL_VALUES if split_of(slot, v) == "train") for slot in SLOTS
}


def statement(telling_rng: random.Random, slot: Slot, value: str, overwrites: bool) -> str:
    """One sentence that tells (or corrects) a slot's value."""
    template = telling_rng.choice(slot.family.statements)
    sentence = template.format(n=slot.noun, v=value)
    if not overwrites:
        return sentence
    lowered = sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]
    return telling_rng.choice(OVERWRITE_MARKERS).format(s=lowered)


def question(rng: random.Random, slot: Slot, value: str | None, kind: Kind) -> Question:
    """A question for a slot; with `value` None the expected answer is that it is not known."""
    text = rng.choice(slot.family.questions).format(n=slot.noun)
    if value is None:
        return Question(text, UNKNOWN, kind, None)
    return Question(text, slot.family.answer.format(n=slot.noun, v=value), kind, value)


def _turn(user: str, assistant: str) -> tuple[Message, Message]:
    return Message("user", user), Message("assistant", assistant)


def _small_talk(rng: random.Random) -> tuple[Message, Message]:
    said, reply = rng.choice(SMALL_TALK)
    return _turn(said.format(v=rng.choice(_ALL_VALUES)), reply)


def _messages(rng: random.Random, tellings: Sequence[_Telling], mix: TrainingMix) -> list[Message]:
    """Renders tellings in order as a chat with small talk and, now and then, a question."""
    messages: list[Message] = []
    if rng.random() < mix.system_share:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    known: dict[Slot, str] = {}
    queue = list(tellings)
    while queue:
        if rng.random() < mix.small_talk_share:
            messages += _small_talk(rng)
        if rng.random() < mix.inline_question_share:
            slot = rng.choice(list(known)) if known and rng.random() < 0.8 else rng.choice(SLOTS)
            asked = question(rng, slot, known.get(slot), "told")
            messages += _turn(asked.text, asked.answer)
        together = 2 if len(queue) > 1 and rng.random() < mix.two_facts_share else 1
        told, queue = queue[:together], queue[together:]
        sentences = [statement(rng, t.slot, t.value, t.overwrites) for t in told]
        messages += _turn(" ".join(sentences), rng.choice(ACKNOWLEDGEMENTS))
        known.update((t.slot, t.value) for t in told)
    if rng.random() < mix.small_talk_share:
        messages += _small_talk(rng)
    return messages


def _training_value(
    rng: random.Random, slot: Slot, mix: TrainingMix, other_than: str | None = None
) -> str:
    foreign = rng.random() < mix.foreign_value_share
    values = _FOREIGN_VALUES[slot.noun] if foreign else _VALUES[slot.noun, "train"][: mix.values]
    return rng.choice([value for value in values if value != other_than])


def training_conversation(rng: random.Random, mix: TrainingMix) -> Conversation:
    """A conversation of 0 to `mix.max_facts` facts of the train split, with mixed questions."""
    count = 0 if rng.random() < 0.04 else rng.randint(1, mix.max_facts)
    tellings: list[_Telling] = []
    final: dict[Slot, str] = {}
    overwritten: set[Slot] = set()
    for slot in rng.sample(SLOTS, count):
        final[slot] = _training_value(rng, slot, mix)
        tellings.append(_Telling(slot, final[slot], overwrites=False))
    for slot in list(final):
        if rng.random() < mix.overwrite_share:
            final[slot] = _training_value(rng, slot, mix, other_than=final[slot])
            overwritten.add(slot)
            after = next(i for i, t in enumerate(tellings) if t.slot is slot) + 1
            place = rng.randint(after, len(tellings))
            tellings.insert(place, _Telling(slot, final[slot], overwrites=True))
    asked: list[Question] = []
    told = list(final)
    untold = [slot for slot in SLOTS if slot not in final]
    for _ in range(min(mix.questions, count + 1)):
        if told and rng.random() >= mix.untold_share:
            slot = rng.choice(told)
            kind: Kind = "overwritten" if slot in overwritten else "told"
            asked.append(question(rng, slot, final[slot], kind))
        else:
            asked.append(question(rng, rng.choice(untold), None, "untold"))
    return Conversation(
        messages=tuple(_messages(rng, tellings, mix)),
        questions=tuple(asked),
        facts=tuple((slot.noun, value) for slot, value in final.items()),
    )


def _held_out_pairs(split: Split) -> list[tuple[Slot, str]]:
    return [(slot, value) for slot in SLOTS for value in _VALUES[slot.noun, split]]


def held_out_conversations(
    count: int,
    facts: int,
    kind: Kind = "told",
    split: Literal["validation", "test"] = "test",
    seed: int = 0,
    small_talk_share: float = 0.1,
) -> list[Conversation]:
    """`count` conversations of `facts` facts, each with one question, the same for the same seed.

    The asked pair always belongs to `split`; the facts around it are drawn from all values. For
    `overwritten`, the asked slot is told first with another value and corrected later (so there are
    `facts + 1` statements). For `untold`, the asked slot is none of the told ones.
    """
    rng = random.Random(f"{split}/{kind}/{facts}/{seed}")
    mix = TrainingMix(
        max_facts=facts,
        small_talk_share=small_talk_share,
        inline_question_share=0.0,
        two_facts_share=0.0,
        system_share=0.0,
    )
    return [_held_out_conversation(rng, facts, kind, split, mix) for _ in range(count)]


def distant_conversations(
    count: int, turns: int, split: Literal["validation", "test"] = "test", seed: int = 0
) -> list[Conversation]:
    """`count` conversations that begin with their only fact, with `turns` turns of small talk
    between it and the question. The pair belongs to `split`."""
    rng = random.Random(f"{split}/distance/{turns}/{seed}")
    pairs = _held_out_pairs(split)
    found = []
    for _ in range(count):
        slot, value = rng.choice(pairs)
        told = _turn(statement(rng, slot, value, False), rng.choice(ACKNOWLEDGEMENTS))
        talk = [message for _ in range(turns) for message in _small_talk(rng)]
        asked = question(rng, slot, value, "told")
        found.append(Conversation((*told, *talk), (asked,), ((slot.noun, value),)))
    return found


def _held_out_conversation(
    rng: random.Random, facts: int, kind: Kind, split: Split, mix: TrainingMix
) -> Conversation:
    asked_slot, asked_value = rng.choice(_held_out_pairs(split))
    others = rng.sample([slot for slot in SLOTS if slot is not asked_slot], facts)
    final = {slot: rng.choice(slot.family.values) for slot in others}
    if kind != "untold":
        final.pop(others[0])
        final[asked_slot] = asked_value
    slots = list(final)
    rng.shuffle(slots)
    tellings = [_Telling(slot, final[slot], overwrites=False) for slot in slots]
    if kind == "overwritten":
        old = rng.choice([v for v in asked_slot.family.values if v != asked_value])
        place = slots.index(asked_slot)
        tellings[place] = _Telling(asked_slot, old, overwrites=False)
        correction = _Telling(asked_slot, asked_value, overwrites=True)
        tellings.insert(rng.randint(place + 1, facts), correction)
    value = None if kind == "untold" else asked_value
    return Conversation(
        messages=tuple(_messages(rng, tellings, mix)),
        questions=(question(rng, asked_slot, value, kind),),
        facts=tuple((slot.noun, final[slot]) for slot in slots),
    )
