"""Transcripts: conversations as text, one per line of a JSONL file.

    {"session": "ada", "messages": [{"role": "user", "content": "..."}, ...]}

Beside these two a line may have `tools`, the definitions that its chat template renders, and `ttl`,
the seconds after which the session expires.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltamem_vllm.api.messages import CHAIN_ROLES, hash_message, role_of, texts_of
from deltamem_vllm.errors import DeltaMemError, TranscriptError
from deltamem_vllm.sessions.limits import check_name

PATTERN: Final = "*.jsonl"
"""Files of a folder that hold transcripts."""


class Transcript(BaseModel):
    """One session's conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    session: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def job_id(self) -> str:
        """Names the ingest of this text: the same whenever it is sent."""
        text = json.dumps([self.messages, self.tools], sort_keys=True)
        return f"rebuild-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"

    @property
    def num_written(self) -> int:
        """Messages that a session remembers: all but the system's."""
        return sum(role_of(message) in CHAIN_ROLES for message in self.messages)


def transcript_files(path: Path) -> list[Path]:
    """The file itself, or a folder's files in order of their names.

    Raises:
        TranscriptError: there is none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(PATTERN))
    if not files:
        raise TranscriptError(f"{path}: holds no transcripts ({PATTERN})")
    return files


class Reader:
    """Reads transcripts line by line; what is not one is named, and the others go on.

    Args:
        files: in this order.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self.problems: list[str] = []
        """One for each bad line of the last reading, with its file and number."""

    def __iter__(self) -> Iterator[Transcript]:
        self.problems.clear()
        seen: dict[str, str] = {}
        for file in self._files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    where = f"{file}, line {number}"
                    try:
                        transcript = parse(line)
                        if transcript.session in seen:
                            raise TranscriptError(
                                f"session {transcript.session!r} is in {seen[transcript.session]} "
                                "already"
                            )
                    except TranscriptError as error:
                        self.problems.append(f"{where}: {error}")
                        continue
                    seen[transcript.session] = where
                    yield transcript


def parse(line: bytes) -> Transcript:
    """One line.

    Raises:
        TranscriptError: it is no transcript.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TranscriptError(f"no valid JSON ({error})") from None
    try:
        transcript = Transcript.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        raise TranscriptError(f"{field}: {first['msg']}") from None
    try:
        check_name("a session", transcript.session)
        for index, message in enumerate(transcript.messages):
            _check_message(index, message)
    except TranscriptError:
        raise
    except DeltaMemError as error:
        raise TranscriptError(str(error)) from None
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise TranscriptError(f"cannot be sent ({error})") from None
    return transcript


def _check_message(index: int, message: dict[str, Any]) -> None:
    try:
        if role_of(message) in CHAIN_ROLES:
            hash_message(message, b"any")  # refuses what a session cannot keep
        else:
            texts_of(message)
    except DeltaMemError as error:
        raise TranscriptError(f"messages[{index}]: {error}") from None
