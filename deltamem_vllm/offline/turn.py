"""One prompt of a call, from what was asked to what the session holds after it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from vllm import RequestOutput, SamplingParams

from deltamem_vllm.api.messages import Message
from deltamem_vllm.engine.request_args import ARGS_KEY
from deltamem_vllm.engine.turn import NO_TEXT, Spans, Start, Text
from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.memory import Memory
from deltamem_vllm.offline.engine import Feed
from deltamem_vllm.sessions import SessionContent, SessionKey, SessionRecord

UNASKED: Final = ("on_busy", "max_wait")
"""Fields of `Memory` that do not change what is asked."""

NOT_HASHED: Final = ("output_kind", "skip_clone", "output_text_buffer_length")
"""Sampling parameters that vLLM sets in place."""


@dataclass(eq=False)
class Turn:
    """One prompt with its memory, and what becomes of it."""

    prompt: Any
    """Messages, or what `LLM.generate` takes as a prompt."""

    params: SamplingParams
    memory: Memory | None
    lora: Any = None
    priority: int = 0
    key: SessionKey | None = None
    """None: the prompt names no session."""

    request_hash: bytes | None = None
    """Of everything that makes the answer; None for a turn without a name."""

    base: SessionRecord | None = None
    """The version that it grows out of, or reads; None for an empty memory."""

    content: SessionContent | None = None
    """What it begins with: the base's, or that after `ingest`."""

    ingest: Text = NO_TEXT
    """To write before."""

    reread: int = 0
    """Tokens at the prompt's start that are read and not written."""

    prefix: int = 0
    """Tokens at the prompt's start that are neither."""

    spans: Spans | None = None
    """Parts of the prompt that are written, each once; None: each token by itself."""

    chain: tuple[bytes, ...] | None = None
    """Hashes of all whole messages when the prompt is written; None if there is none to keep."""

    partial: Message | None = None
    """The prompt's last message, if the reply goes on with it: `chain` is without it."""

    tokens_saved: int = 0
    """Of the history that the prompt does not show."""

    start: Start | None = None
    """How it begins in the engine; None for an ephemeral memory that is written token by token."""

    entered: Any = None
    """The prompt as the engine got it, pending tokens first."""

    output: RequestOutput | None = None

    @property
    def writes(self) -> bool:
        """Whether it makes a version of its session."""
        return self.memory is not None and self.memory.writes

    def enter(
        self, prompt: Any, params: SamplingParams, max_model_len: int
    ) -> tuple[Any, SamplingParams]:
        """Prompt and parameters for the engine, with the memory.

        Raises:
            MemoryRequestError: the prompt cannot be written.
        """
        if self.start is None:
            # vLLM changes what it gets, and a caller may give the same to a named turn.
            return prompt, params.clone()
        if self.writes:
            rendered, prompt = prompt, self.start.prompt(prompt)
            given, fed = (len(each["prompt_token_ids"]) for each in (rendered, prompt))
            if given < max_model_len <= fed:
                assert self.key is not None
                raise MemoryRequestError(
                    f"session {self.key.name!r}: the prompt has {given} tokens, and the session's "
                    f"{fed - given} pending go before it: with one for the answer that is more "
                    f"than max_model_len, {max_model_len}."
                )
        elif self.start.args.spans is not None:
            prompt = self.start.prompt(prompt)
        self.entered = prompt
        return prompt, self.start.params(params)

    def kept(self) -> Feed:
        """What its session holds at the end: all tokens but the last, which is not fed."""
        assert self.start is not None and self.output is not None
        prompt = self.entered["prompt_token_ids"]
        tokens = [*prompt, *self.output.outputs[0].token_ids][:-1]
        start = self.start.ending_at(len(prompt))
        return Feed(start, {**self.entered, "prompt_token_ids": tokens}, self.lora, self.priority)

    def check(self, *, is_chat: bool) -> None:
        """Refuse what cannot be served.

        Raises:
            MemoryRequestError: names the argument.
        """
        memory, params = self.memory, self.params
        if memory is not None and not isinstance(memory, Memory):
            raise MemoryRequestError(
                f"memory must be a Memory or None, not {type(memory).__name__}: {memory!r}"
            )
        if not isinstance(params, SamplingParams):
            raise MemoryRequestError(
                f"sampling_params must be SamplingParams, not {type(params).__name__}; "
                "`beam_search` runs beams, with ephemeral memories."
            )
        if ARGS_KEY in (params.extra_args or {}):
            raise MemoryRequestError(
                f"{ARGS_KEY!r} in extra_args is reserved: give the request's memory through "
                "`memory`."
            )
        if memory is None:
            return
        if memory.writes and (params.n or 1) > 1:
            raise MemoryRequestError(
                f"n={params.n} with read_write memory: a session has one future. Use n=1 or "
                "read_only."
            )
        if memory.spans is not None and is_chat:
            raise MemoryRequestError(
                "memory.spans belong to prompts; those of a chat are found by its template. Leave "
                "them out."
            )
        if memory.share_prefix and not is_chat:
            raise MemoryRequestError(
                "memory.share_prefix is about what stands before a chat's messages, and a prompt "
                "has none. Use `chat`."
            )
        if memory.window is not None and not is_chat:
            raise MemoryRequestError(
                "memory.window folds messages, and a prompt has none. Use `chat`."
            )

    def hash(self, call: Sequence[Any]) -> bytes:
        """Of everything that makes the answer.

        Args:
            call: what is the same for all prompts of the call.
        """
        assert self.memory is not None
        params = {
            name: value
            for name, value in msgspec.structs.asdict(self.params).items()
            if not name.startswith("_") and name not in NOT_HASHED
        }
        asked = [self.prompt, params, self.memory.model_dump(exclude=set(UNASKED)), call]
        # Of these keys some are numbers, such as those of `logit_bias`.
        plain = msgspec.to_builtins(asked, str_keys=True, enc_hook=repr, order="deterministic")
        encoded = msgspec.json.encode(plain, order="deterministic")
        return hashlib.blake2b(encoded, digest_size=16).digest()
