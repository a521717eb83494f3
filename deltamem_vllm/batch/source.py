"""Reads rows from JSONL and Parquet files."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.batch.openai_rows import from_openai, is_openai_row
from deltamem_vllm.batch.rows import Placed, Result, describe, parse_row
from deltamem_vllm.errors import BatchError, RowError

JSONL, PARQUET = ".jsonl", ".parquet"
SUFFIXES: Final = (JSONL, PARQUET)

PARQUET_ROWS: Final = 1024
"""Read at a time."""

SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""JSON can hold one half of a pair, and no file of UTF-8 can."""


class Source:
    """The rows of a file, or of a folder's files in order of their names.

    Iterating reads them anew: valid rows, and for each bad one what is wrong with it.

    Args:
        path: a `.jsonl` or `.parquet` file, or a folder of them.

    Raises:
        BatchError: there is nothing to read.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise BatchError(f"{path}: no such file or folder.")
        self._files = [path]
        if path.is_dir():
            self._files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not self._files:
            raise BatchError(f"{path}: holds no {' or '.join('*' + one for one in SUFFIXES)} file.")
        for file in self._files:
            if file.suffix not in SUFFIXES:
                raise BatchError(f"{file}: is neither {' nor '.join(SUFFIXES)}.")

    def __iter__(self) -> Iterator[Placed]:
        seen: set[str] = set()
        for file in self._files:
            read = _json_lines if file.suffix == JSONL else _parquet_rows
            for number, content in read(file):
                yield _placed(f"{file.name}:{number}", content, seen)


def placed_rows(contents: Iterable[tuple[str, Any]]) -> Iterator[Placed]:
    """Rows of a table that is in memory already, each with its place."""
    seen: set[str] = set()
    for where, content in contents:
        yield _placed(where, _without_nulls(content), seen)


def _placed(where: str, content: Any, seen: set[str]) -> Placed:
    row_id = None
    try:
        if isinstance(content, RowError):
            raise content
        if is_openai_row(content):
            content = from_openai(content)
        found = content.get("id") if isinstance(content, dict) else None
        if isinstance(found, str) and found and not SURROGATE.search(found):
            if found in seen:
                raise RowError(f"id: {found!r} is that of an earlier row")
            seen.add(found)
            row_id = found
        return Placed(where, parse_row(content))
    except RowError as error:
        return Placed(where, None, Result(id=row_id, row=where, error=describe(error)))


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                yield number, RowError(f"no valid JSON ({error})")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BatchError(
            f"{file}: reading Parquet needs pyarrow: pip install 'deltamem-vllm[ray]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for content in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(content)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{file}: is not valid Parquet ({error}).") from None


def _without_nulls(value: Any) -> Any:
    """A table has every column, and every field of a struct, in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
