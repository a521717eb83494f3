"""What does `share_prefix` win back of a system prompt that all sessions have? What does it do to
recall?

    python -m benchmarks.shared_prefix
    python -m benchmarks.shared_prefix --quick --json FILE

The demo model, in this process, with prefix caching. Two questions:

1. Sessions that hold different facts take a turn behind one long system prompt, one after another,
   each kind from an empty cache: with `share_prefix`, without, and with memory off, which is what
   stock vLLM would share. `<kind>_computed` is how many prompt tokens a session's turn computes,
   `<kind>_turn` the median CPU time of a turn of one token over that of a turn without
   `share_prefix`. The first session of each round is left out: it fills the cache. (First turns of
   new sessions share without being told to: their memories are equal, all empty.)
2. Facts are told behind a system prompt, as the first turn of a session; text and KV cache are
   dropped, and the question alone is asked behind the same system prompt, read_only.
   `recall_<facts>_<kind>` is the share of exact answers: without any system prompt, behind one that
   is written with the rest, and behind one that is shared and not written. `recall_<facts>_text`
   has the conversation itself behind the system prompt, and memory off: what such a prompt does to
   the model.

How to read it: tokens are exact, times of a busy machine are not. One in ten of the conversations
that the demo model was trained on has a system prompt, a short one: compare kinds, not models.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    available_cores,
    console,
    environment,
    int_list,
    parser,
    progress,
    write_json,
)
from benchmarks.engines import prepare_environment

SHARED, WRITTEN, OFF, TEXT, BARE = "shared", "written", "off", "text", "bare"
BLOCK: Final = 32
RULES: Final = (
    "Be kind.",
    "Answer in one sentence.",
    "Say what you know and no more.",
    "If you do not know, say so.",
    "Do not ask for a name.",
)


class Turn(NamedTuple):
    """A session's turn."""

    computed: int
    """Prompt tokens that were not in the cache, pending ones left out."""

    seconds: float
    """Of CPU time."""


def system_prompt(llm: Any, tokens: int) -> list[dict[str, str]]:
    """A system message of about so many tokens; none of 0."""
    if not tokens:
        return []
    tokenizer, text = llm.get_tokenizer(), "You are a helpful assistant."
    number = 0
    while len(tokenizer.encode(text)) < tokens:
        number += 1
        text += f" Rule {number}: {RULES[number % len(RULES)]}"
    return [{"role": "system", "content": text}]


def memory_of(kind: str, session: str, **fields: Any) -> Any:
    """What a kind of turn says about its memory."""
    from deltamem_vllm import Memory

    if kind in (OFF, TEXT):
        return Memory(mode="off")
    return Memory(session=session, share_prefix=kind == SHARED, **fields)


def measure_turns(llm: Any, system: list[dict[str, str]], sessions: int, name: str) -> Any:
    """One round: kind -> the second turns of all its sessions."""
    from vllm import SamplingParams

    one_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    turns: dict[str, list[Turn]] = {}
    for kind in (SHARED, WRITTEN, OFF):
        memories = [memory_of(kind, f"{name} {kind} {number}") for number in range(sessions)]
        told = [
            [{"role": "user", "content": f"My lucky number is {number}."}]
            for number in range(sessions)
        ]
        llm.chat(told, one_token, memory=memories, use_tqdm=False)
        llm.reset_prefix_cache()
        turns[kind] = []
        for number, memory in enumerate(memories):
            messages = [*system, {"role": "user", "content": f"My lucky color is {number}."}]
            begin = time.process_time()
            (output,) = llm.chat(messages, one_token, memory=memory, use_tqdm=False)
            seconds = time.process_time() - begin
            computed = len(output.prompt_token_ids) - output.num_cached_tokens
            turns[kind].append(Turn(computed, seconds))
    return turns


def measure_recall(
    llm: Any, facts: int, questions: int, system: list[dict[str, str]]
) -> dict[str, float]:
    """Kind -> exact answers of all questions, as a share."""
    from vllm import SamplingParams

    from deltamem_vllm.demo.facts import held_out_conversations
    from deltamem_vllm.demo.run import ask, graded, question, told

    conversations = held_out_conversations(questions, facts, "told")
    found = {}
    for kind in (BARE, WRITTEN, SHARED, TEXT):
        before = [] if kind == BARE else system
        names = [f"recall {facts} {kind} {number}" for number in range(questions)]
        asked = [[*before, *question(one)] for one in conversations]
        if kind == TEXT:
            asked = [[*before, *told(one), *question(one)] for one in conversations]
        else:
            llm.chat(
                [[*before, *told(one)] for one in conversations],
                SamplingParams(temperature=0, max_tokens=1),
                memory=[memory_of(kind, name) for name in names],
                add_generation_prompt=False,
                use_tqdm=False,
            )
        llm.reset_prefix_cache()
        memories = [memory_of(kind, name, mode="read_only") for name in names]
        found[kind] = graded(conversations, ask(llm, asked, memories)).accuracy
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sessions", type=int, default=12, help="of a round")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--system", type=int, default=1024, help="tokens of the shared prompt")
    arguments.add_argument("--facts", type=int_list, default=(1, 4), help="told, e.g. 1,4")
    arguments.add_argument("--questions", type=int, default=200, help="of a number of facts")
    arguments.add_argument("--recall-system", type=int, default=64, help="tokens, for recall")
    arguments.add_argument("--threads", type=int, default=available_cores())
    asked = arguments.parse_args()
    if asked.quick:
        asked.sessions, asked.rounds, asked.questions, asked.facts = 3, 1, 10, (1,)

    prepare_environment(asked.threads, kv_cache_gib=1)
    from deltamem_vllm import MemoryLLM
    from deltamem_vllm.demo.assets import adapter_dir, model_dir

    described = environment(
        **{name: value for name, value in vars(asked).items() if name != "json"}, dtype="float32"
    )
    llm = MemoryLLM(
        str(model_dir()),
        adapter=str(adapter_dir()),
        dtype="float32",
        max_model_len=2048,
        block_size=BLOCK,
        max_num_seqs=64,
        enforce_eager=True,
    )
    samples: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    try:
        system = system_prompt(llm, asked.system)
        measure_turns(llm, system, 2, "warm-up")
        for number in range(asked.rounds):
            progress.print(f"round {number + 1} of {asked.rounds}")
            turns = measure_turns(llm, system, asked.sessions, f"round {number}")
            samples += [
                {"round": number, "kind": kind, "session": session, **turn._asdict()}
                for kind, some in turns.items()
                for session, turn in enumerate(some)
            ]
        for facts in asked.facts:
            progress.print(f"recall, {facts} fact(s)")
            behind = system_prompt(llm, asked.recall_system)
            for kind, share in measure_recall(llm, facts, asked.questions, behind).items():
                summary[f"recall_{facts}_{kind}"] = share
    finally:
        llm.close()
    later = [one for one in samples if one["session"]]
    by_kind = {
        kind: [one for one in later if one["kind"] == kind] for kind in (SHARED, WRITTEN, OFF)
    }
    base = median(one["seconds"] for one in by_kind[WRITTEN])
    for kind, some in by_kind.items():
        summary[f"{kind}_computed"] = sum(one["computed"] for one in some) / len(some)
        summary[f"{kind}_turn"] = median(one["seconds"] for one in some) / base
    console.print(costs_table(summary, asked.system))
    console.print(recall_table(summary, asked.facts, asked.recall_system))
    if asked.json:
        write_json(asked.json, described, samples, summary)


def costs_table(summary: dict[str, float], tokens: int) -> Table:
    """What a session's turn costs."""
    table = Table(title=f"A turn of a session, behind {tokens} tokens that all sessions have")
    for column in ("", "tokens computed", "CPU time, over that of written"):
        table.add_column(column, justify="right" if column else "left")
    for kind, label in ((WRITTEN, "written"), (SHARED, "share_prefix"), (OFF, "memory off")):
        computed, turn = summary[f"{kind}_computed"], summary[f"{kind}_turn"]
        table.add_row(label, f"{computed:,.0f}", f"{turn:.2f}")
    return table


def recall_table(summary: dict[str, float], facts: tuple[int, ...], tokens: int) -> Table:
    """Exact answers from memory alone."""
    labels = {
        BARE: "no system prompt",
        WRITTEN: f"{tokens} tokens, written",
        SHARED: f"{tokens} tokens, share_prefix",
        TEXT: f"{tokens} tokens, all as text",
    }
    table = Table(title="Exact answers from memory alone")
    table.add_column("facts told")
    for label in labels.values():
        table.add_column(label, justify="right")
    for count in facts:
        table.add_row(str(count), *(f"{summary[f'recall_{count}_{kind}']:.2f}" for kind in labels))
    return table


if __name__ == "__main__":
    main()
