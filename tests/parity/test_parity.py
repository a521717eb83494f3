"""Golden cases of the published reference, through the real engine."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from tests.helpers import DATA, VOCAB, full_logprobs, running
from tests.sessions.servers import RedisProcess

TOKEN_WISE = ["qwen3_tsw", "qwen3_msw4", "qwen3_qkvo_uncoupled", "qwen3_scaled", "smollm3_tsw"]
SPAN_WISE = ["qwen3_ssw_message", "qwen3_ssw_sentence", "smollm3_ssw_message"]
LOGPROB_TOLERANCE = 1e-4
STATE_TOLERANCE = 1e-5


def open_case(name: str, **arguments: Any) -> MemoryLLM:
    return MemoryLLM(
        str(DATA / name / "model"),
        adapter=str(DATA / name / "adapter"),
        dtype="float32",
        max_model_len=256,
        max_logprobs=VOCAB,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **arguments,
    )


def assert_close(actual: torch.Tensor, logits: torch.Tensor) -> None:
    expected = torch.log_softmax(logits.float(), dim=-1)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGPROB_TOLERANCE)


def assert_states(state: dict, golden: dict, prefix: str) -> None:
    expected = {
        name.removeprefix(prefix): value
        for name, value in golden.items()
        if name.startswith(prefix)
    }
    assert set(state) == set(expected)
    for name, value in expected.items():
        value = value.reshape(state[name].shape)
        tolerance = STATE_TOLERANCE * max(1.0, value.abs().max().item())
        torch.testing.assert_close(state[name], value, rtol=0, atol=tolerance)


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=VOCAB,
        prompt_logprobs=VOCAB,
        ignore_eos=True,
        detokenize=False,
    )


def turn(llm: MemoryLLM, prompt: list[int], max_tokens: int, memory: Memory | None):
    (output,) = llm.generate(
        TokensPrompt(prompt_token_ids=prompt), sampling(max_tokens), memory=memory, use_tqdm=False
    )
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return full_logprobs(rows), list(output.outputs[0].token_ids)


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise_case_matches_the_reference(name: str) -> None:
    golden = load_file(DATA / name / "golden.safetensors")
    greedy = json.loads((DATA / name / "meta.json").read_text())["greedy"]
    history, query = golden["history"].tolist(), golden["query"].tolist()
    llm = open_case(name)

    logprobs, tokens = turn(llm, history, len(greedy), Memory(session="a"))
    assert tokens == greedy
    assert_close(logprobs, golden["write_logits"])
    snapshot = llm.sessions["a"]
    assert_states(snapshot.state, golden, "state.")
    assert snapshot.version == 1
    assert snapshot.tokens_written == len(history) + len(greedy) - 1
    assert snapshot.pending_token_ids == [greedy[-1]]

    read, _ = turn(llm, query, 1, Memory(session="a", mode="read_only"))
    assert_close(read, golden["read_logits"])
    assert_states(llm.sessions["a"].state, golden, "state.")
    empty, _ = turn(llm, query, 1, Memory(session="never written", mode="read_only"))
    assert_close(empty, golden["empty_logits"])

    turn(llm, history, 1, Memory(session="prompt only"))
    assert_states(llm.sessions["prompt only"].state, golden, "prompt_state.")


def spans_of(ids: list[int]) -> list[tuple[int, int]]:
    """The ranges of equal ids; -1 is written nowhere."""
    edges = [0, *(at for at in range(1, len(ids)) if ids[at] != ids[at - 1]), len(ids)]
    return [one for one in pairwise(edges) if ids[one[0]] >= 0]


@pytest.mark.parametrize("budget", [16, 8192])
@pytest.mark.parametrize("name", SPAN_WISE)
def test_span_wise_case_matches_the_reference(name: str, budget: int) -> None:
    """Also a prompt that is cut within spans."""
    golden = load_file(DATA / name / "golden.safetensors")
    config = json.loads((DATA / name / "meta.json").read_text())["config"]
    unit = config["memory_write_granularity"].removesuffix("_mean")
    spans = spans_of(golden[f"{unit}_ids"].tolist())
    history, query = golden["history"].tolist(), golden["query"].tolist()
    llm = open_case(name, max_num_batched_tokens=budget, max_num_seqs=4)

    logprobs, tokens = turn(llm, history, 1, Memory(session="a", spans=spans))
    assert_close(logprobs, golden["write_logits"])
    snapshot = llm.sessions["a"]
    assert_states(snapshot.state, golden, "state.")
    assert snapshot.tokens_written == len(history)
    assert snapshot.pending_token_ids == tokens

    read, _ = turn(llm, query, 1, Memory(session="a", mode="read_only"))
    assert_close(read, golden["read_logits"])
    empty, _ = turn(llm, query, 1, Memory(session="never written", mode="read_only"))
    assert_close(empty, golden["empty_logits"])


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "sqlite":
        yield f"sqlite://{tmp_path}/sessions.db"
        return
    server = RedisProcess(tmp_path)
    yield server.url()
    server.stop()


def test_session_case_matches_the_reference_across_restarts(store: str) -> None:
    """Every turn in an engine of its own, which knows of the others by the store alone."""
    name = "qwen3_session"
    golden = load_file(DATA / name / "golden.safetensors")
    turns = json.loads((DATA / name / "meta.json").read_text())["turns"]
    pending: list[int] = []
    for index, expected in enumerate(turns):
        prompt = golden[f"turn{index}.prompt"].tolist()
        # From the second turn on, the golden prompt begins with the last turn's pending token,
        # which the session feeds by itself.
        assert prompt[: len(pending)] == pending
        with running(open_case(name, store=store)) as llm:
            logprobs, tokens = turn(
                llm, prompt[len(pending) :], len(expected["greedy"]), Memory(session="a")
            )
            snapshot = llm.sessions["a"]
            llm.close()
        assert tokens == expected["greedy"]
        assert_close(logprobs, golden[f"turn{index}.logits"][len(pending) :])
        assert_states(snapshot.state, golden, f"turn{index}.state.")
        assert snapshot.version == index + 1
        pending = snapshot.pending_token_ids
