"""The output folder after whatever happened to the run before."""

import os
from pathlib import Path

import pytest

from deltamem_vllm.batch.output import TAIL_BYTES, Output, read_results
from deltamem_vllm.batch.rows import Result
from deltamem_vllm.errors import BatchError


def result(name: str) -> Result:
    return Result(id=name, row=f"rows:{name}")


def test_each_row_has_one_result_over_all_runs(tmp_path: Path) -> None:
    with Output(tmp_path / "out", {}) as output:
        job = output.job
        assert output.write([result("a"), result("b"), result("a")]) == [result("a"), result("b")]
    with Output(tmp_path / "out", {}) as output:
        assert output.job == job
        assert output.write([result("b"), result("c")]) == [result("c")]
    with Output(tmp_path / "out", {}) as output:
        assert not output.write([result("a"), result("c")])
    assert [one.id for one in read_results(tmp_path / "out")] == ["a", "b", "c"]
    assert len(list((tmp_path / "out").glob("part-*"))) == 2


def test_half_a_line_is_cut_off_and_its_row_run_again(tmp_path: Path) -> None:
    with Output(tmp_path, {}) as output:
        output.write([result("a")])
        output.write([result("b")])
    (part,) = tmp_path.glob("part-*")
    part.write_bytes(part.read_bytes()[:-5])
    assert [one.id for one in read_results(tmp_path)] == ["a"]
    with Output(tmp_path, {}) as output:
        assert output.write([result("a"), result("b")]) == [result("b")]
    assert [one.id for one in read_results(tmp_path)] == ["a", "b"]
    for path in tmp_path.glob("part-*"):
        assert path.read_bytes().endswith(b"\n")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with Output(tmp_path / "out", {"model": "a"}) as output:
        output.begin()
        with pytest.raises(BatchError, match="another run"):
            Output(tmp_path / "out", {"model": "a"})
    with pytest.raises(BatchError, match="model was 'a', is 'b'"):
        Output(tmp_path / "out", {"model": "b"})
    with Output(tmp_path / "out", {"model": "a"}):
        pass  # the refused ones have let go of it
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BatchError, match="other files"):
        Output(tmp_path / "mine", {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "part-00000.jsonl").write_text("{}\n")
    with pytest.raises(BatchError, match=r"part-00000\.jsonl:1"):
        Output(tmp_path / "out", {"model": "a"})


def test_a_run_that_did_not_begin_binds_no_other(tmp_path: Path) -> None:
    """As one whose model could not be found."""
    with Output(tmp_path, {"model": "mistyped"}):
        pass
    with Output(tmp_path, {"model": "a"}) as output:
        output.begin()
        job = output.job
    with Output(tmp_path, {"model": "a"}) as output:
        assert output.job == job


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(BatchError, match=f"{folder}: cannot be written"):
            Output(folder, {})


@pytest.mark.parametrize("torn", [0, 1, TAIL_BYTES - 1, TAIL_BYTES, 3 * TAIL_BYTES + 5])
def test_a_torn_end_of_any_length_is_cut_off(tmp_path: Path, torn: int) -> None:
    with Output(tmp_path, {}) as output:
        output.write([result("a"), result("b")])
    (part,) = tmp_path.glob("part-*")
    whole = part.read_bytes()
    for before in (whole, b""):
        part.write_bytes(before + b"x" * torn)
        with Output(tmp_path, {}) as output:
            assert len(output.finished) == before.count(b"\n")
        assert part.read_bytes() == before


def test_a_run_killed_before_its_first_row_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    """Between the two steps in which `job.json` is made."""
    (tmp_path / "lock").touch()
    (tmp_path / "job.tmp").write_text("{")
    with Output(tmp_path, {}) as output:
        assert output.write([result("a")])
    assert [one.id for one in read_results(tmp_path)] == ["a"]


def test_rows_that_a_full_disk_refused_are_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything written behind them, where half a line may be."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Output(tmp_path, {}) as output:
        output.write([result("a")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                output.write([result("b")])
        assert output.finished == {result("a").key}
        with pytest.raises(OSError, match="No space"):
            output.write([result("c")])
    with Output(tmp_path, {}) as output:
        assert result("c").key not in output.finished
