"""The format of rows: what is taken, and what is said of what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.batch.openai_rows import from_openai
from deltamem_vllm.batch.rows import Result, Row, describe, parse_row
from deltamem_vllm.batch.source import Source, placed_rows
from deltamem_vllm.errors import BatchError, RowError
from tests.batch.rows import chat, mixed_rows, write_jsonl


@pytest.mark.parametrize("row", mixed_rows(2), ids=lambda row: row["id"])
def test_rows_of_all_kinds_are_taken(row: dict[str, Any]) -> None:
    assert parse_row(row).model_dump(exclude_unset=True) == row


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x"}, "id: Field required"),
        ({"id": "", "prompt": "x"}, "id: String should have at least 1"),
        ({"id": 7, "prompt": "x"}, "id: Input should be a valid string"),
        ({"id": "a"}, "this one has none"),
        ({"id": "a", "prompt": "x", "turns": ["y"]}, "has prompt and turns"),
        ({"id": "a", "prompt": "x", "sesion": "s"}, "sesion: Extra inputs"),
        ({"id": "a", "prompt": ""}, "prompt: is empty"),
        ({"id": "a", "messages": []}, "messages: List should have at least 1"),
        ({"id": "a", "turns": ["x", ""]}, "turns: one is empty"),
        ({"id": "a", "ingest": "x"}, "ingest: writes a session"),
        ({"id": "a", "ingest": "x", "session": "s", "mode": "read_only"}, "ingest: writes"),
        ({"id": "a", "ingest": "x", "session": "s", "sampling": {"seed": 1}}, "sampling: an in"),
        ({"id": "a", "prompt": "x", "replace": True}, "replace and segment_tokens"),
        ({"id": "a", "prompt": "x", "mode": "read_only"}, "read_only needs a session"),
        ({"id": "a", "prompt": "x", "session": "s", "mode": "off"}, "cannot name a session"),
        ({"id": "a", "prompt": "x", "session": "s", "ttl": -1}, "ttl: Input should be greater"),
        ({"id": "a", "messages": chat(1), "session": "s", "mode": "read_only", "ttl": 5}, "ttl"),
        ({"id": "a", "prompt": "x", "session": "s\n"}, "session"),
        ({"id": "a", "prompt": "x", "session": "s", "window": {"messages": 1}}, "window: belongs"),
        ({"id": "a", "messages": chat(1), "session": "s", "window": {}}, "window is"),
        ({"id": "a", "prompt": "x", "sampling": {"temperature": "0"}}, "sampling.temperature"),
        ({"id": "a", "prompt": "x", "sampling": {"best_of": 2}}, "sampling.best_of"),
        ({"id": "a", "prompt": "x", "session": "s", "share_prefix": True}, "belongs to messages"),
        ({"id": "a", "ingest": "x", "session": "s", "share_prefix": True}, "belongs to messages"),
        ({"id": "a", "messages": chat(1), "share_prefix": True}, "share_prefix: needs a session"),
        ({"id": "a", "turns": ["x"], "mode": "read_only", "share_prefix": True}, "needs a session"),
        ({"id": "a", "turns": ["x"], "mode": "off", "share_prefix": True}, "mode off has none"),
        ([1], "a row is an object, not list"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse_row(row)
    assert reason in str(raised.value)


def test_bad_lines_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": "a", "prompt": "x"}),
        "{",
        "",
        '{"id": "nan", "prompt": "x", "ttl": NaN}',
        json.dumps({"id": "a", "prompt": "y"}),
        json.dumps({"id": "b", "prompt": "y", "mode": "later"}),
        "[" * 100_000,
        json.dumps({"id": "c", "prompt": "x"}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    placed = list(Source(path))
    assert [one.row.id for one in placed if one.row is not None] == ["a", "c"]
    problems = {
        one.problem.row: (one.problem.id, one.problem.error)
        for one in placed
        if one.problem is not None
    }
    assert sorted(problems) == [f"rows.jsonl:{number}" for number in (2, 4, 5, 6, 7, 9)]
    assert problems["rows.jsonl:5"] == (None, "id: 'a' is that of an earlier row")
    assert problems["rows.jsonl:6"][0] == "b"
    assert len({one.key for one in placed}) == len(placed)


@pytest.mark.parametrize(
    ("line", "row_id"),
    [
        (r'{"id": "a", "prompt": "half a pair: \ud83d"}', "a"),
        (r'{"id": "a", "turns": ["\ud83d"]}', "a"),
        (r'{"id": "a", "messages": [{"role": "user", "content": "\ud83d"}]}', "a"),
        (r'{"id": "\ud83d", "prompt": "x"}', None),
        (r'{"id": "a", "prompt": "x", "\ud83d": 1}', "a"),
        (
            r'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "\ud83d": 1}}',
            None,
        ),
        (
            '{"id": "a", "messages": [{"role": "user", "content": %s}]}' % ("[" * 900 + "]" * 900),
            "a",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_json_cannot_hold_is_of_its_row_alone(
    tmp_path: Path, line: str, row_id: str | None
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n" + json.dumps({"id": "good", "prompt": "x"}) + "\n")
    bad, good = Source(path)
    assert bad.problem is not None and bad.problem.id == row_id and bad.problem.error
    assert good.row is not None
    # As results are kept, and as rows are sent to engines on Ray.
    assert Result.model_validate_json(bad.problem.model_dump_json().encode()) == bad.problem
    assert Row.model_validate_json(good.row.model_dump_json(exclude_unset=True)) == good.row


def test_errors_can_be_written_whatever_they_quote() -> None:
    error = describe(ValueError("no such role:\n'\ud83d'"))
    assert error == r"no such role: '\ud83d'"
    assert describe(ValueError()) == "ValueError"


def test_parquet_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row for row in mixed_rows(3) if "turns" not in row or "session" in row]
    (tmp_path / "p").mkdir()
    columns = {name: None for row in rows for name in row}
    table = pyarrow.Table.from_pylist([{**columns, **row} for row in rows])
    parquet.write_table(table, tmp_path / "p" / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    from_parquet = [one.row for one in Source(tmp_path / "p")]
    assert from_parquet == [one.row for one in Source(tmp_path / "rows.jsonl")]
    assert None not in from_parquet
    (tmp_path / "p" / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(BatchError, match=r"bad\.parquet"):
        list(Source(tmp_path / "p"))


def test_tables_have_nulls_where_rows_say_nothing() -> None:
    def row(name: str, **memory: Any) -> dict[str, Any]:
        body = {"messages": chat(name), "memory": memory}
        return {"custom_id": name, "url": "/v1/chat/completions", "body": body}

    rows = [row("a", session="s", mode="read_only"), row("b", session="s", ttl=5.0)]
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    placed = placed_rows((one["custom_id"], one) for one in table.to_pylist())
    assert [one.row for one in placed] == [parse_row(from_openai(one)) for one in rows]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    names = [str(number) for number in range(2000)]
    parquet.write_table(pyarrow.table({"id": names, "prompt": names}), path)
    damaged = bytearray(path.read_bytes())
    damaged[200:400] = b"\xff" * 200
    path.write_bytes(damaged)
    with pytest.raises(BatchError, match=r"rows\.parquet: is not valid Parquet"):
        list(Source(path))
    # A column of text whose bytes are none.
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"id": ["a"], "prompt": text}), path)
    with pytest.raises(BatchError, match=r"rows\.parquet: is not valid Parquet"):
        list(Source(path))
    content = [{"id": "a", "messages": [{"role": "user", "content": b"\xff"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    (placed,) = Source(path)
    assert placed.problem is not None and "cannot be written" in str(placed.problem.error)


def test_openai_rows_mean_the_same() -> None:
    body = {
        "model": "any",
        "messages": chat(1),
        "max_completion_tokens": 5,
        "temperature": 0,
        "stream": False,
        "memory": {"session": "s", "mode": "read_only", "share_prefix": True},
    }
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    expected = {"id": "a", "session": "s", "mode": "read_only", "messages": chat(1)}
    expected |= {"share_prefix": True, "sampling": {"max_tokens": 5, "temperature": 0}}
    assert parse_row(from_openai(row)) == parse_row(expected)
    for change, reason in (
        ({"stream": True}, r"body\.stream"),
        ({"n": 2}, r"body\.n"),
        ({"logit_bias": {}}, "logit_bias"),
        ({"memory": {"turn": "t"}}, r"body\.memory: turn"),
    ):
        with pytest.raises(RowError, match=reason):
            from_openai({**row, "body": {**body, **change}})
    for change, reason in (({"url": "/v1/embeddings"}, "url"), ({"body": 1}, "body")):
        with pytest.raises(RowError, match=reason):
            from_openai({**row, **change})


def test_inputs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BatchError, match=str(path)):
            Source(path)
    (tmp_path / "rows.csv").touch()
    with pytest.raises(BatchError, match=r"rows\.csv"):
        Source(tmp_path / "rows.csv")
