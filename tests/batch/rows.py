"""Inputs that tests of batches share."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deltamem_vllm.batch.job import BatchSpec
from deltamem_vllm.batch.output import read_results
from deltamem_vllm.batch.rows import Result, Sampling
from tests.helpers import DATA, VOCAB, word

ADAPTER = str(DATA / "qwen3_tsw" / "adapter")

ENGINE_ARGS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_logprobs": VOCAB,
    "max_num_seqs": 16,
    "block_size": 32,
    "enforce_eager": True,
}


def spec_of(model: Path, store: str | None, **fields: Any) -> BatchSpec:
    """Of a golden case, greedy."""
    sampling = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    fields = {"sampling": sampling, "engine_args": ENGINE_ARGS, **fields}
    return BatchSpec(str(model), ADAPTER, store, **fields)


def text(seed: Any, length: int) -> str:
    """Random words of a golden case's vocabulary."""
    tokens = random.Random(str(seed)).choices(range(6, VOCAB), k=length)
    return " ".join(map(word, tokens))


def chat(seed: Any, length: int = 20) -> list[dict[str, Any]]:
    """A chat of one message."""
    return [{"role": "user", "content": text(seed, length)}]


def mixed_rows(sessions: int) -> list[dict[str, Any]]:
    """Rows of all kinds, those of a session spread over the input; what a session is asked between
    two of its writes depends on their order."""
    rows: list[dict[str, Any]] = []
    for step in range(4):
        for number in range(sessions):
            name, session = f"{step}/{number}", f"session {number}"
            match step:
                case 0:
                    rows.append({"id": name, "session": session, "ingest": text(name, 150)})
                case 1:
                    rows.append({"id": name, "session": session, "turns": [text(name, 9)] * 2})
                case 2:
                    for one in "ab":
                        ask = {"id": name + one, "session": session, "mode": "read_only"}
                        rows.append({**ask, "messages": chat(name + one)})
                    rows.append({"id": f"alone {number}", "turns": ["one two", text(name, 7)]})
                case 3:
                    limit = 4 + number % 3 * 10
                    sampling = {"max_tokens": limit}
                    row = {"id": name, "session": session, "sampling": sampling}
                    rows.append({**row, "messages": chat(name)})
                    rows.append({"id": f"prompt {number}", "prompt": text(number, 5)})
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(results: Iterable[Result]) -> dict[str, Any]:
    """What must not depend on how a batch was run, by row."""
    found: dict[str, Any] = {}
    for result in results:
        assert result.key not in found, f"{result.key} has two results"
        content = result.model_dump()
        if content["ingested"] is not None:
            del content["ingested"]["replayed"]
        for reply in content["replies"]:
            if reply["memory"] is not None:
                del reply["memory"]["replayed"]
                if result.session is None:
                    del reply["memory"]["session"]  # holds the job's name
        found[result.key] = content
    return found


def results_of(folder: Path) -> dict[str, Result]:
    """By id."""
    return {result.id or result.row: result for result in read_results(folder)}


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({row["session"] for row in rows if "session" in row})
