"""Training writes and asks exactly as a served session does."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from deltamem_vllm.adapter import BackboneShape, load_adapter
from deltamem_vllm.demo.assets import DEMO_ADAPTERS, DemoAdapter, adapter_dir, model_dir
from deltamem_vllm.demo.facts import TrainingMix, held_out_conversations, training_conversation
from deltamem_vllm.errors import TrainingError
from deltamem_vllm.training import demo
from deltamem_vllm.training.adapter_trainer import (
    AdapterTraining,
    adapter_loss,
    ask_questions,
    train_adapter,
    write_histories,
)
from deltamem_vllm.training.attached import AttachedMemory, attach
from deltamem_vllm.training.backbone import BackboneTraining, pack, packed_loss
from deltamem_vllm.training.demo_data import WRITE_MODES, WriteMode, encode_batch, encode_history
from deltamem_vllm.training.encoding import ChatEncoder, weighted_loss
from deltamem_vllm.training.evaluate import Condition, exact_matches

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(AutoTokenizer.from_pretrained(model_dir()))


def test_encoded_messages_equal_the_chat_template(encoder: ChatEncoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    rng = random.Random(1)
    for _ in range(20):
        conversation = training_conversation(rng, TrainingMix(max_facts=6, system_share=0.5))
        messages = [message.as_dict() for message in conversation.messages]
        ids = [token for m in conversation.messages for token in encoder.message(m)]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        question = conversation.questions[0]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert prompt == encoder.question(question).prompt


@pytest.mark.parametrize("mode", WRITE_MODES)
@pytest.mark.parametrize("window", [1, 2, 9])
def test_a_window_is_shown_as_the_chat_template_renders_it(
    encoder: ChatEncoder, mode: WriteMode, window: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    (conversation,) = held_out_conversations(1, 4)
    (question,) = conversation.questions
    shown = [m for turn in [*conversation.turns()][-window:] for m in turn]
    prompt = tokenizer.apply_chat_template(
        [*(m.as_dict() for m in shown), {"role": "user", "content": question.text}],
        add_generation_prompt=True,
        return_dict=False,
    )
    history = encode_history(conversation, encoder, mode, window)
    assert [asked.prompt for asked in history.questions] == [prompt]
    assert history.chunks == encode_history(conversation, encoder, mode).chunks


@pytest.mark.parametrize("mode", WRITE_MODES)
def test_a_batch_equals_one_request_per_chunk(
    model: Qwen3ForCausalLM, encoder: ChatEncoder, mode: WriteMode
) -> None:
    """Blocks in one padded forward pass give the states and logits of separate forward passes."""
    memory = attach(model, load_adapter(adapter_dir("msw")))
    conversations = [*held_out_conversations(2, 4), *held_out_conversations(2, 2, "overwritten")]
    batch = encode_batch(conversations, encoder, [mode] * len(conversations))
    with torch.no_grad():
        write_histories(model, memory, batch)
        states = memory.states
        asked = ask_questions(model, memory, batch)
        for row, conversation in enumerate(conversations):
            history = encode_history(conversation, encoder, mode)
            memory.reset()
            memory.write_enabled = True
            for chunk in history.chunks:
                model(torch.tensor([chunk]))
            for layer, state in memory.states.items():
                torch.testing.assert_close(
                    states[layer][row], state[0], atol=TOLERANCE, rtol=TOLERANCE
                )
            memory.write_enabled = False
            (question,) = history.questions
            tokens = torch.tensor([[*question.prompt, *question.answer]])
            alone = model.base_model(tokens).last_hidden_state[0]
            torch.testing.assert_close(
                asked[row, : tokens.shape[1]], alone, atol=1e-3, rtol=TOLERANCE
            )
    memory.detach()


def test_packed_questions_are_independent_of_each_other(
    model: Qwen3ForCausalLM, encoder: ChatEncoder
) -> None:
    conversation = training_conversation(random.Random(2), TrainingMix(max_facts=6))
    together = pack([conversation], encoder)
    assert together.positions[together.blocks == 1][0] == (together.blocks == 0).sum()
    changed = together.ids.clone()
    changed[together.blocks == 1] = encoder.end
    only_second = together.weights * (together.blocks == 2)
    with torch.no_grad():
        losses = [
            packed_loss(model, together._replace(ids=ids, weights=only_second))
            for ids in (together.ids, changed)
        ]
    torch.testing.assert_close(*losses)


def test_detaching_restores_the_backbone(model: Qwen3ForCausalLM) -> None:
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        memory = attach(model, load_adapter(adapter_dir("tsw")))
        assert not torch.equal(model(tokens).logits, before)
        memory.detach()
        assert torch.equal(model(tokens).logits, before)


def test_training_lowers_the_loss_and_leaves_the_backbone(
    model: Qwen3ForCausalLM, encoder: ChatEncoder
) -> None:
    torch.manual_seed(0)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = AttachedMemory(model, load_adapter(adapter_dir("tsw")).config)
    conversations = [
        training_conversation(random.Random(i), TrainingMix(max_facts=1)) for i in range(8)
    ]
    batch = encode_batch(conversations, encoder, ["joint"] * 8)
    with torch.no_grad():
        before = adapter_loss(model, memory, batch, reply_share=0.0)
    train_adapter(
        model, memory, iter([batch] * 12), AdapterTraining(steps=12, warmup=2, reply_share=0.0)
    )
    with torch.no_grad():
        after = adapter_loss(model, memory, batch, reply_share=0.0)
    memory.detach()
    assert after < 0.7 * before
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "facts", "own"),
    [
        ("tsw", 2, "memory"),
        ("msw", 2, "memory"),
        ("ssw", 1, "memory"),
        ("ssw", 1, "memory, one go"),
    ],
)
def test_the_shipped_adapters_answer_from_the_state_alone(
    model: Qwen3ForCausalLM, encoder: ChatEncoder, name: DemoAdapter, facts: int, own: Condition
) -> None:
    memory = attach(model, load_adapter(adapter_dir(name)))
    conversations = held_out_conversations(60, facts)
    shares = {
        condition: sum(exact_matches(model, memory, encoder, conversations, condition)) / 60
        for condition in (own, "another's memory", "nothing")
    }
    memory.detach()
    assert shares[own] > 0.6
    assert shares["another's memory"] < 0.2
    assert shares["nothing"] == 0.0


def test_the_demo_is_trained_by_one_command(tmp_path: Path) -> None:
    """A few steps of each part: a checkpoint, its adapters, and their scores."""
    demo.main(["--out", str(tmp_path), "--quick"])
    shape = BackboneShape.from_dir(tmp_path / "model")
    for name in DEMO_ADAPTERS:
        made = load_adapter(tmp_path / "adapters" / name, backbone=shape)
        assert made.config == load_adapter(adapter_dir(name)).config
    scores = json.loads((tmp_path / "results.json").read_text())
    assert {score["adapter"] for score in scores} == {None, *DEMO_ADAPTERS}


def test_no_adapter_is_trained_on_a_backbone_that_did_not_learn(tmp_path: Path) -> None:
    plan = BackboneTraining(stage_steps=2, look_every=1)
    with pytest.raises(TrainingError, match="not learned from any of 3 seeds"):
        demo.make_backbone(tmp_path / "model", plan)


def test_the_loss_of_a_bf16_backbone_is_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 1000, generator=generator)).bfloat16()
    targets = torch.randint(1000, (40,), generator=generator)
    for row in range(40):
        one, target = logits[row : row + 1], targets[row : row + 1]
        expected = torch.logsumexp(one.double(), -1) - one.double()[0, target]
        loss = weighted_loss(one, target, torch.ones(1))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
