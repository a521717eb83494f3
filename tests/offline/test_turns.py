"""What a turn of `MemoryLLM` reads and writes."""

import random

import torch
from torch import Tensor
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.memory import OFF
from tests.helpers import (
    greedy,
    output_logprobs,
    random_tokens,
    word,
)
from tests.offline.runs import (
    CASE,
    EFFECT,
    NOISE,
    assert_same_session,
    contents,
    probe,
    run,
    write,
)
from tests.oracle import Oracle


def test_off_is_stock_vllm_bit_for_bit(llm: MemoryLLM, stock_logprobs: list[Tensor]) -> None:
    for actual, expected in zip(probe(llm, memory=OFF), stock_logprobs, strict=True):
        assert torch.equal(actual, expected)


def test_zero_corrections_are_stock_vllm_bit_for_bit(
    stock_logprobs: list[Tensor], zero_adapter_logprobs: list[Tensor]
) -> None:
    for actual, expected in zip(zero_adapter_logprobs, stock_logprobs, strict=True):
        assert torch.equal(actual, expected)


def test_memory_changes_what_the_model_says(llm: MemoryLLM, stock_logprobs: list[Tensor]) -> None:
    """Without this, the two tests above could hold for a memory that never does anything."""
    write(llm, "a", random_tokens(1, 100))
    for memory in (None, Memory(session="a", mode="read_only")):
        for actual, expected in list(zip(probe(llm, memory=memory), stock_logprobs, strict=True)):
            if memory is not None or len(actual) > 1:
                assert (actual - expected).abs().max() > EFFECT


def test_two_turns_of_a_session_in_one_call_equal_two_calls(llm: MemoryLLM) -> None:
    first, second = random_tokens(1, 50), random_tokens(2, 70)
    memory = Memory(session="a")
    apart = [*run(llm, first, memory), *run(llm, second, memory)]
    expected = llm.sessions["a"]
    del llm.sessions["a"]
    together = run(llm, [first, second], memory)
    for one, other in zip(together, apart, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        torch.testing.assert_close(output_logprobs(one), output_logprobs(other), rtol=0, atol=NOISE)
    assert llm.sessions["a"].version == 2
    assert_same_session(llm.sessions["a"], expected)


def test_reads_of_one_call_see_the_turns_named_before_them(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 50))
    question, turn = random_tokens(3, 20), random_tokens(2, 60)
    read, also_write = Memory(session="a", mode="read_only"), Memory(session="a")
    early, _, late = run(llm, [question, turn, question], [read, also_write, read])
    (after,) = run(llm, question, read)
    (earlier,) = run(llm, question, Memory(session="a", mode="read_only", version=1))
    for actual, expected in [(early, earlier), (late, after)]:
        torch.testing.assert_close(
            output_logprobs(actual), output_logprobs(expected), rtol=0, atol=NOISE
        )
    assert (output_logprobs(early) - output_logprobs(late)).abs().max() > EFFECT


def test_many_sessions_at_once_equal_each_alone(llm: MemoryLLM) -> None:
    rng = random.Random(0)
    names = [f"session {index}" for index in range(24)]
    memories = [Memory(session=name) for name in names]
    turns = [
        [random_tokens(100 * turn + index, rng.randint(1, 130)) for index in range(len(names))]
        for turn in range(2)
    ]
    together = [run(llm, prompts, memories) for prompts in turns]
    llm.reset_prefix_cache()
    for index in range(0, len(names), 3):
        for prompts, outputs in zip(turns, together, strict=True):
            (alone,) = run(llm, prompts[index], Memory(session=f"{names[index]} alone"))
            assert alone.outputs[0].token_ids == outputs[index].outputs[0].token_ids
            torch.testing.assert_close(
                output_logprobs(alone), output_logprobs(outputs[index]), rtol=0, atol=NOISE
            )
        assert_same_session(llm.sessions[f"{names[index]} alone"], llm.sessions[names[index]])


def test_pending_token_is_fed_before_the_next_prompt(llm: MemoryLLM) -> None:
    first, second = random_tokens(1, 10), random_tokens(2, 12)
    memory = Memory(session="a")
    (one,) = run(llm, first, memory)
    sampled = list(one.outputs[0].token_ids)
    assert llm.sessions["a"].pending_token_ids == [sampled[-1]]
    (two,) = run(llm, second, memory)
    assert two.prompt_token_ids == second
    assert llm.sessions["a"].tokens_written == 10 + 4 + 12 + 3
    (read,) = run(llm, second, Memory(session="a", mode="read_only"))
    assert read.prompt_token_ids == second


def test_read_only_leaves_the_session_as_it_is_and_many_run_at_once(llm: MemoryLLM) -> None:
    snapshot = write(llm, "a", random_tokens(1, 90))
    before = contents(llm)
    questions = [random_tokens(seed, 3 * seed) for seed in range(2, 14)]
    read = Memory(session="a", mode="read_only")
    together = run(llm, questions, read)
    assert contents(llm) == before
    oracle = Oracle(CASE / "model", CASE / "adapter")
    for question, output in zip(questions[::4], together[::4], strict=True):
        sampled = list(output.outputs[0].token_ids)
        answer = oracle([*question, *sampled[:-1]], state=snapshot.state, writes=False)
        expected = answer.logprobs[len(question) - 1 :]
        torch.testing.assert_close(output_logprobs(output), expected, rtol=0, atol=1e-4)
    for question, output in zip(questions[::4], together[::4], strict=True):
        (alone,) = run(llm, question, read)
        torch.testing.assert_close(
            output_logprobs(alone), output_logprobs(output), rtol=0, atol=NOISE
        )


def test_read_only_and_off_create_no_session(llm: MemoryLLM) -> None:
    run(llm, [[5, 6], [5, 6], [5, 6]], [Memory(session="a", mode="read_only"), OFF, None])
    assert len(llm.sessions) == 0


def test_several_samples_of_a_read_only_request_are_all_served(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 40))
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, detokenize=False)
    (output,) = run(llm, [5, 6, 7], Memory(session="a", mode="read_only"), params)
    assert len(output.outputs) == 3


def test_deleted_session_starts_empty(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 60)
    run(llm, tokens, Memory(session="a"))
    fresh = llm.sessions["a"]
    run(llm, tokens, Memory(session="a"))
    assert llm.sessions["a"].version == 2
    del llm.sessions["a"]
    assert "a" not in llm.sessions
    run(llm, tokens, Memory(session="a"))
    assert_same_session(llm.sessions["a"], fresh)


def test_forms_of_a_prompt_are_equivalent(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 20)
    forms = [
        tokens,
        [tokens],
        TokensPrompt(prompt_token_ids=tokens),
        [TokensPrompt(prompt_token_ids=tokens)],
        {"prompt_token_ids": tokens},
        " ".join(map(word, tokens)),
    ]
    (expected,) = run(llm, tokens, Memory(session="expected"))
    for index, form in enumerate(forms):
        (output,) = run(llm, form, Memory(session=f"{index}"))
        assert output.prompt_token_ids == tokens
        torch.testing.assert_close(
            output_logprobs(output), output_logprobs(expected), rtol=0, atol=NOISE
        )
        assert_same_session(llm.sessions[f"{index}"], llm.sessions["expected"])


def test_sampling_params_of_each_prompt_stay_with_it(llm: MemoryLLM) -> None:
    """Also where prompts of one session run in a later wave than others."""
    prompts = [random_tokens(seed, 10 + seed) for seed in range(4)]
    memories = [Memory(session="a"), Memory(session="a"), None, Memory(session="b")]
    outputs = llm.generate(
        prompts,
        [greedy(count) for count in (1, 2, 3, 4)],
        memory=memories,
        lora_request=None,
        use_tqdm=False,
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4]
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert llm.sessions["a"].tokens_written == 10 + 0 + 1 + 11 + 1
    assert llm.sessions["b"].tokens_written == 13 + 3


def test_no_prompts_give_no_outputs(llm: MemoryLLM) -> None:
    assert run(llm, [], Memory(session="a")) == []
    assert len(llm.sessions) == 0


def test_chat_is_a_turn_of_the_rendered_messages(llm: MemoryLLM) -> None:
    messages = [{"role": "user", "content": "w20 w21 w22"}]
    memories = [Memory(session="a"), Memory(session="b")]
    outputs = llm.chat([messages, messages], greedy(), memory=memories, use_tqdm=False)
    rendered = [4, 20, 21, 22, 5]
    assert [output.prompt_token_ids for output in outputs] == [rendered, rendered]
    run(llm, rendered, Memory(session="expected"))
    assert_same_session(llm.sessions["a"], llm.sessions["expected"])
    llm.chat(messages, greedy(), memory=memories[0], use_tqdm=False)
    assert llm.sessions["a"].version == 2
