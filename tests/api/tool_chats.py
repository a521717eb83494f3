"""A server whose model writes JSON, what clients exchange with it, and what that must leave behind.

The model's weights are random, but its tokens are bytes: guided decoding makes tool calls of them.
"""

import json
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from torch import Tensor

from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.api.messages import Message
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.sessions import SessionRecord
from tests.api.server import CASE
from tests.api.sessions_http import Reply, put_together, state_of
from tests.api.templates import character_tokenizer
from tests.helpers import assert_states_close, change_json
from tests.oracle import Oracle

END: Final = "<|im_end|>"
OPENING: Final = "<|im_start|>assistant\n"

TEMPLATE: Final = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{%- if m.role == 'system' -%}"
    "{%- for tool in tools or [] -%}{{ '\n' + tool | tojson }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- for call in m.tool_calls or [] -%}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""As Qwen's: tools stand behind the system message, and calls behind what is said."""

FLAGS: Final = (
    *("--max-model-len", "2048", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)

TOKENIZER: Final = character_tokenizer()
TOKENIZER.eos_token = END
TOKENIZER.chat_template = TEMPLATE

WORDS: Final = {"structured_outputs": {"regex": "[a-z]{3,9}( [a-z]{3,9}){1,3}"}}
"""Field of a request: the answer is text."""

NO_WHITE_SPACE: Final = {
    str(token): -100 for text in ("\t\r \n", "\n\n") for token in TOKENIZER.encode(text)
}
"""Bias that keeps white space out of JSON, where a random model would never end it."""


def tokens_of(text: str) -> list[int]:
    """A text's tokens."""
    tokens: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return tokens


def checkpoint_of_bytes(folder: Path) -> Path:
    """A linked checkpoint whose tokens are bytes, and whose turns end as in ChatML."""
    base = folder / "base"
    shutil.copytree(CASE / "model", base)
    for name in ("config.json", "generation_config.json"):
        change_json(base / name, eos_token_id=TOKENIZER.eos_token_id)
    TOKENIZER.save_pretrained(base)
    return link_checkpoint(base, CASE / "adapter", folder / "linked", architectures=ARCHITECTURES)


class Exchange(NamedTuple):
    """A request as it left the client, and the answer as it came."""

    request: dict[str, Any]
    status: int
    body: str

    @property
    def reply(self) -> Reply:
        """The answer's content."""
        is_stream = bool(self.request.get("stream"))
        parts = [self.body]
        if is_stream:
            events = [line.removeprefix("data: ") for line in self.body.splitlines()]
            parts = [event for event in events if event.startswith("{")]
        return put_together([json.loads(part) for part in parts], True, is_stream)


class Recorder:
    """Keeps what HTTP clients exchange with a server; bytes pass as they come."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def client(self) -> httpx.Client:
        """For a client that blocks."""
        return httpx.Client(event_hooks={"response": [self._tee]}, timeout=60)

    def async_client(self) -> httpx.AsyncClient:
        """For a client that does not."""

        async def tee(response: httpx.Response) -> None:
            self._tee(response)

        return httpx.AsyncClient(event_hooks={"response": [tee]}, timeout=60)

    def _tee(self, response: httpx.Response) -> None:
        response.stream = _Tee(response, self.exchanges)


class _Tee(httpx.SyncByteStream, httpx.AsyncByteStream):
    """An answer's bytes, kept as an exchange when they were read."""

    def __init__(self, response: httpx.Response, exchanges: list[Exchange]) -> None:
        self._response = response
        self._stream: Any = response.stream
        self._exchanges = exchanges
        self._read = bytearray()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._read += chunk
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._read += chunk
            yield chunk

    def close(self) -> None:
        self._stream.close()
        self._keep()

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._keep()

    def _keep(self) -> None:
        asked = json.loads(self._response.request.content)
        status = self._response.status_code
        self._exchanges.append(Exchange(asked, status, self._read.decode()))


def rendered(messages: Sequence[Message]) -> list[int]:
    """What `TEMPLATE` makes of messages without a system message."""
    text = ""
    for message in messages:
        calls = "".join(
            f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
            f"{json.dumps(json.loads(call['function']['arguments']))}}}\n</tool_call>"
            for call in message.get("tool_calls") or ()
        )
        text += f"<|im_start|>{message['role']}\n{message.get('content') or ''}{calls}{END}\n"
    return tokens_of(text)


def check_folded(
    exchanges: Sequence[Exchange], records: Sequence[SessionRecord], oracle: Oracle, window: int
) -> None:
    """Each message was written once, and each turn left the state of the sequential definition.

    What is shown and what is written follows here from the clients' messages alone.

    Args:
        exchanges: all turns of a session, each with its full history behind one system message.
        records: the versions that they made.
        oracle: the definition.
        window: how many messages were to be shown.
    """
    state: dict[str, Tensor] | None = None
    pending: list[int] = []
    tokens_written, known = 0, 0
    closing = tokens_of(f"{END}\n")
    for number, (exchange, record) in enumerate(zip(exchanges, records, strict=True), start=1):
        assert exchange.status == 200, exchange.body
        reply, (system, *history) = exchange.reply, exchange.request["messages"]
        start = max(0, min(len(history) - window, known))
        while history[start]["role"] != "user":
            start -= 1
        assert system["role"] == "system"

        front = reply.prompt_ids[: reply.prompt_ids.index(closing[0]) + 2]
        assert TOKENIZER.decode(front).startswith(f"<|im_start|>system\n{system['content']}")
        reread, fresh = rendered(history[start:known]), rendered(history[known:])
        assert reply.prompt_ids == [*front, *reread, *fresh, *tokens_of(OPENING)]
        assert reply.token_ids[-1] == closing[0]

        fed = [*pending, *reply.prompt_ids, *reply.token_ids[:-1]]
        read = range(len(pending), len(pending) + len(front) + len(reread))
        state = oracle(fed, state=state, written=[at not in read for at in range(len(fed))]).state
        pending = closing
        tokens_written += len(fed) - len(read)
        known = len(history) + 1

        assert record.version == number
        assert record.content.tokens_written == tokens_written
        assert list(record.content.pending_token_ids) == pending
        assert len(record.content.message_chain) == known
        assert_states_close(state_of(record), state)
        assert reply.memory is not None
        assert reply.memory == {
            "session": record.key.name,
            "mode": "read_write",
            "version": number,
            "parent_version": number - 1,
            "tokens_written": tokens_written,
            "tokens_pending": len(pending),
            "tokens_ingested": 0,
            "prompt_tokens_saved": len(rendered(history[:start])),
            "replayed": False,
        }
