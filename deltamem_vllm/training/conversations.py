"""Training conversations: JSONL, one a line.

    {"messages": [
      {"role": "user", "content": "My cat is called Miro."},
      {"role": "assistant", "content": "Noted."},
      {"role": "user", "content": "What is my cat called?", "ask": true},
      {"role": "assistant", "content": "Your cat is called Miro.", "value": "Miro"}]}

What is not marked is the history: it is written into the memory, and its text removed. A system
message may come first; as in serving, it is shown with every turn and is not written. A user
message with `"ask": true` is a question; the assistant's message behind it is the answer to learn.
Questions stand at the end, at least one, and each is asked by itself: none sees another. `value`,
if given, is the part of an answer that only the history tells; its tokens weigh more in the loss.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deltamem_vllm.errors import TrainingDataError

PATTERN: Final = "*.jsonl"
"""Files of a folder that hold conversations."""


class TrainingMessage(BaseModel):
    """One message of a line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: str
    ask: bool = False
    """Of a user message: a question. The next message is its answer."""

    value: str | None = None
    """Of an answer: the part of `content` that only the history tells."""

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class MarkedConversation:
    """A history and the questions about it."""

    system: tuple[TrainingMessage, ...]
    """At most one message: shown with every turn and every question, never written."""

    history: tuple[TrainingMessage, ...]
    """User and assistant messages."""

    questions: tuple[tuple[TrainingMessage, TrainingMessage], ...]
    where: str
    """File and line, for errors."""

    def turns(self) -> Iterator[tuple[TrainingMessage, ...]]:
        """The history cut behind each reply; what has none at the end is a turn of its own."""
        start = 0
        for index, message in enumerate(self.history, start=1):
            if message.role == "assistant" or index == len(self.history):
                yield self.history[start:index]
                start = index


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    messages: list[TrainingMessage]


def read_conversations(path: Path) -> list[MarkedConversation]:
    """All conversations of a JSONL file, or of a folder's in the order of their names.

    Raises:
        TrainingDataError: a line is no conversation (the message names file and line), or there is
            none at all.
        OSError: a file cannot be read.
    """
    files = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    found = [conversation for file in files for conversation in _read(file)]
    if not found:
        raise TrainingDataError(f"{path}: holds no conversations ({PATTERN}, one a line)")
    return found


def digest(*parts: Sequence[MarkedConversation]) -> str:
    """Of what the conversations say, wherever they stand."""
    whole = hashlib.sha256()
    for part in parts:
        said = [(one.system, one.history, one.questions) for one in part]
        whole.update(repr(said).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def also_learned(
    training: Sequence[MarkedConversation], held_out: Sequence[MarkedConversation]
) -> int:
    """How many held-out conversations are among those to learn from."""
    known = {(one.system, one.history, one.questions) for one in training}
    return sum((one.system, one.history, one.questions) in known for one in held_out)


def _read(file: Path) -> Iterator[MarkedConversation]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parse(line, f"{file}, line {number}")


def parse(line: bytes, where: str) -> MarkedConversation:
    """One line.

    Args:
        line: its bytes.
        where: file and line, for errors.

    Raises:
        TrainingDataError: it is no conversation; the message begins with `where`.
    """
    try:
        messages = _Line.model_validate(json.loads(line)).messages
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        raise TrainingDataError(f"{where}: {field}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise TrainingDataError(f"{where}: no valid JSON ({error})") from None
    first_ask = next((i for i, message in enumerate(messages) if message.ask), len(messages))
    history, asked = messages[:first_ask], messages[first_ask:]
    if problem := _problem(history, asked):
        raise TrainingDataError(f"{where}: {problem}")
    pairs = zip(asked[::2], asked[1::2], strict=True)
    told = sum(message.role == "system" for message in history)
    return MarkedConversation(tuple(history[:told]), tuple(history[told:]), tuple(pairs), where)


def _problem(history: Sequence[TrainingMessage], asked: Sequence[TrainingMessage]) -> str | None:
    """What is wrong with a line's messages, if anything is."""
    if not asked:
        return 'no message is marked as a question; give the last user message "ask": true'
    if not any(message.role != "system" for message in history):
        return "nothing is told before the first question, so there is nothing to remember"
    for offset, message in enumerate(asked):
        at = f"messages.{len(history) + offset}"
        is_question = offset % 2 == 0
        if is_question and not (message.ask and message.role == "user"):
            return (
                f"{at}: after the first question come questions and answers only, so a user "
                'message with "ask": true was expected'
            )
        if not is_question and (message.ask or message.role != "assistant"):
            return f"{at}: the question before it needs an answer, an assistant's message"
    if len(asked) % 2:
        return "the last question has no answer"
    for offset, message in enumerate([*history, *asked]):
        if offset and message.role == "system":
            return f"messages.{offset}: a system message comes first, and once"
        if not message.content.strip():
            return f"messages.{offset}: content is empty"
        is_answer = offset > len(history) and (offset - len(history)) % 2 == 1
        if message.value is not None and not is_answer:
            return f"messages.{offset}: value belongs to the answer of a question"
        if message.value is not None and message.value not in message.content:
            return f"messages.{offset}: value {message.value!r} is not a part of content"
        if message.value == "":
            return f"messages.{offset}: value is empty; leave it out"
    return None
