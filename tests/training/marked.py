"""Conversations in the format of `deltamem train`, from the demo's generator."""

import json
import random
from pathlib import Path
from typing import Any

from deltamem_vllm.demo.facts import Conversation, TrainingMix, training_conversation


def marked(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a line."""
    messages: list[dict[str, Any]] = [message.as_dict() for message in conversation.messages]
    for question in conversation.questions:
        messages.append({"role": "user", "content": question.text, "ask": True})
        answer: dict[str, Any] = {"role": "assistant", "content": question.answer}
        if question.value is not None:
            answer["value"] = question.value
        messages.append(answer)
    return {"messages": messages}


def conversations(count: int, seed: int = 0, **mix: Any) -> list[Conversation]:
    rng = random.Random(seed)
    found: list[Conversation] = []
    while len(found) < count:
        one = training_conversation(rng, TrainingMix(**{"max_facts": 2, "questions": 2, **mix}))
        if one.facts:
            found.append(one)
    return found


def write_lines(path: Path, count: int, seed: int = 0, **mix: Any) -> Path:
    """A file of conversations."""
    lines = [json.dumps(marked(one)) for one in conversations(count, seed, **mix)]
    path.write_text("\n".join(lines) + "\n")
    return path
