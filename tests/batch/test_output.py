"""The output folder after whatever happened to the run before."""

from pathlib import Path

import pytest

from deltamem_vllm.batch.output import Output, read_results
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
