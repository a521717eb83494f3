"""The writer of a batch on Ray, as the plain object that its actor is."""

from pathlib import Path

import pytest

from deltamem_vllm.batch.output import Output
from deltamem_vllm.batch.rows import Result
from deltamem_vllm.errors import BatchError
from deltamem_vllm.ray.writer import RETRIES, Writer


def test_a_closed_writer_lets_another_run_write(tmp_path: Path) -> None:
    """Though its actor lives on for a while."""
    writer = Writer(tmp_path, {})
    writer.begin()
    writer.write([Result(id="a", row="rows:1").model_dump_json()])
    with pytest.raises(BatchError, match="another run"):
        Output(tmp_path, {})
    writer.close()
    with Output(tmp_path, {}) as output:
        assert len(output.finished) == 1
    with pytest.raises(AssertionError):
        writer.write([Result(id="b", row="rows:2").model_dump_json()])


def test_a_writer_that_could_not_begin_can_be_closed(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    writer = Writer(tmp_path, {})
    with pytest.raises(BatchError, match="other files"):
        writer.begin()
    writer.close()


def test_a_bundle_is_given_up_after_some_tries(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {})
    for _ in range(1 + RETRIES):
        writer.try_bundle(0, "2 rows, rows:1 to rows:2")
    writer.try_bundle(1, "1 rows, rows:3 to rows:3")
    with pytest.raises(BatchError, match="died over the same 2 rows, rows:1 to rows:2"):
        writer.try_bundle(0, "2 rows, rows:1 to rows:2")
