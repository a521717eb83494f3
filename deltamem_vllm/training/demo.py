"""Makes a demo model as the shipped one: `python -m deltamem_vllm.training.demo --out DIR`.

Trains the backbone, then one adapter of each kind on it, then evaluates on the test split. Other
CPUs and library versions round differently, so another machine makes other weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from deltamem_vllm.adapter import load_adapter, save_adapter
from deltamem_vllm.config import DeltaMemConfig, WriteGranularity
from deltamem_vllm.demo.facts import Kind, held_out_conversations
from deltamem_vllm.demo.tokenizer import build_tokenizer, save_tokenizer
from deltamem_vllm.errors import TrainingError
from deltamem_vllm.training.adapter_trainer import AdapterTraining, train_adapter
from deltamem_vllm.training.attached import AttachedMemory, attach
from deltamem_vllm.training.backbone import (
    BackboneTraining,
    backbone_config,
    save_backbone,
    train_backbone,
)
from deltamem_vllm.training.demo_data import AdapterData, adapter_batches
from deltamem_vllm.training.encoding import ChatEncoder
from deltamem_vllm.training.evaluate import Score, evaluate, exact_matches, table

VOCABULARY = 1300
"""The least at which every value of the demo is one token."""

SEEDS = 3
"""From some random weights the backbone does not learn: how many to try."""

QUICK_STEPS = 4
"""Of each part, and conversations per cell, where only the way is tried."""


@dataclass(frozen=True)
class Stage:
    """A run of the trainer that starts from the stage before it."""

    data: AdapterData
    training: AdapterTraining


@dataclass(frozen=True)
class AdapterPlan:
    """One shipped adapter."""

    config: DeltaMemConfig
    stages: tuple[Stage, ...]
    seed: int = 0


def _config(state_heads: int, written: WriteGranularity = "token") -> DeltaMemConfig:
    """Rank 8 on q and o. `no_lambda` keeps what a write does not replace: under the standard rule
    each write fades the rows it touches, and a second fact was hardly ever learned."""
    return DeltaMemConfig(
        rank=8,
        alpha=16.0,
        num_state_heads=state_heads,
        state_update_mode="no_lambda",
        delta_heads=("q", "o"),
        output_init="random",
        # Output weights of standard deviation 0.3; at 0.05 learning is far slower.
        online_gain=1.47 * state_heads**0.5,
        beta_bias_init=-1.0,
        memory_write_granularity=written,
    )


def _first(
    max_facts: int, hold: float, ramp_end: float, untold: float, reply_share: float
) -> Stage:
    """One fact until it is learned, then more and more."""
    return Stage(
        AdapterData(
            steps=1200,
            max_facts=max_facts,
            hold_share=hold,
            ramp_end=ramp_end,
            untold_share=untold,
            overwrite_share=0.2,
            foreign_value_share=0.0,
        ),
        AdapterTraining(steps=1200, reply_share=reply_share),
    )


def _further(
    steps: int,
    max_facts: int,
    untold: float,
    learning_rate: float,
    reply_share: float,
    seed: int,
    overwrite: float = 0.2,
    foreign: float = 0.0,
) -> Stage:
    """All counts of facts from the beginning."""
    return Stage(
        AdapterData(
            steps=steps,
            max_facts=max_facts,
            hold_share=0.0,
            ramp_end=0.01,
            untold_share=untold,
            overwrite_share=overwrite,
            foreign_value_share=foreign,
            seed=seed,
        ),
        AdapterTraining(
            steps=steps, learning_rate=learning_rate, reply_share=reply_share, seed=seed
        ),
    )


def _generalising(
    steps: int, max_facts: int, learning_rate: float, overwrite: float, seed: int
) -> Stage:
    """Many untold questions, and values of other families.

    The stages before leave an adapter that recalls pairs held out from training much worse than
    trained ones, and that invents answers, since it was rarely asked for anything untold. Values
    that their slot cannot suggest make the memory carry them.
    """
    return _further(
        steps,
        max_facts,
        untold=0.25,
        learning_rate=learning_rate,
        reply_share=0.02,
        seed=seed,
        overwrite=overwrite,
        foreign=0.15,
    )


def _beside_a_window(stage: Stage) -> Stage:
    """The same, but half of the questions come with the conversation's last turns as text, and
    none writes.

    An adapter that was only ever asked with an empty prompt recalls less with a window beside it.
    """
    return Stage(
        replace(stage.data, window_share=0.5),
        replace(stage.training, writing_questions_share=0.0),
    )


def _in_one_go(
    steps: int,
    seed: int,
    values: int | None = None,
    max_facts: int = 1,
    untold: float = 0.0,
    learning_rate: float = 1e-2,
    final_share: float = 0.3,
) -> Stage:
    """For an adapter that writes messages: few values at first, histories written in one go.

    In the mean of a message's tokens a value is a tenth. Among all values the loss stays at that of
    guessing for hundreds of steps; two are told apart within 150, and from there more are learned.
    From the beginning with half of the histories written turn by turn, a step took several times as
    long and taught far less; `_by_turns` comes after.
    """
    stage = _further(
        steps, max_facts, untold, learning_rate, reply_share=0.0, seed=seed, overwrite=0.0
    )
    return Stage(
        replace(stage.data, values=values, modes=(1, 0, 0)),
        replace(stage.training, final_share=final_share, writing_questions_share=0.0),
    )


def _by_turns(stage: Stage) -> Stage:
    """The same, but two of three histories are written turn by turn, with replies token by token.

    An adapter that learned from histories written in one go alone lets the tokens of a reply fade
    what the message before it wrote.
    """
    return replace(stage, data=replace(stage.data, modes=(1, 0, 2)))


ADAPTERS = {
    "tsw": AdapterPlan(
        _config(1),
        (
            _first(max_facts=8, hold=0.25, ramp_end=0.8, untold=0.12, reply_share=0.1),
            _further(700, 10, untold=0.08, learning_rate=6e-3, reply_share=0.05, seed=1),
            _further(750, 13, untold=0.06, learning_rate=8e-3, reply_share=0.02, seed=2),
            _generalising(1500, 13, learning_rate=5e-3, overwrite=0.25, seed=3),
            _beside_a_window(_generalising(600, 13, learning_rate=4e-3, overwrite=0.3, seed=4)),
            _further(
                1500,
                6,
                untold=0.08,
                learning_rate=1e-2,
                reply_share=0.02,
                seed=5,
                overwrite=0.25,
                foreign=0.1,
            ),
            _beside_a_window(_generalising(1000, 8, learning_rate=8e-3, overwrite=0.3, seed=6)),
            _beside_a_window(_generalising(1000, 8, learning_rate=8e-3, overwrite=0.5, seed=7)),
        ),
    ),
    "msw": AdapterPlan(
        _config(4),
        (
            _first(max_facts=10, hold=0.1, ramp_end=0.6, untold=0.1, reply_share=0.05),
            _further(
                750, 14, untold=0.08, learning_rate=8e-3, reply_share=0.02, seed=2, overwrite=0.25
            ),
            _generalising(1500, 14, learning_rate=5e-3, overwrite=0.3, seed=3),
            _beside_a_window(_generalising(600, 14, learning_rate=4e-3, overwrite=0.4, seed=4)),
        ),
    ),
    "ssw": AdapterPlan(
        _config(1, "message_mean"),
        (
            _in_one_go(350, seed=0, values=2),
            _in_one_go(250, seed=1, values=8),
            _in_one_go(1000, seed=2),
            _in_one_go(700, seed=3, max_facts=2, untold=0.2, learning_rate=5e-3, final_share=0.05),
            _in_one_go(700, seed=4, max_facts=2, untold=0.2, final_share=0.03),
            _in_one_go(400, seed=5, values=3, max_facts=4, untold=0.1),
            _in_one_go(800, seed=6, max_facts=4, untold=0.2, final_share=0.03),
            _by_turns(_in_one_go(300, seed=7, learning_rate=5e-3)),
            _by_turns(
                _in_one_go(
                    600, seed=8, max_facts=2, untold=0.2, learning_rate=6e-3, final_share=0.03
                )
            ),
        ),
    ),
}


def quick(plan: AdapterPlan) -> AdapterPlan:
    """The plan with a few steps a stage."""
    stages = tuple(
        Stage(replace(stage.data, steps=QUICK_STEPS), replace(stage.training, steps=QUICK_STEPS))
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def load_backbone(directory: Path) -> tuple[Qwen3ForCausalLM, ChatEncoder]:
    """The trained backbone and the encoder of its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(directory))
    return model.eval(), ChatEncoder(tokenizer)


def make_backbone(directory: Path, plan: BackboneTraining) -> None:
    """Trains the tokenizer and the backbone into `directory`.

    Raises:
        TrainingError: from none of the seeds did it learn to answer from its prompt.
    """
    tokenizer = build_tokenizer(VOCABULARY)
    save_tokenizer(tokenizer, directory)
    encoder = ChatEncoder(tokenizer)
    config = backbone_config(len(tokenizer), encoder.pad, encoder.end)
    kinds: tuple[Kind, ...] = ("told", "overwritten")

    def answered(model: Qwen3ForCausalLM, facts: int) -> float:
        asked = [
            c for kind in kinds for c in held_out_conversations(100, facts, kind, "validation")
        ]
        right = exact_matches(model, None, encoder, asked, "full history")
        return sum(right) / len(right)

    for seed in range(plan.seed, plan.seed + SEEDS):
        try:
            trained = train_backbone(encoder, config, replace(plan, seed=seed), answered)
        except TrainingError as error:
            tqdm.write(f"seed {seed}: {error}")
        else:
            save_backbone(trained, directory)
            return
    raise TrainingError(f"the backbone was not learned from any of {SEEDS} seeds")


def make_adapter(backbone: Path, directory: Path, plan: AdapterPlan) -> None:
    """Trains one adapter on a trained backbone into `directory`."""
    model, encoder = load_backbone(backbone)
    torch.manual_seed(plan.seed)
    memory = AttachedMemory(model, plan.config)

    def save(_: int) -> None:
        save_adapter(memory.adapter(), directory, overwrite=True)

    for stage in plan.stages:
        train_adapter(model, memory, adapter_batches(stage.data, encoder), stage.training, save)
    save(0)


def evaluate_all(out: Path, count: int) -> list[Score]:
    """The backbone alone, then each adapter that is in `out`, on the test split."""
    model, encoder = load_backbone(out / "model")
    scores = evaluate(model, None, encoder, None, count)
    for name in ADAPTERS:
        if (out / "adapters" / name).is_dir():
            memory = attach(model, load_adapter(out / "adapters" / name))
            scores += evaluate(model, memory, encoder, name, count)
            memory.detach()
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deltamem_vllm.training.demo")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and adapters/")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["backbone", *ADAPTERS, "evaluate"],
        default=["backbone", *ADAPTERS, "evaluate"],
        help="parts to make; adapters need the backbone in --out",
    )
    parser.add_argument("--count", type=int, default=300, help="test conversations per cell")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of each part: tries the way, not the model",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out: Path = options.out
    backbone = BackboneTraining()
    if options.quick:
        # Every stage counts as learned at its first look.
        backbone = replace(backbone, learned=0.0, look_every=QUICK_STEPS, settling=QUICK_STEPS)
    if "backbone" in options.only:
        try:
            make_backbone(out / "model", backbone)
        except TrainingError as error:
            sys.exit(str(error))
    for name, plan in ADAPTERS.items():
        if name in options.only:
            make_adapter(
                out / "model", out / "adapters" / name, quick(plan) if options.quick else plan
            )
    if "evaluate" in options.only:
        scores = evaluate_all(out, QUICK_STEPS if options.quick else options.count)
        (out / "results.json").write_text(json.dumps([s.as_dict() for s in scores], indent=1))
        print(table(scores))


if __name__ == "__main__":
    main()
