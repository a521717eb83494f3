"""Chats that share what stands before the conversation, with which no memory has to do."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import MemoryRequestError
from tests.helpers import assert_states_close, greedy, output_logprobs
from tests.offline.runs import BLOCK, CASE, contents
from tests.offline.test_offline_folding import WORDS, answered, said, tokens_of
from tests.oracle import Oracle

SYSTEM = {**said(500, 2 * BLOCK + 9), "role": "system"}
PREFIX = 2 * BLOCK + 10
NOISE = 1e-4
TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


def chat(llm: MemoryLLM, messages: Sequence[Any], memory: Memory, **fields: Any) -> Any:
    given = ("tools", "add_generation_prompt")
    arguments = {name: fields.pop(name) for name in given if name in fields}
    sampling = greedy(fields.pop("max_tokens", 6), detokenize=True, **fields)
    (output,) = llm.chat(list(messages), sampling, memory, use_tqdm=False, **arguments)
    return output


class Followed:
    """A session that takes turns, and the definition's state of it."""

    def __init__(self, name: str, oracle: Oracle) -> None:
        self.name, self.oracle = name, oracle
        self.state: Any = None
        self.pending: tuple[int, ...] = ()
        self.written = 0

    def check(self, llm: MemoryLLM, output: Any, prefix: int = PREFIX, reread: int = 0) -> None:
        """A turn whose prompt has so many tokens that are not written, and then so many that are
        read and not written, left what the definition says, and said so."""
        prompt = output.prompt_token_ids
        entered = [*prompt[:prefix], *self.pending, *prompt[prefix:]]
        fed = [*entered, *output.outputs[0].token_ids[:-1]]
        until = prefix + len(self.pending)
        written = [prefix <= at < until or at >= until + reread for at in range(len(fed))]
        writes = output.memory.mode == "read_write"
        answer = self.oracle(fed, state=self.state, written=written, writes=writes, prefix=prefix)
        logprobs = answer.logprobs[len(entered) - 1 :]
        assert (output_logprobs(output) - logprobs).abs().max() < NOISE
        if not writes:
            return
        content = contents(llm)[self.name].content
        assert_states_close(llm.sessions[self.name].state, answer.state)
        self.written += sum(written)
        assert output.memory.tokens_written == content.tokens_written == self.written
        self.state, self.pending = answer.state, content.pending_token_ids


def test_sessions_share_a_system_prompt_that_they_do_not_write(
    llm: MemoryLLM, oracle: Oracle
) -> None:
    cached = []
    sessions = [Followed(name, oracle) for name in "abc"]
    for number in range(2):
        for index, session in enumerate(sessions):
            messages = [SYSTEM, said(510 + 10 * index + number, 7 + index)]
            output = chat(llm, messages, Memory(session=session.name, share_prefix=True))
            assert output.prompt_token_ids == [*tokens_of(messages), WORDS["assistant"]]
            cached.append(output.num_cached_tokens)
            session.check(llm, output)
            # Not in the chain either: it may change at any time.
            assert len(contents(llm)[session.name].content.message_chain) == 2 * number + 2
    assert cached == [0] + [2 * BLOCK] * 5
    question = [SYSTEM, said(540, 5)]
    reading = Memory(session="b", mode="read_only", share_prefix=True)
    asked = chat(llm, question, reading)
    assert asked.num_cached_tokens == 2 * BLOCK
    reader = Followed("b", oracle)
    reader.state = sessions[1].state  # and no pending tokens, which are not read
    reader.check(llm, asked)


def test_a_folded_history_shares_its_system_prompt(llm: MemoryLLM, oracle: Oracle) -> None:
    """The text that is read again is read, and stands behind the pending tokens."""
    for name, cached in (("a", 0), ("b", 2 * BLOCK)):
        session = Followed(name, oracle)
        memory = Memory(session=name, window={"messages": 2}, share_prefix=True)
        history: list[Any] = []
        for number in range(3):
            history.append(said(550 + number + ord(name), 5 + number))
            output = chat(llm, [SYSTEM, *history], memory)
            shown = history[max(0, 2 * number - 2) :]
            assert output.prompt_token_ids == [*tokens_of([SYSTEM, *shown]), WORDS["assistant"]]
            assert output.num_cached_tokens == (cached if number == 0 else 2 * BLOCK)
            session.check(llm, output, reread=len(tokens_of(shown[:-1])))
            history.append(answered(output))
        reading = memory.model_copy(update={"mode": "read_only"})
        history.append(said(559, 6))
        output = chat(llm, [SYSTEM, *history], reading)
        session.pending = ()
        session.check(llm, output)


def test_tools_are_shared_with_the_system_prompt_or_without(llm: MemoryLLM, oracle: Oracle) -> None:
    for name, before in (("a", [SYSTEM]), ("b", [])):
        session = Followed(name, oracle)
        for number in range(2):
            messages = [*before, said(560 + number, 8)]
            memory = Memory(session=name, share_prefix=True)
            output = chat(llm, messages, memory, tools=TOOLS)
            session.check(llm, output, prefix=2 + len(tokens_of(before)))


def test_a_chat_with_nothing_before_it_shares_nothing(llm: MemoryLLM, oracle: Oracle) -> None:
    messages = [said(570, 2 * BLOCK)]
    session = Followed("a", oracle)
    session.check(llm, chat(llm, messages, Memory(session="a", share_prefix=True)), prefix=0)
    other = chat(llm, [*messages, said(571, 3)], Memory(session="a", share_prefix=True))
    assert other.num_cached_tokens == 0


def test_a_chat_that_is_its_shared_blocks_alone_writes_nothing_yet(
    llm: MemoryLLM, oracle: Oracle
) -> None:
    """Its one token is pending, and begins the next turn."""
    system = {**said(575, 2 * BLOCK - 1), "role": "system"}
    memory = Memory(session="a", share_prefix=True)
    session = Followed("a", oracle)
    output = chat(llm, [system], memory, add_generation_prompt=False, max_tokens=1)
    assert len(output.prompt_token_ids) == 2 * BLOCK
    session.check(llm, output, prefix=2 * BLOCK)
    assert session.written == 0 and session.pending == tuple(output.outputs[0].token_ids)
    session.check(llm, chat(llm, [system, said(576, 5)], memory), prefix=2 * BLOCK)


def test_a_later_system_message_belongs_to_the_conversation(llm: MemoryLLM, oracle: Oracle) -> None:
    later = {**said(580, 6), "role": "system"}
    session = Followed("a", oracle)
    messages = [SYSTEM, said(581, 5), later, said(582, 4)]
    session.check(llm, chat(llm, messages, Memory(session="a", share_prefix=True)))


def test_a_turn_that_is_written_again_is_the_same(llm: MemoryLLM, oracle: Oracle) -> None:
    """As after a stop string, behind which the engine may have run on."""
    session = Followed("a", oracle)
    session.check(llm, chat(llm, [SYSTEM, said(590, 5)], Memory(session="a", share_prefix=True)))
    llm.sessions.fork("a", "b")
    messages = [SYSTEM, said(591, 5)]
    whole = chat(llm, messages, Memory(session="b", share_prefix=True))
    stop = whole.outputs[0].text.split()[2]
    before = llm.request_counter.counter
    output = chat(llm, messages, Memory(session="a", share_prefix=True), stop=[stop])
    assert output.outputs[0].finish_reason == "stop"
    assert llm.request_counter.counter >= before + 1
    session.check(llm, output)


def test_pending_tokens_are_hidden_in_the_midst_of_the_prompt(llm: MemoryLLM) -> None:
    memory = Memory(session="a", share_prefix=True)
    chat(llm, [SYSTEM, said(600, 5)], memory)
    messages = [SYSTEM, said(601, 5)]
    output = chat(llm, messages, memory, prompt_logprobs=1)
    tokens = [*tokens_of(messages), WORDS["assistant"]]
    assert output.prompt_token_ids == tokens
    assert len(output.prompt_logprobs) == len(tokens)
    assert output.prompt_logprobs[0] is None
    for token, logprobs in zip(tokens[1:], output.prompt_logprobs[1:], strict=True):
        assert token in logprobs


def test_a_turn_by_name_tells_the_two_kinds_apart(llm: MemoryLLM) -> None:
    messages = [SYSTEM, said(610, 5)]
    memory = Memory(session="a", turn="t", share_prefix=True)
    first, again = chat(llm, messages, memory), chat(llm, messages, memory)
    assert again.memory.replayed and not first.memory.replayed
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    plain = chat(llm, messages, Memory(session="b"))
    assert not torch.equal(output_logprobs(plain), output_logprobs(first))


def test_where_it_makes_no_sense_it_is_refused(llm: MemoryLLM) -> None:
    sharing = Memory(session="a", share_prefix=True)
    with pytest.raises(MemoryRequestError, match="share_prefix"):
        llm.generate([[1, 2, 3]], greedy(), sharing, use_tqdm=False)
    with pytest.raises(MemoryRequestError, match="share_prefix and truncate_prompt_tokens"):
        llm.chat(
            [SYSTEM, said(620, 5)],
            greedy(),
            sharing,
            use_tqdm=False,
            tokenization_kwargs={"truncate_prompt_tokens": 9},
        )
    for fields in ({"mode": "off"}, {}, {"session": "a", "spans": [[0, 1]]}):
        with pytest.raises(MemoryRequestError):
            Memory(share_prefix=True, **fields)
    assert list(llm.sessions) == []
