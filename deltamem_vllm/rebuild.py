"""Writes sessions anew from their transcripts, through the ingest route of a running server.

An ingest is named by what it writes. So whoever sends the same transcripts again, after an
interruption of his own or of the server, goes on where it stopped, and writes nothing twice.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import quote

import httpx

from deltamem_vllm.errors import RebuildError
from deltamem_vllm.transcripts import Transcript

ROUTE: Final = "/v1/memory/sessions"

ATTEMPTS: Final = 6
FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 8.0
"""Between attempts, while a session is busy or the server does not answer."""

TIMEOUT: Final = httpx.Timeout(600, connect=10)
"""Seconds; a server is silent while it writes one segment."""

Result = Literal["written", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one session."""

    session: str
    result: Result
    reason: str = ""
    tokens: int = 0
    """Written by this run."""


class _RefusedError(Exception):
    """The server will not do it, however often it is asked."""


class _ConflictError(_RefusedError):
    """The session is at another version."""


class _RetryError(Exception):
    """The server may do it a little later."""


class _UnreachableError(_RetryError):
    """No server is there."""


class Rebuild:
    """Sends transcripts to one server.

    Args:
        url: of the server, with or without `/v1`.
        headers: of each request: an API key, a tenant.
        model: the served model; needed for a LoRA.
        concurrency: sessions at a time.
        replace: write sessions that are there already anew, as their next version.
        on_tokens: called with the number of tokens that were just written.
        on_outcome: called when a session is done with.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        model: str | None,
        concurrency: int,
        replace: bool,
        on_tokens: Callable[[int], object],
        on_outcome: Callable[[Outcome], object],
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + ROUTE
        self._headers = dict(headers)
        self._query = {} if model is None else {"model": model}
        self._concurrency = concurrency
        self._replace = replace
        self._on_tokens = on_tokens
        self._on_outcome = on_outcome
        self._is_gone = False

    async def run(self, transcripts: Iterable[Transcript]) -> None:
        """Write all sessions. Each has its outcome at the end, and a failure stops no other.

        Raises:
            RebuildError: the server does not answer, or lets nobody in.
        """
        limits = httpx.Limits(max_connections=self._concurrency)
        try:
            client = httpx.AsyncClient(headers=self._headers, timeout=TIMEOUT, limits=limits)
        except (ValueError, UnicodeError) as error:
            raise RebuildError(f"a header cannot be sent: {error}") from None
        async with client:
            await self._check_server(client)
            waiting = iter(transcripts)

            async def work() -> None:
                # One iterator for all: a transcript is read when somebody is free to send it.
                for transcript in waiting:
                    self._on_outcome(await self._outcome(client, transcript))

            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(work())

    async def _check_server(self, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.get(self._url, params={**self._query, "limit": 1})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RebuildError(
                f"{self._url} does not answer ({error or type(error).__name__}). Give the address "
                "of a server with sessions by --url, such as http://localhost:8000."
            ) from None
        if answer.is_success and "data" in _json(answer.content):
            return
        hint = ""
        if answer.status_code == 401:
            hint = " Give an API key by --api-key, or a tenant by --header."
        raise RebuildError(
            f"{self._url} answers {answer.status_code}: "
            f"{_message(answer.content) or 'no server with sessions'}.{hint}"
        )

    async def _outcome(self, client: httpx.AsyncClient, transcript: Transcript) -> Outcome:
        name = transcript.session
        pause = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            if self._is_gone:
                return Outcome(name, "failed", "not tried: the server does not answer any more")
            try:
                return await self._attempt(client, transcript)
            except _RefusedError as error:
                return Outcome(name, "failed", str(error))
            except _RetryError as error:
                if attempt == ATTEMPTS:
                    self._is_gone |= isinstance(error, _UnreachableError)
                    return Outcome(name, "failed", str(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, MAX_PAUSE_S)
        raise AssertionError("unreachable")

    async def _attempt(self, client: httpx.AsyncClient, transcript: Transcript) -> Outcome:
        # Also dots: a name is never to be taken for a part of the path.
        url = f"{self._url}/{quote(transcript.session, safe='').replace('.', '%2E')}"
        try:
            answer = await client.get(url, params=self._query)
            version = 0
            if answer.status_code != 404:
                _raise_for(answer.status_code, answer.content)
                detail = _json(answer.content)
                if "version" not in detail:
                    raise _RefusedError("its name ends in that of a route, so it cannot be asked")
                version = detail["version"]
                if not self._replace:
                    reason = f"is there already, at version {version}"
                    return Outcome(transcript.session, "skipped", reason)
                held = detail["versions"][0]["messages_written"]
                if held > transcript.num_written:
                    raise _RefusedError(
                        f"the session holds {held} messages, the transcript only "
                        f"{transcript.num_written}: it was not replaced"
                    )
            if version:
                # Made by an earlier run? Its ingest is known by the version that it replaced.
                with suppress(_ConflictError):
                    return await self._ingest(client, url, transcript, version - 1)
            return await self._ingest(client, url, transcript, version)
        except httpx.HTTPError as error:
            reason = f"the server does not answer ({error or type(error).__name__})"
            # An answer that breaks off may be this session's own trouble.
            is_away = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise (_UnreachableError if is_away else _RetryError)(reason) from None

    async def _ingest(
        self,
        client: httpx.AsyncClient,
        url: str,
        transcript: Transcript,
        version: int,
    ) -> Outcome:
        # Always `replace`, so that a run with the option and one without name the same job. A
        # session that came into being, or moved on, meanwhile has another version.
        body = {
            **transcript.model_dump(exclude={"session"}, exclude_none=True),
            "job_id": transcript.job_id + (f"-{version}" if version else ""),
            "version": version,
            "replace": True,
            "stream": True,
        }
        first = position = None
        last: dict[str, Any] = {}
        async with client.stream("POST", f"{url}/ingest", json=body, params=self._query) as answer:
            if not answer.is_success:
                _raise_for(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                last = _json(line.removeprefix("data: ").encode()) or last
                if "error" in last:
                    _raise_for(last["error"].get("code", 500), json.dumps(last).encode())
                if "position" not in last:
                    continue
                if first is None:
                    first = position = 0 if last["replayed"] else last["position"]
                elif last["position"] > position:
                    self._on_tokens(last["position"] - position)
                    position = last["position"]
        if not last.get("done"):
            raise _RetryError("the server broke the answer off")
        if last["replayed"]:
            return Outcome(transcript.session, "skipped", "was written by an earlier run")
        reason = f"went on at token {first:,}" if first else ""
        return Outcome(transcript.session, "written", reason, last["tokens"] - (first or 0))


def _raise_for(status: int, body: bytes) -> None:
    """Raises what an answer that is an error means for another attempt."""
    if status < 400:
        return
    error = _json(body).get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    reason = f"{status}: {_message(body) or 'no reason given'}"
    if kind == "ConflictError":
        raise _ConflictError(reason)
    if kind in ("SessionBusyError", "QueueFullError") or status in (408, 502, 503, 504):
        raise _RetryError(reason)
    raise _RefusedError(reason)


def _message(body: bytes) -> str:
    """What an error says; vLLM and gateways have forms of their own."""
    error = _json(body).get("error", _json(body).get("detail", ""))
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    return text.rstrip(".")


def _json(body: bytes) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    with suppress(ValueError, RecursionError):
        content = json.loads(body)
        if isinstance(content, dict):
            return content
    return {}
