"""What `deltamem batch` says before an engine starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.cli import app
from deltamem_vllm.cli.batch import _settings
from tests.batch.rows import write_jsonl

MODEL = ("--model", "no-such-model")


def test_arguments_of_the_engine_are_read_as_yaml() -> None:
    pairs = ["max_num_seqs=64", "--enforce-eager=true", 'compilation_config={"level": 0}']
    assert _settings([*pairs, "revision=main"]) == {
        "max_num_seqs": 64,
        "enforce_eager": True,
        "compilation_config": {"level": 0},
        "revision": "main",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_num_seqs"], "--set takes NAME=VALUE"),
        (["--set", "a={"], "is not valid YAML"),
        (["--sampling", '{"temp": 0}'], "--sampling is not valid: temp: Extra inputs"),
        (["--sampling", "hot"], "--sampling is not valid"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}])
    told = CliRunner().invoke(app, ["batch", str(path), str(tmp_path / "out"), *MODEL, *arguments])
    assert told.exit_code == 2
    assert told.stderr.startswith("error: ") and message in told.stderr
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["batch", str(tmp_path / "no.jsonl"), str(tmp_path), *MODEL])
    assert told.exit_code == 2
    assert told.stderr == f"error: {tmp_path / 'no.jsonl'}: no such file or folder.\n"


def test_nothing_left_to_do_starts_no_engine(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [])
    told = CliRunner().invoke(app, ["batch", str(path), str(tmp_path / "out"), *MODEL])
    assert told.exit_code == 0
    assert (tmp_path / "out" / "report.json").exists()
