"""An adapter that writes by messages is trained as the engine writes: against the definition."""

import random
from itertools import repeat
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from deltamem_vllm.adapter import Adapter, load_adapter, save_adapter
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.demo.facts import Conversation, TrainingMix, question, training_conversation
from deltamem_vllm.demo.vocabulary import SLOTS
from deltamem_vllm.training.adapter_trainer import (
    AdapterTraining,
    ask_questions,
    greedy_matches,
    train_adapter,
    write_histories,
)
from deltamem_vllm.training.attached import AttachedMemory, attach
from deltamem_vllm.training.demo_data import WRITE_MODES, WriteMode, encode_batch, encode_history
from deltamem_vllm.training.encoding import ChatEncoder, SpanLayout
from tests.oracle import Oracle, Prompt

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights, written by messages; what they recall does not matter here."""
    shipped = load_adapter(adapter_dir("msw"))
    config = shipped.config.model_copy(update={"memory_write_granularity": "message_mean"})
    folder = tmp_path_factory.mktemp("ssw")
    return save_adapter(Adapter.from_tensors(config, shipped.tensors), folder / "adapter")


def prompts_of(layout: SpanLayout, chunks: list[list[int]]) -> list[Prompt]:
    """The chunks' prompts, as the oracle takes them."""
    found, start = [], 0
    for chunk in chunks:
        segments = layout.segments[start : start + len(chunk)]
        places = layout.spans[start : start + len(chunk)]
        (prompt,) = {s for s in segments if segments.count(s) > 1}
        begin = segments.index(prompt)
        end = begin + segments.count(prompt)
        spans = []
        for number in range(max(places[begin:end]) + 1):
            at = [i for i in range(begin, end) if places[i] == number]
            assert at == list(range(at[0], at[-1] + 1))
            spans.append((at[0], at[-1] + 1))
        found.append(Prompt(begin, end, spans))
        start += len(chunk)
    return found


@pytest.mark.parametrize("mode", WRITE_MODES)
def test_a_batch_writes_what_the_engine_writes(adapter: Path, mode: WriteMode) -> None:
    model = Qwen3ForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model_dir()))
    memory, oracle = attach(model, load_adapter(adapter)), Oracle(model_dir(), adapter)
    rng, mix = random.Random(4), TrainingMix(max_facts=4, system_share=0.5, questions=1)
    conversations = [training_conversation(rng, mix) for _ in range(6)]
    conversations = [c for c in conversations if c.messages]
    batch = encode_batch(conversations, encoder, [mode] * len(conversations))
    with torch.no_grad():
        write_histories(model, memory, batch)
        states = memory.states
        asked = {w: ask_questions(model, memory, batch, writes=w) for w in (False, True)}
        for row, conversation in enumerate(conversations):
            history = encode_history(conversation, encoder, mode)
            assert history.layout is not None
            state = None
            for chunk, prompt in zip(
                history.chunks, prompts_of(history.layout, history.chunks), strict=True
            ):
                state = oracle(chunk, state=state, prompt=prompt).state
            assert state is not None
            for layer, written in states.items():
                expected = state[f"model.layers.{layer}.self_attn"]
                torch.testing.assert_close(written[row], expected, atol=TOLERANCE, rtol=TOLERANCE)
            (question,) = history.questions
            tokens = [*question.prompt, *question.answer]
            for writes, hidden in asked.items():
                assert question.layout is not None
                (prompt,) = prompts_of(question.layout, [tokens])
                answer = oracle(
                    tokens, state=state, writes=writes, prompt=prompt if writes else None
                )
                logits = model.get_output_embeddings()(hidden[row, : len(tokens)])
                torch.testing.assert_close(
                    torch.log_softmax(logits, -1), answer.logprobs, atol=2e-3, rtol=TOLERANCE
                )
    memory.detach()


def test_a_batch_that_tells_nothing_leaves_the_memory_empty(adapter: Path) -> None:
    """Batches are of similar length, so all of a batch's conversations may be without a message."""
    model = Qwen3ForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model_dir()))
    memory = attach(model, load_adapter(adapter))
    asked = question(random.Random(0), SLOTS[0], None, "untold")
    nothing = [Conversation((), (asked,), ()) for _ in WRITE_MODES]
    batch = encode_batch(nothing, encoder, WRITE_MODES)
    with torch.no_grad():
        write_histories(model, memory, batch)
        assert memory.states
        assert all(not state.any() for state in memory.states.values())
        answers = ask_questions(model, memory, batch)
    assert answers.isfinite().all()


def test_what_is_written_by_messages_can_be_learned_by_heart(adapter: Path) -> None:
    """Gradients reach what a message wrote, from the answer that only the state can give."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model_dir()))
    memory = AttachedMemory(model, load_adapter(adapter).config)
    rng = random.Random(0)
    mix = TrainingMix(max_facts=1, overwrite_share=0.0, untold_share=0.0, questions=1)
    drawn = [training_conversation(rng, mix) for _ in range(8)]
    conversations = [one for one in drawn if one.facts]
    batch = encode_batch(conversations, encoder, ["joint"] * len(conversations))
    plan = AdapterTraining(
        steps=50, warmup=5, reply_share=0.0, writing_questions_share=0.0, final_share=0.2
    )
    train_adapter(model, memory, repeat(batch), plan)
    with torch.no_grad():
        write_histories(model, memory, batch)
        own = ask_questions(model, memory, batch)
        memory.load_states({})
        empty = ask_questions(model, memory, batch)
    memory.detach()
    right = [
        sum(greedy_matches(model, hidden, batch.question_ids, batch.question_weights))
        for hidden in (own, empty)
    ]
    assert right == [len(conversations), 0]
