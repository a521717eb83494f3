"""`vllm serve` on a linked checkpoint, over HTTP, as a client of the official library meets it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import load_adapter
from tests.api.server import CASE, MODEL, Server, linked_checkpoint
from tests.helpers import random_tokens, running, word

LOGPROB_TOLERANCE = 1e-4

PROMPT = random_tokens(0, 50)
MESSAGES = [
    {"role": "system", "content": "w10 w11"},
    {"role": "user", "content": " ".join(map(word, random_tokens(1, 40)))},
]
MEMORY = {"memory": {"session": "a"}}
RESERVED = {"vllm_xargs": {"deltamem": "x"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linked checkpoint whose tokens are words."""
    return linked_checkpoint(tmp_path_factory.mktemp("serve"))


class Offline(NamedTuple):
    """What `MemoryLLM` answers, greedily."""

    completion: RequestOutput
    chat: RequestOutput


@pytest.fixture(scope="module")
def offline(checkpoint: Path) -> Offline:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    engine = MemoryLLM(
        str(checkpoint), dtype="float32", max_model_len=256, block_size=32, enforce_eager=True
    )
    with running(engine) as llm:
        (completion,) = llm.generate(PROMPT, params, use_tqdm=False)
        (chat,) = llm.chat(MESSAGES, params, use_tqdm=False)
    return Offline(completion, chat)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(checkpoint, tmp_path_factory.mktemp("log")) as server:
        yield server


@pytest.fixture(autouse=True)
def show_log_on_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before and "server" in request.fixturenames:
        print(request.getfixturevalue("server").tail())


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    arguments = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return client.completions.create(**{**arguments, **fields})


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    arguments = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**arguments, **fields})


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    arguments = {"model": MODEL, "input": "w10 w11 w12", "max_output_tokens": 8}
    return client.responses.create(**{**arguments, **fields})


def sampled_logprobs(output: RequestOutput) -> list[float]:
    sample = output.outputs[0]
    return [
        row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)
    ]


# Answers


def test_completion_equals_the_offline_one(client: openai.OpenAI, offline: Offline) -> None:
    (choice,) = complete(client, logprobs=3).choices
    expected = offline.completion.outputs[0]
    assert choice.text == expected.text
    assert choice.logprobs.tokens == [word(token) for token in expected.token_ids]
    assert choice.logprobs.token_logprobs == pytest.approx(
        sampled_logprobs(offline.completion), abs=LOGPROB_TOLERANCE
    )
    for top, row in zip(choice.logprobs.top_logprobs, expected.logprobs, strict=True):
        expected_top = {word(token): logprob.logprob for token, logprob in row.items()}
        assert top == pytest.approx(expected_top, abs=LOGPROB_TOLERANCE)


def test_chat_completion_equals_the_offline_one(client: openai.OpenAI, offline: Offline) -> None:
    answer = chat(client, logprobs=True)
    (choice,) = answer.choices
    assert choice.message.content == offline.chat.outputs[0].text
    assert answer.usage.prompt_tokens == len(offline.chat.prompt_token_ids)
    assert [part.logprob for part in choice.logprobs.content] == pytest.approx(
        sampled_logprobs(offline.chat), abs=LOGPROB_TOLERANCE
    )


def test_streams_say_the_same(client: openai.OpenAI, offline: Offline) -> None:
    texts = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert len(texts) > 2
    assert "".join(texts) == offline.completion.outputs[0].text
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert len(parts) > 2
    assert "".join(parts) == offline.chat.outputs[0].text


def test_start_up_log_says_what_is_served_and_what_it_takes(server: Server) -> None:
    log = server.log.read_text()
    assert f"delta-mem adapter {load_adapter(CASE / 'adapter').fingerprint[:12]}" in log
    assert "delta-mem: state pages take 3.40% of the KV cache (576 of 16960 bytes" in log


# Refusals


@pytest.mark.parametrize(
    ("send", "fields"),
    [
        (complete, {}),
        (complete, {"stream": True}),
        (chat, {}),
        (chat, {"stream": True}),
        (respond, {}),
    ],
)
def test_memory_field_is_refused_by_name(client: openai.OpenAI, send: Any, fields: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        send(client, extra_body=MEMORY, **fields)
    assert "'memory'" in refusal.value.message
    assert "no session store" in refusal.value.message


@pytest.mark.parametrize("send", [complete, chat])
def test_memory_field_is_refused_with_beam_search(client: openai.OpenAI, send: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'memory'"):
        send(client, extra_body={**MEMORY, "use_beam_search": True}, n=2)


@pytest.mark.parametrize("send", [complete, chat, respond])
def test_reserved_key_in_vllm_xargs_is_refused(client: openai.OpenAI, send: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        send(client, extra_body=RESERVED)
    assert "'deltamem'" in refusal.value.message
    assert "reserved" in refusal.value.message


BATCH = ("/v1/chat/completions/batch", {"messages": [MESSAGES]})
ANTHROPIC = ("/v1/messages", {"messages": MESSAGES[1:]})


@pytest.mark.parametrize(
    ("route", "body", "extra"),
    [
        (*BATCH, MEMORY),
        (*BATCH, RESERVED),
        (*ANTHROPIC, RESERVED),
    ],
    ids=["batch-memory", "batch-xargs", "messages-xargs"],
)
def test_no_other_route_generates_without_the_memory_it_was_asked_for(
    server: Server, route: str, body: dict[str, Any], extra: dict[str, Any]
) -> None:
    body = {"model": MODEL, "max_tokens": 4, **body}
    plain = httpx.post(server.url + route, json=body, timeout=60)
    assert plain.status_code == 200, plain.text
    answer = httpx.post(server.url + route, json={**body, **extra}, timeout=60)
    assert answer.status_code == 400, answer.text


def test_server_answers_after_refusals(client: openai.OpenAI, offline: Offline) -> None:
    for _ in range(3):
        for send in (complete, chat):
            with pytest.raises(openai.BadRequestError):
                send(client, extra_body=MEMORY)
    assert complete(client).choices[0].text == offline.completion.outputs[0].text
    assert chat(client).choices[0].message.content == offline.chat.outputs[0].text


# Without a linked checkpoint


def test_base_model_is_served_with_hf_overrides_of_the_command_line() -> None:
    overrides = {
        "architectures": ["DeltaMemQwen3ForCausalLM"],
        "deltamem": {"adapter": str(CASE / "adapter")},
    }
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(
        [str(CASE / "model"), "--skip-tokenizer-init", "--hf-overrides", json.dumps(overrides)]
    )
    arguments.model = arguments.model_tag
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.model_config.architecture == "DeltaMemQwen3ForCausalLM"
    fingerprint = load_adapter(CASE / "adapter").fingerprint
    assert config.additional_config["deltamem_adapter"] == fingerprint
