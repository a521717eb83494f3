"""How much of LoCoMo's long conversations does a memory answer, beside the text itself?

    python -m benchmarks.locomo --data locomo10.json --model Qwen/Qwen3-4B-Instruct-2507 \\
        --adapter ADAPTER --max-model-len 32768 --lines locomo.jsonl --json locomo.json

The data file is LoCoMo's own (snap-research/locomo, CC BY-NC 4.0): ten conversations of about 600
turns, questions in five categories. Each conversation is written into a memory, a message per
session with its date, and its text and KV cache are dropped; then every question is asked of the
memory, read_only. The same questions are asked with the full history in the prompt (what does not
fit into the model's context is left out, oldest first), with nothing, with a window and with
retrieved sessions. Scores are LoCoMo's (`benchmarks/locomo_protocol.py`), categories 1 to 4 unless
said; intervals come from resampling whole conversations, of which there are only ten. With
`--lines` the same command goes on with the conditions that are not done.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import locomo_protocol as protocol
from benchmarks.common import int_list, parser, positive
from benchmarks.conditions import Case
from benchmarks.long_runs import Scored, add_arguments, question_template, run_benchmark

ANSWER_TOKENS = 50


def history_of(conversation: dict[str, Any], by_turn: bool = False) -> list[dict[str, str]]:
    """A conversation as messages: one per session with its date, or one per turn."""
    numbers = sorted(
        int(name.removeprefix("session_"))
        for name in conversation
        if name.startswith("session_") and name.removeprefix("session_").isdecimal()
    )
    messages = []
    for number in numbers:
        date = conversation.get(f"session_{number}_date_time", "")
        turns = [_said(turn) for turn in conversation[f"session_{number}"]]
        for text in turns if by_turn else ["\n".join(turns)]:
            if text:
                messages.append({"role": "user", "content": f"Conversation of {date}:\n{text}"})
    return messages


def _said(turn: dict[str, Any]) -> str:
    shown = turn.get("blip_caption")
    image = f" [shares a picture: {shown}]" if shown else ""
    return f"{turn['speaker']}: {turn['text']}{image}"


def scored_cases(
    samples: Sequence[dict[str, Any]],
    categories: Sequence[int],
    most: int | None,
    template: str,
    by_turn: bool,
) -> Iterator[Scored]:
    """Each conversation with its questions, and how their answers are scored.

    Args:
        samples: of the data file.
        categories: of the questions that are asked.
        most: questions per conversation; None asks all.
        template: of a question, see `locomo_protocol.asked`.
        by_turn: a message per turn instead of one per session.
    """
    for sample in samples:
        chosen = [
            (f"{sample['sample_id']}/{number}", each)
            for number, each in enumerate(sample["qa"])
            if int(each["category"]) in categories
        ][:most]
        if not chosen:
            continue
        questions = [protocol.asked(each, key, template) for key, each in chosen]
        case = Case(
            key=str(sample["sample_id"]),
            history=history_of(sample["conversation"], by_turn),
            questions=[one.text for one in questions],
            system=protocol.SYSTEM,
        )

        def grade(
            place: int,
            reply: str,
            chosen: Any = chosen,
            questions: Any = questions,
        ) -> dict[str, float]:
            answer = protocol.cleaned(reply, questions[place])
            return {"f1": protocol.score(chosen[place][1], answer)}

        labels = [protocol.CATEGORIES[one.category] for one in questions]
        yield Scored(case, [key for key, _ in chosen], labels, grade)


def load(path: Path) -> list[dict[str, Any]]:
    """The data file's conversations.

    Raises:
        SystemExit: it is not LoCoMo's.
    """
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        if all({"sample_id", "conversation", "qa"} <= set(sample) for sample in samples):
            return list(samples)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: cannot be read as LoCoMo's data: {error}") from None
    raise SystemExit(f"{path}: each conversation of LoCoMo has sample_id, conversation and qa")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="locomo10.json")
    options.add_argument(
        "--categories", type=int_list, default=(1, 2, 3, 4), help="of 1 to 5 (1,2,3,4)"
    )
    options.add_argument("--questions", type=positive, help="per conversation, at most")
    options.add_argument("--conversations", type=positive, help="at most")
    options.add_argument("--by-turn", action="store_true", help="a message per turn, not session")
    options.add_argument(
        "--question-template", type=question_template, default=protocol.QUESTION,
        help="with a place for {question}",
    )  # fmt: skip
    add_arguments(options)
    given = options.parse_args()
    categories = list(given.categories)
    if unknown := [each for each in categories if each not in protocol.CATEGORIES]:
        options.error(f"--categories: no {', '.join(map(str, unknown))}; LoCoMo has 1 to 5")
    most, conversations = given.questions, given.conversations
    if given.quick:
        most, conversations = most or 4, conversations or 2
    scored = list(
        scored_cases(
            load(given.data)[:conversations],
            categories,
            most,
            given.question_template,
            given.by_turn,
        )
    )
    settings = {
        "benchmark": "locomo",
        "data": os.path.basename(given.data),
        "categories": categories,
        "template": given.question_template,
        "by_turn": given.by_turn,
    }
    run_benchmark(given, scored, settings, answer_tokens=ANSWER_TOKENS, metric="f1")


if __name__ == "__main__":
    main()
