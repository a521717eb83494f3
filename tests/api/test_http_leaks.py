"""Nothing of one memory reaches a request with another one, however many run at once."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from torch import Tensor

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.memory import OFF
from tests.api.server import CASE, MODEL, Server
from tests.helpers import VOCAB, greedy, output_logprobs, random_tokens, running

BLOCK = 32
NUM_BLOCKS = 48
"""So few that every page is given away many times during the test."""

LIMIT = 3e-5
"""In a batch, fp32 sums have another order than alone. That moves logprobs by 5e-6 mostly and by
1.7e-5 at most, in some thousand requests; this leaves room for it."""

LEAK = 100 * LIMIT
"""Less than another memory, or none, changes some logprob by."""

KEYS = {"a": "key-a", "b": "key-b"}
SESSIONS = ("one", "two", "three", "four")
"""Both tenants use these names."""

TURNS = 4
QUESTIONS = 3
"""Asked twice of each version, while the session goes on."""

MAX_TOKENS = 3
PREFIXES = [random_tokens(seed, 3 * BLOCK) for seed in (1, 2)]
"""What all prompts begin with."""

NO_SALTS = """
from deltamem_vllm.engine import connector

connector.extend_cache_salt = lambda request, salt, **_: None
"""

SWAPPED_PAGES = """
from dataclasses import replace

from deltamem_vllm.engine.connector import DeltaMemConnector

load = DeltaMemConnector._load


def swapped(self, loads):
    blocks = [load.block for load in loads]
    others = [*blocks[1:], *blocks[:1]]
    load(self, [replace(one, block=block) for one, block in zip(loads, others)])


DeltaMemConnector._load = swapped
"""

PAGES_AS_THEY_WERE = """
from deltamem_vllm.engine.connector import DeltaMemConnector

load = DeltaMemConnector._load


def load_sessions(self, loads):
    if kept := [one for one in loads if one.args.state is not None]:
        load(self, kept)


DeltaMemConnector._load = load_sessions
"""


WHERE_IT_SERVES = """
import sys

# Torch's compiler starts interpreters, too, that would load vLLM for nothing, each anew.
if any(word == "serve" or "multiprocessing.spawn" in word for word in sys.orig_argv):
"""


class Request(NamedTuple):
    """What one request asks."""

    tenant: str
    mode: str | None  # of its memory; None without one
    session: str | None
    version: int  # that it reads, or grows out of
    prompt: tuple[int, ...]


class Answer(NamedTuple):
    """What it was answered."""

    logprobs: Tensor  # [tokens, vocab]
    num_cached: int  # prompt tokens


class Round(NamedTuple):
    """A turn, and what is asked while the session goes on."""

    turn: Request
    later: list[Request]


def conversation(tenant: str, session: str) -> list[Round]:
    """All of a session's turns; questions are the same for all sessions."""
    rounds = []
    for turn in range(TURNS):
        questions = [prompt(turn % 2, number) for number in range(QUESTIONS)]
        rounds.append(
            Round(
                Request(tenant, "read_write", session, turn, prompt(tenant, session, turn)),
                [
                    *(
                        Request(tenant, "read_only", session, turn + 1, question)
                        for question in 2 * questions
                    ),
                    Request(tenant, None, None, 0, questions[0]),
                    Request(tenant, "off", None, 0, questions[0]),
                ],
            )
        )
    return rounds


def prompt(*seed: object) -> tuple[int, ...]:
    """One of the shared prefixes, and some tokens."""
    source = random.Random(str(seed))
    own = source.choices(range(2, VOCAB), k=source.randint(1, 40))
    return (*source.choice(PREFIXES), *own)


CONVERSATIONS = [conversation(tenant, session) for tenant in KEYS for session in SESSIONS]


# Alone


@pytest.fixture(scope="module")
def alone() -> dict[Request, Tensor]:
    """Logprobs of each request by itself, in a process of its own that caches nothing."""
    answers: dict[Request, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        # Threads that wait for each other cost more than such small steps.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
        llm = MemoryLLM(
            str(CASE / "model"),
            str(CASE / "adapter"),
            dtype="float32",
            max_model_len=256,
            max_logprobs=VOCAB,
            max_num_seqs=1,
            block_size=BLOCK,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
    with running(llm):
        for rounds in CONVERSATIONS:
            for turn, later in rounds:
                for request in (turn, *later):
                    if request not in answers:
                        answers[request] = ask_alone(llm, request)
    return answers


def ask_alone(llm: MemoryLLM, request: Request) -> Tensor:
    """Its turns are asked in order, so that the current version is the one to read."""
    memory = OFF if request.mode == "off" else None
    if request.session is not None:
        name = f"{request.tenant}, {request.session}"
        found = llm.sessions.get(name)
        assert (0 if found is None else found.version) == request.version
        memory = Memory(session=name, mode=request.mode)
    (output,) = llm.generate(
        list(request.prompt), greedy(MAX_TOKENS), memory=memory, use_tqdm=False
    )
    logprobs = output_logprobs(output)
    first, second = logprobs.topk(2).values.unbind(-1)
    assert (first - second).min() > 10 * LIMIT, "noise could change a token: take other prompts"
    return logprobs


# All at once


@contextmanager
def serving(checkpoint: Path, folder: Path, mutation: str | None = None) -> Iterator[Server]:
    """A server with few pages; `mutation` is run in its processes at their start."""
    (folder / "keys.json").write_text(json.dumps({key: tenant for tenant, key in KEYS.items()}))
    environment = {
        "DELTAMEM_TENANT_KEYS_FILE": str(folder / "keys.json"),
        "DELTAMEM_VERSIONS_KEPT": "100",
    }
    if mutation is not None:
        (folder / "sitecustomize.py").write_text(WHERE_IT_SERVES + indent(mutation, "    "))
        given = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *([given] if given else [])])
    flags = ["--max-logprobs", str(VOCAB), "--num-gpu-blocks-override", str(NUM_BLOCKS)]
    with Server(
        checkpoint,
        folder,
        store=f"sqlite://{folder}/sessions.db",
        flags=[*flags, "--enable-prompt-tokens-details"],
        environment=environment,
    ) as server:
        yield server


def ask_all(server: Server) -> list[tuple[Request, Answer]]:
    """Let all sessions go on at once, and ask everything else meanwhile."""
    asked: list[tuple[Request, Future[Answer]]] = []
    with httpx.Client(base_url=server.url, timeout=120) as client:

        def submit(request: Request) -> "Future[Answer]":
            asked.append((request, asking.submit(ask, client, request)))
            return asked[-1][1]

        def talk(rounds: list[Round]) -> None:
            for turn, later in rounds:
                submit(turn).result()
                for request in later:
                    submit(request)

        with ThreadPoolExecutor(16) as asking, ThreadPoolExecutor(len(CONVERSATIONS)) as talking:
            list(talking.map(talk, CONVERSATIONS))
        return [(request, answer.result()) for request, answer in asked]


def ask(client: httpx.Client, request: Request) -> Answer:
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": request.prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": VOCAB,
        "return_tokens_as_token_ids": True,
    }
    if request.mode is not None:
        body["memory"] = {"mode": request.mode}
    if request.session is not None:
        body["memory"] |= {"session": request.session, "version": request.version}
    headers = {"Authorization": f"Bearer {KEYS[request.tenant]}"}
    reply = client.post("/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    (choice,) = answer["choices"]
    details = answer["usage"]["prompt_tokens_details"] or {}
    return Answer(table(choice["logprobs"]["top_logprobs"]), details.get("cached_tokens") or 0)


def table(rows: list[Mapping[str, float]]) -> Tensor:
    """A reply's logprobs, [tokens, vocab]."""
    result = torch.full((len(rows), VOCAB), torch.nan)
    for index, row in enumerate(rows):
        for token, logprob in row.items():
            result[index, int(token.removeprefix("token_id:"))] = logprob
    assert not result.isnan().any()
    return result


Asking = Callable[[str | None], list[tuple[Request, Answer]]]


@pytest.fixture
def ask_server(alone: dict[Request, Tensor], checkpoint: Path, tmp_path: Path) -> Asking:
    """Starts when the engine of `alone` has gone."""

    def ask_server(mutation: str | None) -> list[tuple[Request, Answer]]:
        with serving(checkpoint, tmp_path, mutation) as server:
            return ask_all(server)

    return ask_server


def differences(
    asked: list[tuple[Request, Answer]], alone: dict[Request, Tensor]
) -> list[tuple[Request, float]]:
    """How far each request's logprobs are from those that it has alone."""
    return [
        (request, float((answer.logprobs - alone[request]).abs().max()))
        for request, answer in asked
    ]


def test_every_request_is_answered_as_if_it_were_alone(
    ask_server: Asking, alone: dict[Request, Tensor]
) -> None:
    asked = ask_server(None)
    assert len(asked) >= 200
    for mode, least in [("read_write", 1), ("read_only", 50), (None, 10), ("off", 10)]:
        cached = [answer.num_cached for request, answer in asked if request.mode == mode]
        assert sum(count > 0 for count in cached) >= least, mode
    filled = sum(
        (len(request.prompt) + MAX_TOKENS - answer.num_cached) // BLOCK for request, answer in asked
    )
    assert filled > 5 * NUM_BLOCKS
    for request, difference in differences(asked, alone):
        assert difference < LIMIT, request


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(NO_SALTS, id="no-salts"),
        pytest.param(SWAPPED_PAGES, id="swapped-pages"),
        pytest.param(PAGES_AS_THEY_WERE, id="pages-as-they-were"),
    ],
)
def test_a_leak_would_be_seen(
    ask_server: Asking, alone: dict[Request, Tensor], mutation: str
) -> None:
    asked = ask_server(mutation)
    leaked = [difference for _, difference in differences(asked, alone) if difference > LEAK]
    assert len(leaked) >= 10
