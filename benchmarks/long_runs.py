"""Question sets over long histories: asked under conditions, scored, kept, and summed up."""

import argparse
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common import console, environment, positive, progress, write_json
from benchmarks.conditions import CONDITIONS, FROM_MEMORY, Case, Condition, Ways, answers, write
from benchmarks.records import Records, bootstrap

ALL = "all"
"""The label of every question."""


@dataclass(frozen=True)
class Scored:
    """A case with what its answers are worth."""

    case: Case
    keys: Sequence[str]
    """One per question."""

    labels: Sequence[str]
    """What kind of question each is."""

    grade: Callable[[int, str], dict[str, float]]
    """Scores, by metric, of a reply to the question at a place."""

    answer_tokens: int | None = None
    """The most tokens of an answer; None takes the benchmark's."""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Arguments of every such benchmark."""
    options.add_argument("--model", help="folder or Hub id; default: the demo model, for a try")
    options.add_argument("--adapter", help="folder or Hub id of its adapter")
    options.add_argument("--conditions", default="full,nothing,memory", help="(%(default)s)")
    options.add_argument("--max-model-len", type=positive, default=2048, help="(%(default)s)")
    options.add_argument("--dtype", default="auto", help="as of vllm serve (%(default)s)")
    options.add_argument("--eager", action="store_true", help="compile nothing: starts sooner")
    options.add_argument("--segment-tokens", type=positive, help="written at once, as of an ingest")
    options.add_argument("--window", type=positive, default=4, help="messages (%(default)s)")
    options.add_argument("--retrieved", type=positive, default=2, help="turns (%(default)s)")
    options.add_argument("--lines", type=Path, metavar="FILE", help="keep results, and go on")


def question_template(text: str) -> str:
    """An argparse type: a text with a place for `{question}` and no other.

    Raises:
        argparse.ArgumentTypeError: it has none, or others.
    """
    try:
        asked = [text.format(question=question) for question in ("one", "another")]
    except (KeyError, IndexError, ValueError):
        asked = []
    if len(set(asked)) < 2:
        raise argparse.ArgumentTypeError("expected a text with {question} and no other braces")
    return text


def run_benchmark(
    given: argparse.Namespace,
    scored: Sequence[Scored],
    settings: dict[str, Any],
    *,
    answer_tokens: int,
    metric: str,
) -> None:
    """Ask everything that has no result yet, print the table, and write the JSON.

    Args:
        given: parsed `add_arguments` and `data`, the file of the cases, with `json` of
            `benchmarks.common.parser`.
        scored: the cases.
        settings: of the benchmark, which decide its results.
        answer_tokens: the most tokens of an answer.
        metric: that the table shows.

    Raises:
        SystemExit: there is nothing to ask, or an argument is not valid.
    """
    conditions = _conditions(given.conditions)
    if not scored:
        raise SystemExit("no question is left to ask")
    if "other" in conditions and len(scored) < 2:
        raise SystemExit("--conditions other: takes two conversations at least")
    model, adapter = _model(given)
    settings = {
        **settings,
        "model": os.path.basename(model) if os.path.isdir(model) else model,
        "adapter": os.path.basename(adapter) if os.path.isdir(adapter) else adapter,
        "max_model_len": given.max_model_len,
        "window": given.window,
        "retrieved": given.retrieved,
        "segment_tokens": given.segment_tokens,
        "answer_tokens": answer_tokens,
        "dtype": given.dtype,
        **_fingerprints(given.data, adapter),
    }
    where = environment(**settings)
    records = Records(given.lines or Path(os.devnull), settings)
    todo = [
        condition
        for condition in conditions
        if any(f"{condition}|{key}" not in records for one in scored for key in one.keys)
    ]
    if todo:
        llm = _engine(model, adapter, given)
        try:
            _ask(llm, todo, scored, records, given, answer_tokens)
        finally:
            llm.close()
    _report(given, where, records, conditions, metric)


def _ask(
    llm: Any,
    conditions: Sequence[Condition],
    scored: Sequence[Scored],
    records: Records,
    given: argparse.Namespace,
    answer_tokens: int,
) -> None:
    cases = [one.case for one in scored]
    most = max(one.answer_tokens or answer_tokens for one in scored)
    ways = Ways(
        window=given.window,
        retrieved=given.retrieved,
        max_tokens=most,
        max_prompt=given.max_model_len - most - 1,
        segment_tokens=given.segment_tokens,
    )
    sessions: list[str] = []
    for condition in conditions:
        begin = time.perf_counter()
        if condition in FROM_MEMORY and not sessions:
            sessions = write(llm, cases, ways)
            progress.print(f"written in {time.perf_counter() - begin:.1f} s")
        replies = answers(llm, condition, cases, ways, sessions)
        for one, some in zip(scored, replies, strict=True):
            records.add(
                *(
                    {
                        "key": f"{condition}|{key}",
                        "condition": condition,
                        "case": one.case.key,
                        "label": one.labels[place],
                        "reply": reply.text,
                        "prompt_tokens": reply.prompt_tokens,
                        "left_out": reply.left_out,
                        "scores": one.grade(place, reply.text),
                    }
                    for place, (key, reply) in enumerate(zip(one.keys, some, strict=True))
                )
            )
        progress.print(f"{condition}: {time.perf_counter() - begin:.1f} s")


def _report(
    given: argparse.Namespace,
    where: dict[str, Any],
    records: Records,
    conditions: Sequence[Condition],
    metric: str,
) -> None:
    found = [record for record in records.all() if record["condition"] in conditions]
    metrics = sorted({name for record in found for name in record["scores"]})
    labels = [*sorted({record["label"] for record in found}), ALL]
    table = Table(title=f"{metric}, with 95 % intervals over conversations")
    table.add_column("questions")
    for condition in conditions:
        table.add_column(condition, justify="right")
    summary: dict[str, float] = {}
    for label in labels:
        row = []
        for condition in conditions:
            for name in metrics:
                some = [
                    record
                    for record in found
                    if record["condition"] == condition
                    and label in (ALL, record["label"])
                    and name in record["scores"]
                ]
                if not some:
                    continue
                estimate = bootstrap(
                    [record["scores"][name] for record in some],
                    [record["case"] for record in some],
                )
                key = f"{condition}_{label}_{name}".replace(" ", "_")
                summary |= {**estimate.figures(key), f"{key}_questions": estimate.count}
                if name == metric:
                    row.append(str(estimate))
        table.add_row(label, *row)
    console.print(table)
    for condition in conditions:
        cut = [record["left_out"] for record in found if record["condition"] == condition]
        if any(cut):
            console.print(
                f"{condition}: {sum(cut) / len(cut):,.1f} messages of the history did not fit into "
                "a prompt, on average: a larger --max-model-len shows more"
            )
        summary[f"{condition}_left_out"] = sum(cut) / max(len(cut), 1)
    if given.json:
        write_json(given.json, where, found, summary)


def _fingerprints(data: Path, adapter: str) -> dict[str, str]:
    """Of the data and of the adapter's weights, so that results of others are not gone on with."""
    from deltamem_vllm.adapter import load_adapter, resolve_adapter_dir
    from deltamem_vllm.errors import DeltaMemError

    try:
        weights = load_adapter(resolve_adapter_dir(adapter)).fingerprint
    except DeltaMemError as error:
        raise SystemExit(f"--adapter {adapter}: {error}") from None
    return {
        "data_digest": hashlib.sha256(data.read_bytes()).hexdigest(),
        "adapter_fingerprint": weights,
    }


def _conditions(text: str) -> list[Condition]:
    names = {str(condition): condition for condition in CONDITIONS}
    asked = [each.strip() for each in text.split(",") if each.strip()]
    unknown = [each for each in asked if each not in names]
    if unknown or not asked:
        raise SystemExit(f"--conditions: {', '.join(unknown) or 'none'}; known: {', '.join(names)}")
    return [names[each] for each in asked]


def _model(given: argparse.Namespace) -> tuple[str, str]:
    if (given.model is None) != (given.adapter is None):
        raise SystemExit("--model and --adapter belong together: give both, or neither")
    if given.model is not None:
        return given.model, given.adapter
    from deltamem_vllm.demo.assets import adapter_dir, model_dir

    progress.print("no --model: the demo model, which cannot answer such questions, for a try")
    return str(model_dir()), str(adapter_dir())


def _engine(model: str, adapter: str, given: argparse.Namespace) -> Any:
    # Read by vLLM when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if given.model is None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    from deltamem_vllm import MemoryLLM

    return MemoryLLM(
        model,
        adapter=adapter,
        dtype=given.dtype,
        max_model_len=given.max_model_len,
        enforce_eager=given.eager,
    )
