"""Trains the demo's backbone: a Qwen3 of under a million parameters that copies facts it was told.

A training row is one conversation followed by several questions, each in an attention block of its
own: every question sees the history and itself, at the positions it would have if it were the only
one. So one history pays for several answers, rendered exactly as a served prompt.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from deltamem_vllm.demo.facts import Conversation, TrainingMix
from deltamem_vllm.errors import TrainingError
from deltamem_vllm.training.demo_data import similar_batches
from deltamem_vllm.training.encoding import (
    IGNORED_BLOCK,
    ChatEncoder,
    block_attention_mask,
    pad_rows,
    weighted_loss,
)
from deltamem_vllm.training.schedule import learning_rate_share

HISTORY_BLOCK = 0


@dataclass(frozen=True)
class BackboneTraining:
    """Everything that determines the backbone's weights, besides the generator of facts.

    Conversations tell at most `facts[0]` facts until those are learned, then `facts[1]`, and so on.
    With one fact, copying is learned; with two, which to copy, after thousands of steps or, from
    some seeds, never. With more facts before that, neither is. The learning rate is at its
    peak, after a warmup in each stage, until the last one is learned, and falls in the `settling`
    steps that follow.
    """

    facts: tuple[int, ...] = (1, 2, 4, 8, 12)
    learned: float = 0.95
    """Share of validation answers, from the full history, at which a stage is learned."""

    look_every: int = 250
    stage_steps: int = 6000
    settling: int = 2000
    batch: int = 12
    learning_rate: float = 2.5e-3
    final_share: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.02
    qk_norm_init: float = 1.7
    seed: int = 0


class PackedBatch(NamedTuple):
    """Rows of a history and its questions; all tensors are [B, T]."""

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    weights: Tensor


def backbone_config(vocabulary: int, pad: int, end: int) -> Qwen3Config:
    """The demo's architecture; head_dim 32 is the least that vLLM's CPU attention takes."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
        dtype=torch.float32,
    )


def pack(conversations: list[Conversation], encoder: ChatEncoder) -> PackedBatch:
    """Packs each conversation with its questions into one row.

    `weights[b, t]` is the loss weight of PREDICTING token t (from the token before it in the same
    block); the first token of a block has weight 0.
    """
    ids, positions, blocks, weights = [], [], [], []
    for conversation in conversations:
        row = [token for m in conversation.messages for token in encoder.message(m)]
        row_weights = [w for m in conversation.messages for w in encoder.message_weights(m)]
        length = len(row)
        row_positions, row_blocks = list(range(length)), [HISTORY_BLOCK] * length
        for number, question in enumerate(conversation.questions, start=HISTORY_BLOCK + 1):
            encoded = encoder.question(question)
            tokens = [*encoded.prompt, *encoded.answer]
            row += tokens
            row_weights += [0.0] * len(encoded.prompt) + encoded.weights
            row_positions += range(length, length + len(tokens))
            row_blocks += [number] * len(tokens)
        ids.append(row)
        positions.append(row_positions)
        blocks.append(row_blocks)
        weights.append(row_weights)
    return PackedBatch(
        ids=pad_rows(ids, encoder.pad, torch.long),
        positions=pad_rows(positions, 0, torch.long),
        blocks=pad_rows(blocks, IGNORED_BLOCK, torch.long),
        weights=pad_rows(weights, 0.0, torch.float32),
    )


def packed_loss(model: Qwen3ForCausalLM, batch: PackedBatch) -> Tensor:
    """Weighted next-token loss; the vocabulary projection runs on weighted positions only."""
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=block_attention_mask(batch.blocks, shared=HISTORY_BLOCK),
        use_cache=False,
    ).last_hidden_state
    weights = batch.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    return weighted_loss(logits, batch.ids[:, 1:][chosen], weights[chosen])


def initial_backbone(config: Qwen3Config, plan: BackboneTraining) -> Qwen3ForCausalLM:
    """Random weights; sharper q/k norms make attention learn to copy much sooner."""
    torch.manual_seed(plan.seed)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, plan.qk_norm_init)
        torch.nn.init.constant_(layer.self_attn.k_norm.weight, plan.qk_norm_init)
    return model


def train_backbone(
    encoder: ChatEncoder,
    config: Qwen3Config,
    plan: BackboneTraining,
    answered: Callable[[Qwen3ForCausalLM, int], float],
) -> Qwen3ForCausalLM:
    """Trains from random weights.

    `answered` tells what share of validation questions about so many facts the model answers.

    Raises:
        TrainingError: a stage was not learned in its steps.
    """
    model = initial_backbone(config, plan)
    rng = random.Random(plan.seed)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=plan.weight_decay,
        foreach=True,
    )

    def step(conversations: list[Conversation], share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * share
        loss = packed_loss(model.train(), pack(conversations, encoder))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    for facts in plan.facts:
        batches = _batches(rng, facts, plan.batch)
        what = f"backbone, up to {facts} facts"
        for done in tqdm(range(1, plan.stage_steps + 1), desc=what, mininterval=5.0):
            step(next(batches), min(1.0, done / plan.warmup))
            if done % plan.look_every == 0:
                share = answered(model.eval(), facts)
                tqdm.write(f"{done} steps with up to {facts} facts: {share:.3f} answered")
                if share >= plan.learned:
                    break
        else:
            raise TrainingError(f"up to {facts} facts were not learned in {plan.stage_steps} steps")
    batches = _batches(rng, plan.facts[-1], plan.batch)
    for done in tqdm(range(1, plan.settling + 1), desc="backbone, settling", mininterval=5.0):
        step(next(batches), learning_rate_share(done - 1, plan.settling, 0, plan.final_share))
    return model.eval()


def _batches(rng: random.Random, facts: int, batch: int) -> Iterator[list[Conversation]]:
    """Without end, of conversations of similar length."""
    while True:
        waiting = similar_batches(rng, TrainingMix(max_facts=facts), batch)
        while waiting:
            yield waiting.pop()


def save_backbone(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors`."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(directory, safe_serialization=True)
