"""`deltamem sessions rebuild` against a real server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deltamem_vllm.sessions import SessionKey, SessionStore, open_store
from tests.api.losing_proxy import LosingProxy
from tests.api.server import Server, free_port
from tests.api.sessions_http import Ledger, ask, new_name, record_of, state_of
from tests.api.test_http_folding import tokens_of
from tests.helpers import assert_states_close, random_tokens, word
from tests.oracle import Oracle

Line = Mapping[str, Any]


def said(seed: int, length: int) -> str:
    return " ".join(map(word, random_tokens(seed, length)))


def transcript(name: str, seed: int, *, messages: int = 4, words: int = 6, **fields: Any) -> Line:
    roles = ["user", "assistant"] * messages
    said_by = [
        {"role": role, "content": said(seed + number, words)}
        for number, role in enumerate(roles[:messages])
    ]
    return {"session": name, "messages": said_by, **fields}


def written(path: Path, lines: Sequence[Line | str]) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text) + "\n")
    return path


def command(path: Path, url: str, *flags: str) -> list[str]:
    program = str(Path(sys.executable).with_name("deltamem"))
    return [program, "sessions", "rebuild", str(path), "--url", url, *flags]


def rebuild(path: Path, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("VLLM_API_KEY", None)
    return subprocess.run(
        command(path, url, *flags), capture_output=True, text=True, timeout=120, env=environment
    )


def test_sessions_are_written_from_their_transcripts(
    server: Server, store: SessionStore, oracle: Oracle, client: openai.OpenAI, tmp_path: Path
) -> None:
    names = [
        f"{new_name('rebuilt')}{end}" for end in ("", "/a b", "/..", "/ingest", "?x=1#y", "%41")
    ]
    lines = [transcript(name, 100 * index) for index, name in enumerate(names)]
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "1.jsonl", lines[:2])
    written(tmp_path / "folder" / "2.jsonl", ["", *lines[2:]])
    done = rebuild(tmp_path / "folder", server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"written {len(names)}" in done.stdout
    for line in lines:
        ledger = Ledger(oracle)
        ledger.feed(tokens_of(line["messages"]))
        ledger.version = 1
        ledger.check(record_of(store, line["session"]))
    # The history is known: nothing of it is written again.
    history = [*lines[0]["messages"], {"role": "user", "content": said(9, 4)}]
    reply = ask(client, history, {"session": names[0], "window": {"messages": 1}})
    assert reply.memory is not None
    assert (reply.memory["version"], reply.memory["tokens_ingested"]) == (2, 0)

    again = rebuild(tmp_path / "folder", server.url)
    assert again.returncode == 0, again.stdout
    assert f"written 0 (0 tokens), skipped {len(names)}" in again.stdout
    assert [record_of(store, name).version for name in names] == [2, 1, 1, 1, 1, 1]


def test_a_lifetime_and_tools_are_taken_along(
    server: Server, store: SessionStore, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    name = new_name("lasting")
    line = transcript(name, 1, ttl=1000, tools=[tool])
    done = rebuild(written(tmp_path / "t.jsonl", [line]), server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    record = record_of(store, name)
    assert record.expires_at is not None
    assert record.expires_at == pytest.approx(record.created_at + 1000, abs=1)


# Interruptions

SESSIONS = 12
MESSAGES, WORDS = 24, 50
"""Five segments of the server's context each."""


@pytest.fixture
def many(tmp_path: Path) -> tuple[list[Line], Path]:
    prefix = new_name("many")
    lines = [
        transcript(f"{prefix}-{index}", 1000 * index, messages=MESSAGES, words=WORDS)
        for index in range(SESSIONS)
    ]
    return lines, written(tmp_path / "many.jsonl", lines)


def finished(server: Server, prefix: str, headers: Mapping[str, str] | None = None) -> int:
    url = f"{server.url}/v1/memory/sessions"
    query = {"prefix": prefix, "limit": 1000}
    answer = httpx.get(url, params=query, headers=headers, timeout=60)
    return len(answer.json()["data"])


def wait_for_the_first(
    server: Server, lines: Sequence[Line], headers: Mapping[str, str] | None = None
) -> str:
    """The prefix of the sessions' names, when three of them are written."""
    prefix: str = lines[0]["session"].rsplit("-", 1)[0] + "-"
    deadline = time.monotonic() + 120
    while finished(server, prefix, headers) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return prefix


@contextmanager
def held(store: SessionStore, like: SessionKey, names: Sequence[str]) -> Iterator[None]:
    """Keeps sessions from being written, so that a run cannot end."""
    leases = [store.acquire(like._replace(name=name), "a test", seconds=600) for name in names]
    try:
        yield
    finally:
        for lease in leases:
            store.release(lease)


@pytest.mark.parametrize("flags", [[], ["--replace"]], ids=["plain", "replace"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_rebuild_goes_on_and_writes_nothing_twice(
    server: Server,
    store: SessionStore,
    client: openai.OpenAI,
    many: tuple[list[Line], Path],
    tmp_path: Path,
    number: signal.Signals,
    flags: list[str],
) -> None:
    lines, path = many
    like = new_name("like")
    ask(client, random_tokens(1, 5), {"session": like})
    with held(store, record_of(store, like).key, [lines[-1]["session"]]):
        process = subprocess.Popen(
            [*command(path, server.url, "--concurrency", "3", *flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        prefix = wait_for_the_first(server, lines)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), error
    if number == signal.SIGINT:
        assert "interrupted" in error and "Traceback" not in error
    before = finished(server, prefix)
    assert 3 <= before < SESSIONS

    done = rebuild(path, server.url, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    # A commit that had begun is carried through after the count.
    skipped = int(done.stdout.split("skipped ")[1].split()[0])
    assert before <= skipped < SESSIONS

    # The same without an interruption, under other names.
    others = [{**line, "session": f"whole-{line['session']}"} for line in lines]
    assert rebuild(written(tmp_path / "whole.jsonl", others), server.url).returncode == 0
    for line, other in zip(lines, others, strict=True):
        record, whole = record_of(store, line["session"]), record_of(store, other["session"])
        assert (record.version, whole.version) == (1, 1)
        assert record.content.tokens_written == len(tokens_of(line["messages"]))
        assert record.content.message_chain == whole.content.message_chain
        assert_states_close(state_of(record), state_of(whole))


# Sessions that are there already


def test_replacing_keeps_the_old_version_and_spares_longer_sessions(
    server: Server, store: SessionStore, oracle: Oracle, tmp_path: Path
) -> None:
    short, long = new_name("short"), new_name("long")
    old = [transcript(short, 1, messages=2), transcript(long, 2, messages=6)]
    assert rebuild(written(tmp_path / "old.jsonl", old), server.url).returncode == 0
    new = [transcript(short, 3), transcript(long, 4)]
    path = written(tmp_path / "new.jsonl", new)

    kept = rebuild(path, server.url)
    assert kept.returncode == 0 and "skipped 2" in kept.stdout
    done = rebuild(path, server.url, "--replace")
    assert done.returncode == 1, done.stdout
    assert "written 1" in done.stdout and "holds 6 messages" in done.stdout
    assert record_of(store, long).version == 1
    record = record_of(store, short)
    assert (record.version, record.parent_version) == (2, 0)
    ledger = Ledger(oracle)
    ledger.feed(tokens_of(new[0]["messages"]))
    ledger.version = 2
    ledger.check(record)
    assert record_of(store, short, 1).content.tokens_written == len(tokens_of(old[0]["messages"]))

    again = rebuild(path, server.url, "--replace")
    assert "written 0" in again.stdout and "skipped 1" in again.stdout
    assert record_of(store, short).version == 2

    # A text that was written before, and replaced since, is written once more.
    newer = written(tmp_path / "newer.jsonl", [transcript(short, 5)])
    for text, version in ((newer, 3), (path, 4), (path, 4)):
        rebuild(text, server.url, "--replace")
        assert record_of(store, short).version == version
    assert record_of(store, short).content.message_chain == record.content.message_chain


# What goes wrong

BAD = [
    "no json",
    '{"session": "x"}',
    '{"session": "", "messages": [{"role": "user", "content": "w10"}]}',
    '{"session": "x", "messages": [{"role": "nobody", "content": "w10"}]}',
    '{"session": "x", "messages": [{"role": "user", "content": 5}]}',
    '{"session": "x", "messages": [{"role": "user", "content": "w10"}], "more": 1}',
    '{"session": "x", "messages": [{"role": "user", "content": "w10"}], "ttl": -1}',
    "[]",
    '{"session": "x", "messages": [{"role": "user", "content": "\\ud800"}]}',
    '{"session": "x", "messages": [{"role": "user", "content": "w10"}], "tools": [{"x": NaN}]}',
]


def test_bad_lines_are_named_and_the_others_go_on(
    server: Server, store: SessionStore, tmp_path: Path
) -> None:
    name = new_name("good")
    good = transcript(name, 1)
    path = written(tmp_path / "bad.jsonl", [*BAD, good, good])
    numbers = [*range(1, len(BAD) + 1), len(BAD) + 2]
    for flags, code in ((["--dry-run"], 1), (["--strict"], 2)):
        done = rebuild(path, server.url, *flags)
        assert done.returncode == code, done.stdout + done.stderr
        for number in numbers:
            assert f"{path}, line {number}: " in done.stderr
        assert "Traceback" not in done.stderr
        assert finished(server, name) == 0
    done = rebuild(path, server.url)
    assert done.returncode == 1
    assert f"1 sessions, 4 messages, {len(numbers)} bad lines" in done.stdout
    assert record_of(store, name).version == 1


def test_a_name_that_a_route_hides_fails_alone(
    server: Server, client: openai.OpenAI, store: SessionStore, tmp_path: Path
) -> None:
    name, other = new_name("hiding"), new_name("seen")
    ask(client, random_tokens(1, 5), {"session": name})
    lines = [transcript(f"{name}/export", 1), transcript(other, 2)]
    done = rebuild(written(tmp_path / "t.jsonl", lines), server.url)
    assert done.returncode == 1 and "a route" in done.stdout
    assert record_of(store, other).version == 1


def test_dry_run_needs_no_server_and_no_bad_line(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [transcript("a", 1), transcript("b", 2)])
    done = rebuild(path, "http://127.0.0.1:1", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 sessions, 8 messages, 0 bad lines" in done.stdout


def test_what_the_server_refuses_is_listed_and_the_others_go_on(
    server: Server, store: SessionStore, tmp_path: Path
) -> None:
    good, huge = new_name("good"), new_name("huge")
    lines = [transcript(huge, 1, words=100_000), transcript(good, 2)]
    done = rebuild(written(tmp_path / "t.jsonl", lines), server.url)
    assert done.returncode == 1, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if huge in line]
    assert "413" in row
    assert record_of(store, good).version == 1


def test_messages_that_the_template_refuses_fail_alone(
    server: Server, store: SessionStore, tmp_path: Path
) -> None:
    refused, good = new_name("refused"), new_name("good")
    unspeakable = [{"role": "user", "content": "unspeakable"}]
    lines = [{"session": refused, "messages": unspeakable}, transcript(good, 2)]
    path = written(tmp_path / "t.jsonl", lines)
    done = rebuild(path, server.url, "--concurrency", "1")
    assert done.returncode == 1, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if refused in line]
    assert "400" in row and "unspeakable!" in row
    assert record_of(store, good).version == 1


def test_an_answer_that_is_broken_off_again_and_again_fails_alone(
    server: Server, store: SessionStore, tmp_path: Path
) -> None:
    broken, good = new_name("broken"), new_name("good")
    lines = [transcript(broken, 1), transcript(good, 2)]
    path = written(tmp_path / "t.jsonl", lines)
    with LosingProxy(server.url, loses=f"/{broken}".encode()) as proxy:
        done = rebuild(path, proxy.url, "--concurrency", "1")
    assert proxy.lost > 1
    assert done.returncode == 1, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if broken in line]
    assert "does not answer" in row and "not tried" not in done.stdout
    assert record_of(store, good).version == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "http://[", "nothing"])
def test_a_wrong_url_is_one_line(tmp_path: Path, url: str) -> None:
    path = written(tmp_path / "t.jsonl", [transcript("a", 1)])
    done = rebuild(path, url.format(port=free_port()))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--url" in done.stderr


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose clients need a key, and are told apart by a header."""
    folder = tmp_path_factory.mktemp("guarded")
    with Server(
        checkpoint,
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        flags=["--api-key", "secret"],
        environment={"DELTAMEM_TENANT_HEADER": "X-Tenant"},
    ) as server:
        yield server


TENANT = {"Authorization": "Bearer secret", "X-Tenant": "acme"}


def test_keys_and_tenants_are_sent(guarded: Server, tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [transcript("a", 1)])
    for flags in ([], ["--api-key", "wrong"], ["--api-key", "secret"]):
        done = rebuild(path, guarded.url, *flags)
        assert done.returncode == 2, done.stdout
        assert "answers 401" in done.stderr and done.stderr.count("\n") == 1
    done = rebuild(path, f"{guarded.url}/v1/", "--api-key", "secret", "--header", "X-Tenant: acme")
    assert done.returncode == 0, done.stdout + done.stderr
    found = httpx.get(f"{guarded.url}/v1/memory/sessions/a", headers=TENANT)
    assert found.json()["version"] == 1


def test_a_server_that_goes_away_ends_the_run(
    guarded: Server, many: tuple[list[Line], Path], tmp_path: Path
) -> None:
    """The last test of this server: it is killed."""
    lines, path = many
    flags = ["--api-key", "secret", "--header", "X-Tenant: acme"]
    first = written(tmp_path / "first.jsonl", [transcript("first", 1)])
    assert rebuild(first, guarded.url, *flags).returncode == 0
    assert guarded.store is not None
    with open_store(guarded.store) as store:
        like = record_of(store, "first", tenant="acme").key
        # Whoever sends the first three comes to these, and to no more.
        with held(store, like, [line["session"] for line in lines[3:6]]):
            process = subprocess.Popen(
                [*command(path, guarded.url, *flags), "--concurrency", "3"],
                stdout=subprocess.PIPE,
                text=True,
            )
            wait_for_the_first(guarded, lines, TENANT)
            guarded.kill(signal.SIGKILL)
            output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert "not tried" in output
