"""The generator of facts: splits never mix, and every answer is what was told last."""

import random
import re
from typing import Literal

import pytest

from deltamem_vllm.demo.facts import (
    Conversation,
    Kind,
    TrainingMix,
    held_out_conversations,
    split_of,
    training_conversation,
)
from deltamem_vllm.demo.vocabulary import SLOTS, UNKNOWN

SLOT_BY_NOUN = {slot.noun: slot for slot in SLOTS}


def user_texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages if message.role == "user"]


def test_training_conversations_tell_only_pairs_of_the_train_split() -> None:
    rng = random.Random(5)
    for _ in range(500):
        conversation = training_conversation(rng, TrainingMix(max_facts=12))
        text = " ".join(user_texts(conversation))
        for noun, value in conversation.facts:
            assert split_of(SLOT_BY_NOUN[noun], value) == "train"
            assert value in text


def test_of_few_values_the_same_few_are_told() -> None:
    rng, mix = random.Random(6), TrainingMix(max_facts=4, values=2, foreign_value_share=0.0)
    told: dict[str, set[str]] = {}
    for _ in range(500):
        for noun, value in training_conversation(rng, mix).facts:
            assert split_of(SLOT_BY_NOUN[noun], value) == "train"
            told.setdefault(noun, set()).add(value)
    assert set(told) == set(SLOT_BY_NOUN)
    assert {len(values) for values in told.values()} == {2}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("kind", ["told", "overwritten"])
def test_asked_pairs_are_of_their_split_and_told_last(
    split: Literal["validation", "test"], kind: Kind
) -> None:
    for conversation in held_out_conversations(100, 6, kind, split):
        (question,) = conversation.questions
        assert len(conversation.facts) == 6
        assert question.value is not None
        assert question.answer.removesuffix(".").endswith(f" {question.value}")
        (noun,) = (n for n, slot in SLOT_BY_NOUN.items() if f"my {n}" in question.text)
        assert split_of(SLOT_BY_NOUN[noun], question.value) == split
        about = [t for t in user_texts(conversation) if re.search(rf"\b{noun}\b", t)]
        assert question.value in about[-1]
        assert len(about) == (2 if kind == "overwritten" else 1)


def test_untold_questions_ask_for_a_slot_that_nobody_mentioned() -> None:
    for conversation in held_out_conversations(100, 8, "untold"):
        (question,) = conversation.questions
        assert question.answer == UNKNOWN
        assert question.value is None
        assert all(f"my {noun}" not in question.text for noun, _ in conversation.facts)


def test_the_same_seed_gives_the_same_conversations() -> None:
    first = held_out_conversations(20, 4, seed=3)
    assert first == held_out_conversations(20, 4, seed=3)
    assert first != held_out_conversations(20, 4, seed=4)


def test_turns_partition_the_messages() -> None:
    rng = random.Random(6)
    for _ in range(50):
        conversation = training_conversation(rng, TrainingMix(max_facts=5, system_share=0.5))
        turns = list(conversation.turns())
        assert tuple(message for turn in turns for message in turn) == conversation.messages
        if conversation.facts:
            assert all([m.role for m in turn][-2:] == ["user", "assistant"] for turn in turns)
