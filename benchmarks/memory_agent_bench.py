"""How does a memory do on MemoryAgentBench, beside the text itself?

    python -m benchmarks.memory_agent_bench --data Accurate_Retrieval.parquet \\
        --source eventqa_65536 --model Qwen/Qwen3-4B-Instruct-2507 --adapter ADAPTER \\
        --max-model-len 131072 --lines mab.jsonl --json mab.json

The data files are the benchmark's own (Hu et al., arXiv 2507.05257): Parquet or JSONL rows with
`context`, `questions`, `answers` (a list of accepted answers each) and `metadata.source`. A context
is cut into chunks at sentence ends, each chunk is a message to remember, all of them are written,
and text and KV cache are dropped; then every question of the context is asked, read_only. The same
questions are asked with the full context in the prompt (what does not fit is left out, oldest
first) and with nothing. Scores are exact match, match of an accepted answer within the reply, and
F1, after lower case and without punctuation and articles; the recall of EventQA (whether every
accepted answer is in the reply) is `recall`. Summaries are not scored here: their published judge
is a model. With `--lines` the same command goes on with the conditions that are not done.
"""

import json
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import parser, positive
from benchmarks.conditions import Case
from benchmarks.long_runs import Scored, add_arguments, question_template, run_benchmark

SYSTEM = "You remember what you are given, and answer questions about it."
REMEMBER = "Remember this:\n{chunk}"
QUESTION = (
    "By what you remember, answer briefly, with the answer alone and no explanation.\n\n"
    "Question: {question}\nAnswer:"
)

ANSWER_TOKENS = 50
CHUNK_WORDS = 3000
"""About 4,096 tokens, the published chunk."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def scored_cases(
    rows: Sequence[dict[str, Any]], most: int | None, template: str, chunk_words: int
) -> Iterator[Scored]:
    """Each context with its questions, and how their answers are scored.

    Args:
        rows: of the data file.
        most: questions per context; None asks all.
        template: of a question, with a place for `{question}`.
        chunk_words: words of a message.
    """
    for number, row in enumerate(rows):
        questions = [str(each) for each in row["questions"]][:most]
        accepted = [_listed(each) for each in row["answers"]][:most]
        source = str((row.get("metadata") or {}).get("source", "all"))
        case = Case(
            key=f"{source}/{number}",
            history=[
                {"role": "user", "content": REMEMBER.format(chunk=chunk)}
                for chunk in chunks(str(row["context"]), chunk_words)
            ],
            questions=[template.format(question=each) for each in questions],
            system=SYSTEM,
        )

        def grade(place: int, reply: str, accepted: Any = accepted) -> dict[str, float]:
            return scores(reply, accepted[place])

        keys = [f"{case.key}/{place}" for place in range(len(questions))]
        yield Scored(case, keys, [source] * len(questions), grade)


def chunks(text: str, words: int) -> list[str]:
    """A text in pieces of at most so many words, cut at ends of sentences where there are any."""
    pieces: list[list[str]] = [[]]
    for sentence in _SENTENCE_END.split(text):
        left = sentence.split()
        if pieces[-1] and len(pieces[-1]) + len(left) > words:
            pieces.append([])
        while len(left) > words:  # one that fits nowhere
            pieces[-1] += left[:words]
            left = left[words:]
            pieces.append([])
        pieces[-1] += left
    return [" ".join(piece) for piece in pieces if piece]


def scores(reply: str, accepted: Sequence[str]) -> dict[str, float]:
    """What a reply is worth, by metric, against the answers that are accepted.

    Each score is the best over the answers; `recall` is the share of them within the reply.
    """
    given = normal(reply)
    wanted = [normal(each) for each in accepted]
    within = [bool(each) and each in given for each in wanted]
    return {
        "exact_match": float(any(given == each for each in wanted)),
        "substring_match": float(any(within)),
        "f1": max((_f1(given.split(), each.split()) for each in wanted), default=0.0),
        "recall": sum(within) / len(within) if within else 0.0,
    }


def normal(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def load(path: Path, source: str | None) -> list[dict[str, Any]]:
    """The rows of a data file, or those of one of its sources.

    Raises:
        SystemExit: the file cannot be read, or has no such rows, or a row that is not one.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
    except ImportError:
        raise SystemExit(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"context", "questions", "answers"} <= set(row):
            raise SystemExit(
                f"{path}: rows of MemoryAgentBench have context, questions and answers; row "
                f"{number} has not"
            )
        questions, answers = row["questions"], row["answers"]
        if not (isinstance(questions, list) and isinstance(answers, list)) or (
            len(questions) != len(answers)
        ):
            raise SystemExit(f"{path}: row {number} needs as many answers as questions")
        if not isinstance(row.get("metadata") or {}, dict):
            raise SystemExit(f"{path}: row {number}: metadata is no object")
    if not rows:
        raise SystemExit(f"{path}: has no rows")
    sources = sorted({str((row.get("metadata") or {}).get("source")) for row in rows})
    chosen = [
        row for row in rows if source is None or (row.get("metadata") or {}).get("source") == source
    ]
    if not chosen:
        raise SystemExit(f"--source {source}: {path} has {', '.join(sources)}")
    return chosen


def _listed(answer: Any) -> list[str]:
    return [str(each) for each in answer] if isinstance(answer, list | tuple) else [str(answer)]


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="a Parquet or JSONL file")
    options.add_argument("--source", help="the rows of one source; default: all")
    options.add_argument("--questions", type=positive, help="per context, at most")
    options.add_argument("--contexts", type=positive, help="at most")
    options.add_argument("--chunk-words", type=positive, default=CHUNK_WORDS, help="(%(default)s)")
    options.add_argument(
        "--answer-tokens", type=positive, default=ANSWER_TOKENS, help="(%(default)s)"
    )
    options.add_argument(
        "--question-template", type=question_template, default=QUESTION, help="with {question}"
    )
    add_arguments(options)
    given = options.parse_args()
    most, contexts = given.questions, given.contexts
    if given.quick:
        most, contexts = most or 4, contexts or 2
    rows = load(given.data, given.source)[:contexts]
    scored = list(scored_cases(rows, most, given.question_template, given.chunk_words))
    settings = {
        "benchmark": "memory_agent_bench",
        "data": os.path.basename(given.data),
        "source": given.source,
        "template": given.question_template,
        "chunk_words": given.chunk_words,
    }
    run_benchmark(
        given, scored, settings, answer_tokens=given.answer_tokens, metric="substring_match"
    )


if __name__ == "__main__":
    main()
