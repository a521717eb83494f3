"""The demo: facts are told, their text and KV cache deleted, and asked for from memory alone.

Every answer comes from the real engine. For each conversation of the test split, whose asked
pairs of thing and value are held out from training, the same question is asked three ways:

- full history: the conversation and the question in one prompt, memory off;
- nothing: the question alone, memory off;
- memory: the conversation is written into a session in one request; its text is dropped and the
  prefix cache is reset; then the question alone is asked of the session, read_only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from vllm import RequestOutput, SamplingParams

from deltamem_vllm.demo.assets import DemoAdapter, adapter_dir, model_dir
from deltamem_vllm.demo.facts import Conversation, Kind, held_out_conversations
from deltamem_vllm.memory import OFF, Memory
from deltamem_vllm.offline import MemoryLLM

WEAKNESSES: Final = (
    "Weak: recall falls with the number of facts; asked for something never told, the memory "
    "sometimes invents an answer; 0.8 M parameters that know one narrow kind of dialogue, one seed."
)
"""The demo's last line."""

SHOWN: Final[tuple[DemoAdapter, ...]] = ("tsw", "msw")
"""Adapters that the demo asks. `benchmarks/recall.py` asks SSW's as well, which holds less."""

FULL, NOTHING, OTHER = "full history", "nothing", "another's memory"

GROUPS: Final[tuple[tuple[Kind, int], ...]] = (
    ("told", 1),
    ("told", 2),
    ("told", 4),
    ("told", 6),
    ("told", 8),
    ("told", 12),
    ("overwritten", 4),
    ("untold", 4),
)
"""What is asked for: the kind of fact, and how many facts its conversation tells."""

ANSWER: Final = SamplingParams(temperature=0, max_tokens=24)


@dataclass
class Cell:
    """One condition on one group of conversations."""

    asked: int = 0
    right: int = 0
    prompt_tokens: int = 0
    """Of the asking requests, all together."""

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.asked)


@dataclass
class Report:
    """All conditions on all groups, and what a conversation holds in memory."""

    cells: dict[tuple[Kind, int, str], Cell] = field(default_factory=dict)
    kv_bytes_per_token: int = 0
    state_bytes: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Accuracy by condition and group, flat."""
        return {
            f"{condition}/{kind}/{facts}".replace(" ", "_"): cell.accuracy
            for (kind, facts, condition), cell in self.cells.items()
        }


def run(conversations_per_group: int, console: Console) -> Report:
    """Ask everything of the demo model with each of its adapters; print as it goes."""
    report = Report()
    groups = {
        (kind, facts): held_out_conversations(conversations_per_group, facts, kind)
        for kind, facts in GROUPS
    }
    for name in SHOWN:
        console.print(f"[bold]Starting vLLM with the {name.upper()} adapter[/bold] ...")
        llm = MemoryLLM(
            str(model_dir()),
            adapter=str(adapter_dir(name)),
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            max_num_seqs=64,
        )
        try:
            run_adapter(llm, name, groups, report, console)
        finally:
            # Engines of one process share its process groups: one at a time.
            llm.close()
    return report


def run_adapter(
    llm: MemoryLLM,
    name: DemoAdapter,
    groups: Mapping[tuple[Kind, int], Sequence[Conversation]],
    report: Report,
    console: Console,
) -> None:
    """One adapter's part of the report; the first also asks without memory."""
    first = name == SHOWN[0]
    report.kv_bytes_per_token = kv_bytes_per_token(llm)
    if first:
        show_one(llm, groups["told", 2][0], console)
    for (kind, facts), conversations in groups.items():
        conditions = memory_conditions(llm, name, conversations)
        if first:
            conditions = {**text_conditions(llm, conversations), **conditions}
        report.cells |= {(kind, facts, key): cell for key, cell in conditions.items()}
        console.print(
            f"  {kind}, {facts} fact(s): "
            + ", ".join(f"{key} {cell.accuracy:.2f}" for key, cell in conditions.items())
        )
    snapshot = next(iter(llm.sessions.values()))
    report.state_bytes[name] = sum(state.nbytes for state in snapshot.state.values())


def text_conditions(llm: MemoryLLM, conversations: Sequence[Conversation]) -> dict[str, Cell]:
    """The base model, with the whole conversation in the prompt and with none of it."""
    full = [[*told(one), *question(one)] for one in conversations]
    alone = [question(one) for one in conversations]
    return {
        FULL: graded(conversations, ask(llm, full, OFF)),
        NOTHING: graded(conversations, ask(llm, alone, OFF)),
    }


def memory_conditions(
    llm: MemoryLLM, name: DemoAdapter, conversations: Sequence[Conversation]
) -> dict[str, Cell]:
    """Write every conversation into a session, delete text and KV, ask each session, read_only.

    As a control, each question is also asked of another conversation's session.
    """
    own = [Memory(session=one, mode="read_only") for one in write(llm, conversations)]
    alone = [question(one) for one in conversations]
    return {
        name: graded(conversations, ask(llm, alone, own)),
        f"{name}, {OTHER}": graded(conversations, ask(llm, alone, own[1:] + own[:1])),
    }


def write(llm: MemoryLLM, conversations: Sequence[Conversation]) -> list[str]:
    """Write every conversation into a new session, and forget all else; the sessions' names."""
    first = len(llm.sessions)
    names = [f"conversation {first + index}" for index in range(len(conversations))]
    llm.ingest(names, [told(one) for one in conversations], use_tqdm=False)
    llm.reset_prefix_cache()
    return names


def show_one(llm: MemoryLLM, conversation: Conversation, console: Console) -> None:
    """One conversation in full, so that a reader sees what is done."""
    (name,) = write(llm, [conversation])
    console.print("\nTold, in a request of its own:")
    for message in told(conversation):
        console.print(f"  [dim]{message['role']}:[/dim] {message['content']}")
    console.print("Text dropped, KV cache reset; only the session's state is left. Asked:")
    console.print(f"  [dim]user:[/dim] {conversation.questions[0].text}")
    (output,) = ask(llm, [question(conversation)], Memory(session=name, mode="read_only"))
    console.print(f"  [dim]with the memory:[/dim] {output.outputs[0].text.strip()}")
    right = graded([conversation], [output]).right
    (output,) = ask(llm, [question(conversation)], OFF)
    console.print(f"  [dim]without:[/dim] {output.outputs[0].text.strip()}")
    verdict = "right" if right else "wrong"
    console.print(f"  ({conversation.questions[0].answer!r} was expected: {verdict})\n")


def ask(
    llm: MemoryLLM, prompts: list[list[dict[str, str]]], memory: Memory | list[Memory]
) -> list[RequestOutput]:
    """Greedy answers, all in one batch."""
    return llm.chat(prompts, ANSWER, memory=memory, use_tqdm=False)


def graded(conversations: Sequence[Conversation], outputs: Sequence[RequestOutput]) -> Cell:
    """Exact match of the whole answer."""
    cell = Cell()
    for conversation, output in zip(conversations, outputs, strict=True):
        cell.asked += 1
        cell.right += output.outputs[0].text.strip() == conversation.questions[0].answer
        cell.prompt_tokens += len(output.prompt_token_ids or ())
    return cell


def told(conversation: Conversation) -> list[dict[str, str]]:
    return [message.as_dict() for message in conversation.messages]


def question(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": "user", "content": conversation.questions[0].text}]


def kv_bytes_per_token(llm: MemoryLLM) -> int:
    """Keys and values of one token in all layers."""
    config: Any = llm.llm_engine.vllm_config.model_config.hf_config
    return 2 * 4 * int(config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def table(report: Report) -> Table:
    """Accuracy by what was asked, and what it costs to ask."""
    result = Table(
        title="Exact answers on pairs of thing and value held out from the adapters' training"
    )
    result.add_column("asked for")
    conditions = [FULL, NOTHING, *SHOWN, *(f"{name}, {OTHER}" for name in SHOWN)]
    for condition in conditions:
        result.add_column(label(condition), justify="right")
    for kind, facts in GROUPS:
        cells = [report.cells[kind, facts, condition] for condition in conditions]
        result.add_row(row_name(kind, facts), *(f"{cell.accuracy:.2f}" for cell in cells))
    result.add_section()
    for title, value in COSTS.items():
        values = [value(report, condition) for condition in conditions]
        result.add_row(title, *(f"{number:,.0f}" for number in values))
    return result


def label(condition: str) -> str:
    return f"memory {condition.upper()}" if condition in SHOWN else condition


def row_name(kind: Kind, facts: int) -> str:
    names = {
        "told": f"a fact, of {facts} told",
        "overwritten": f"a corrected fact, of {facts}",
        "untold": f"a fact never told ({facts} others were)",
    }
    return names[kind]


def prompt_tokens(report: Report, condition: str) -> float:
    """Mean prompt tokens of an asking request, in conversations of 8 facts."""
    cell = report.cells["told", 8, condition]
    return cell.prompt_tokens / max(1, cell.asked)


def history_bytes(report: Report, condition: str) -> float:
    """What the engine holds for the history of 8 facts: KV cache, or a state."""
    if condition == NOTHING:
        return 0.0
    if condition == FULL:
        history = prompt_tokens(report, FULL) - prompt_tokens(report, NOTHING)
        return history * report.kv_bytes_per_token
    return float(report.state_bytes[condition.partition(",")[0]])


COSTS: Final[dict[str, Callable[[Report, str], float]]] = {
    "prompt tokens (8 facts)": prompt_tokens,
    "bytes held for the history": history_bytes,
}
