"""Exact-match evaluation of a backbone and its adapters on held-out facts.

An answer counts when every token of it, end of turn included, is the model's most likely one given
the expected tokens before it: exactly when greedy decoding yields the expected answer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from deltamem_vllm.demo.facts import Conversation, Kind, held_out_conversations
from deltamem_vllm.training.adapter_trainer import (
    AdapterBatch,
    ask_questions,
    greedy_matches,
    write_histories,
)
from deltamem_vllm.training.attached import AttachedMemory
from deltamem_vllm.training.demo_data import WriteMode, encode_batch
from deltamem_vllm.training.encoding import ChatEncoder

Condition = Literal[
    "full history",
    "nothing",
    "memory",
    "memory, one go",
    "another's memory",
    "empty memory",
]
"""What an answer may rest on: the history's text; only the question; a state written turn by turn
or in one go; the state of another conversation; a fresh memory that the question itself writes."""

WITHOUT_ADAPTER: tuple[Condition, ...] = ("full history", "nothing")
WITH_ADAPTER: tuple[Condition, ...] = (
    "memory",
    "memory, one go",
    "another's memory",
    "empty memory",
)
FACT_COUNTS = (1, 2, 4, 6, 8, 12)


@dataclass(frozen=True)
class Score:
    """Exact matches of one condition, with a 95 % Wilson interval."""

    adapter: str | None
    condition: Condition
    kind: Kind
    facts: int
    asked: int
    correct: int
    accuracy: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def wilson_interval(correct: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share = correct / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@torch.no_grad()
def exact_matches(
    model: PreTrainedModel,
    memory: AttachedMemory | None,
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    condition: Condition,
) -> list[bool]:
    """Whether each conversation's one question is answered exactly under `condition`."""
    found: list[bool] = []
    for start in range(0, len(conversations), 50):
        part = conversations[start : start + 50]
        if condition in WITHOUT_ADAPTER:
            found += _without_memory(model, memory, encoder, part, condition)
        else:
            assert memory is not None, "this condition needs an adapter"
            found += _from_memory(model, memory, encoder, part, condition)
    return found


def evaluate(
    model: PreTrainedModel,
    memory: AttachedMemory | None,
    encoder: ChatEncoder,
    adapter: str | None,
    count: int = 300,
    split: Literal["validation", "test"] = "test",
    seed: int = 0,
) -> list[Score]:
    """All conditions that apply, for told, overwritten and untold facts among 1 to 12."""
    conditions = WITHOUT_ADAPTER if memory is None else WITH_ADAPTER
    kinds: tuple[Kind, ...] = ("told", "overwritten", "untold")
    scores = []
    for kind in kinds:
        for facts in FACT_COUNTS:
            conversations = held_out_conversations(count, facts, kind, split, seed)
            for condition in conditions:
                found = exact_matches(model, memory, encoder, conversations, condition)
                correct, asked = sum(found), len(found)
                interval = wilson_interval(correct, asked)
                share = correct / asked
                scores.append(
                    Score(adapter, condition, kind, facts, asked, correct, share, *interval)
                )
    return scores


def table(scores: Sequence[Score]) -> str:
    """A Markdown table: one line per adapter, condition and kind, one column per count of facts."""
    lines = [
        "| adapter | answers from | asked for | " + " | ".join(map(str, FACT_COUNTS)) + " |",
        "|---" * (3 + len(FACT_COUNTS)) + "|",
    ]
    rows: dict[tuple[str, Condition, Kind], dict[int, Score]] = {}
    for score in scores:
        row = rows.setdefault((score.adapter or "-", score.condition, score.kind), {})
        row[score.facts] = score
    for (adapter, condition, kind), cells in rows.items():
        shares = [f"{s.accuracy:.2f} [{s.low:.2f}, {s.high:.2f}]" for s in cells.values()]
        lines.append(f"| {adapter} | {condition} | {kind} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _without_memory(
    model: PreTrainedModel,
    memory: AttachedMemory | None,
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    condition: Condition,
) -> list[bool]:
    rows, weights = [], []
    for conversation in conversations:
        encoded = encoder.question(conversation.questions[0])
        told = conversation.messages if condition == "full history" else ()
        prompt = [token for m in told for token in encoder.message(m)] + encoded.prompt
        rows.append(torch.tensor([*prompt, *encoded.answer]))
        weights.append(torch.tensor([0.0] * len(prompt) + encoded.weights))
    # Padding lies to the right, so that causal attention needs no mask for it.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=encoder.pad)
    weight = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
    if memory is not None:
        memory.read_enabled = False
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if memory is not None:
        memory.read_enabled = True
    return greedy_matches(model, hidden, ids, weight)


def _from_memory(
    model: PreTrainedModel,
    memory: AttachedMemory,
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    condition: Condition,
) -> list[bool]:
    mode: WriteMode = "joint" if condition in ("memory, one go", "empty memory") else "pending"
    batch: AdapterBatch = encode_batch(conversations, encoder, [mode] * len(conversations))
    write_histories(model, memory, batch)
    states = memory.states
    if condition == "another's memory":
        donors = torch.tensor([_donor(conversations, row) for row in range(len(conversations))])
        memory.load_states({i: s[donors] for i, s in states.items()})
    if condition == "empty memory":
        memory.load_states({i: torch.zeros_like(s) for i, s in states.items()})
    hidden = ask_questions(model, memory, batch, writes=condition == "empty memory")
    memory.reset()
    return greedy_matches(model, hidden, batch.question_ids, batch.question_weights)


def _donor(conversations: Sequence[Conversation], row: int) -> int:
    """The next conversation that does not tell the value that `row`'s question asks for."""
    value = conversations[row].questions[0].value
    for step in range(1, len(conversations)):
        donor = (row + step) % len(conversations)
        if all(told != value for _, told in conversations[donor].facts):
            return donor
    raise ValueError("every other conversation tells the asked value; give more conversations")
